"""The door through pytest: what is collected, what is printed, how a run ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
import torch._dynamo  # cannot be imported twice, and each run here forgets what it imported

import transformer_checks.checks.subject  # noqa: F401  # imported once for all runs here
from transformer_checks.checks.run.order import CHECKS, all_listed, position

pytest_plugins = ("pytester",)

STUDENT = """
import torch
from torch import nn


class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_embd=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.attention = nn.MultiheadAttention(n_embd, 4, batch_first=True)
        self.norm = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, tokens):
        B, T = tokens.shape
        x = self.embedding(tokens) + self.positions(torch.arange(T))
        mask = MASK
        x = x + self.attention(self.norm(x), self.norm(x), self.norm(x), attn_mask=mask, need_weights=False)[0]
        return self.head(x)
"""
CAUSAL = STUDENT.replace("MASK", "torch.ones(T, T, dtype=torch.bool).triu(1)")
LEAKING = STUDENT.replace("MASK", "None")
CAUSALITY = ("-k", "check_causality or check_contract")


@pytest.fixture
def student(pytester):
    """Writes a student's file and runs pytest on it, in this process."""

    def run(source: str, *options: str, name: str = "student.py"):
        (pytester.path / name).write_text(source)
        return pytester.runpytest_inprocess("--model", name, "--seed", "3", "-p", "no:cacheprovider", *options)

    return run


def verdict_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sanity_selects_exactly_the_two(pytester):
    result = pytester.runpytest_inprocess("--model", "transformer", "-m", "sanity", "--collect-only", "-q")
    found = [line.partition("::")[2] for line in result.outlines if "::" in line]
    assert sorted(found) == [
        "check_learns_only_unmasked_targets[transformer]",
        "check_memorizes_the_sentence[transformer]",
    ]


def test_sanity_selects_two_for_each_of_several_subjects(pytester):
    for folder in ("one", "two"):
        (pytester.path / folder).mkdir()
        (pytester.path / folder / "model.py").write_text(CAUSAL)
    result = pytester.runpytest_inprocess(
        "--model", "one/model.py", "--model", "two/model.py", "-m", "sanity", "--collect-only", "-q"
    )
    found = [line for line in result.outlines if "::" in line]
    assert len(found) == len(set(found)) == 4


def test_only_the_checks_are_collected_with_a_model_and_no_paths(student, pytester):
    pytester.makepyfile(test_theirs="def test_theirs(): assert False")
    result = student(CAUSAL, *CAUSALITY, "-v")
    assert result.ret == 0
    result.stdout.no_fnmatch_line("*test_theirs*")


def test_paths_that_are_named_are_collected_too(student, pytester):
    pytester.makepyfile(test_theirs="def test_theirs(): pass")
    result = student(CAUSAL, "test_theirs.py", "-v")
    result.stdout.fnmatch_lines(["*test_theirs.py::test_theirs PASSED*"])
    result.assert_outcomes(passed=1)
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED, "a run with a model in which no check ran is not green"


def test_a_failure_is_a_finding_without_a_traceback(student):
    result = student(LEAKING, *CAUSALITY)
    assert result.ret == 1
    text = result.stdout.str()
    assert "✗ check_causality." in text
    assert "no-causal-mask" in text
    assert "again" in text
    assert "--seed 3" in text
    assert "Traceback" not in text
    assert "checks/expect.py" not in text


@pytest.mark.parametrize("options", [(), ("-q",), ("-v",), ("-s",)], ids=["plain", "quiet", "verbose", "uncaptured"])
def test_the_first_finding_is_printed_once_and_when_it_is_found(student, options):
    result = student(LEAKING, "-k", "check_contract or check_future_cannot_change_past", *options)
    text = result.stdout.str()
    assert text.count("✗ check_causality.check_future_cannot_change_past\n") == 1
    before, after = text.split("✗ check_causality.check_future_cannot_change_past\n")
    assert "FAILURES" not in before and "shown above, as it was found" in after.split("FAILURES")[1]
    assert "again" in after.split("FAILURES")[0]
    rest = after.split("FAILURES")[0].partition("again")[2]
    assert re.search(r"^[.b-]{3,}|blocked", rest, re.MULTILINE), "others ran after it"


def test_failures_are_listed_by_theme_whatever_ran_first(student, pytester):
    source = LEAKING.replace(
        "x = self.embedding(tokens)", "tokens += 0 * tokens; tokens[:, 0] = 1; x = self.embedding(tokens)"
    )
    result = student(source, *CAUSALITY, "--verdicts", "v.jsonl")
    failed = [r["check"] for r in verdict_lines(pytester.path / "v.jsonl") if r.get("outcome") in ("failed", "error")]
    listed = [line.split("::")[1].split("[")[0] for line in result.outlines if line.startswith("FAILED")]
    assert len(failed) > 1 and [name.split(".")[1] for name in sorted(failed, key=position)] == listed
    assert f"start with {min(failed, key=position)}" in result.stdout.str()


def test_no_tracebacks_means_no_findings(student):
    assert "✗ check_" not in student(LEAKING, *CAUSALITY, "--tb", "no").stdout.str()


@pytest.mark.parametrize("ci", ["", "true"])
def test_the_last_lines_repeat_no_finding(student, monkeypatch, ci):
    """Where CI is set, pytest repeats the message of each failure there, whatever its length."""
    monkeypatch.setenv("CI", ci)
    monkeypatch.delenv("BUILD_NUMBER", raising=False)
    last = student(LEAKING, *CAUSALITY).outlines[-2:]
    assert last[0].startswith("FAILED") and ("position 0 sees the future" in last[0]) == bool(ci)


def test_the_names_of_files_stay_where_tests_of_ones_own_run(student, pytester):
    pytester.makepyfile(test_theirs="def test_theirs(): pass")
    result = student(CAUSAL, "test_theirs.py", str(CHECKS / "check_contract.py"), "--rootdir", str(pytester.path))
    assert any(line.startswith("test_theirs.py .") for line in result.outlines)
    assert not any("check_contract.py" in line for line in result.outlines)


@pytest.mark.parametrize("budget", ["-1", "0", "soon"])
def test_a_budget_is_a_positive_number(student, budget):
    result = student(CAUSAL, f"--budget={budget}")
    assert result.ret == 4 and budget in result.stderr.str()


def test_a_budget_says_what_it_left_out(student, pytester):
    result = student(CAUSAL, "--budget", "1.5", "--verdicts", "v.jsonl")
    assert result.ret == 0
    summary = verdict_lines(pytester.path / "v.jsonl")[-1]["summary"]
    left = [r for r in verdict_lines(pytester.path / "v.jsonl") if "budget" in r.get("evidence", ())]
    assert summary["total"] == len(all_listed()) and 0 < len(left) < summary["total"]
    result.stdout.fnmatch_lines(
        [f"the budget of 1.5 s left out {len(left)} checks; only they catch * of the known bugs (*)"]
    )


def test_a_passing_model_exits_with_zero_and_says_what_ran(student):
    result = student(CAUSAL, *CAUSALITY)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["seed: 3", "*checks ran*"])


def test_verdict_lines_are_written_as_they_happen(student, pytester):
    student(LEAKING, *CAUSALITY, "--verdicts", "verdicts.jsonl")
    records = verdict_lines(pytester.path / "verdicts.jsonl")
    checks = [r for r in records if "check" in r]
    starts = [r["started"] for r in records if "started" in r]
    assert [c["check"] for c in checks] == starts
    assert records.index(checks[0]) == 1
    assert "summary" in records[-1]
    assert records[-1]["summary"]["failed"] == sum(c["outcome"] == "failed" for c in checks) > 0
    failed = next(c for c in checks if c["outcome"] == "failed")
    assert failed["rule"]
    assert failed["says"]
    assert failed["likely"]
    assert failed["where"]["file"].endswith("student.py")
    assert "--seed 3" in failed["reproduce"]


def test_a_process_that_dies_leaves_the_name_of_its_check(pytester):
    (pytester.path / "dies.py").write_text(
        CAUSAL.replace("B, T = tokens.shape", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    )
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "--model", "dies.py:GPT", "--verdicts", "v.jsonl", *CAUSALITY],
        cwd=pytester.path, capture_output=True,
    )  # fmt: skip
    assert result.returncode != 0
    records = verdict_lines(pytester.path / "v.jsonl") if (pytester.path / "v.jsonl").exists() else []
    assert all("summary" not in r for r in records)


def test_a_crash_shows_the_subjects_own_line(student):
    source = CAUSAL.replace("return self.head(x)", "return self.head(x) if T != 5 else self.missing_part(x)")
    result = student(source, *CAUSALITY)
    assert result.ret == 1
    text = result.stdout.str()
    assert "missing_part" in text
    assert "student.py:20" in text
    assert "checks/" not in text.replace("checks/check_", "")


def test_a_run_that_executed_nothing_is_not_green(student):
    assert student(CAUSAL, "-k", "no_check_is_called_this").ret != 0


def test_a_run_that_left_out_a_check_is_not_green(student, pytester):
    """Nobody deselected it, and another plugin took it for its own."""
    pytester.makeconftest("""
        def pytest_runtest_protocol(item):
            return True if "check_logits_have_shape" in item.name else None
    """)
    result = student(CAUSAL, "-k", "check_logits_have_shape or check_inputs_are_left_alone")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["not green: no verdict from 1 of the checks of student.py: check_logits_have_shape*"])


def test_a_run_that_says_nothing_of_one_of_its_models_is_not_green(student):
    """The reference has a cache, the student's model has none."""
    result = student(CAUSAL, "--model", "transformer", "-k", "check_cached_decoding_equals_full")
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    result.stdout.fnmatch_lines(["no check ran: this says nothing about the model", "1 passed; 1 of * checks ran"])


def test_a_run_stopped_at_its_first_failure_says_how_many_ran(student):
    result = student(LEAKING, "-x", "-k", "check_contract or check_causality")
    assert result.ret != 0
    assert re.search(r"1 failed.*; \d+ of \d+ checks ran", result.stdout.str())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--with", "loss"), "PART=FILE:NAME"),
        (("--device", "cudda"), "cudda"),
        (("--device", "hpu"), "--device hpu: torch"),
        (("--seed", "x"), "--seed"),
        (("--verdicts", "no/such/folder/v.jsonl"), "no/such/folder"),
        (("--spec", "gpt9"), "gpt9"),
    ],
)
def test_a_bad_option_is_a_usage_error_that_names_the_value(student, options, says):
    result = student(CAUSAL, *CAUSALITY, *options)
    assert result.ret == 4
    text = result.stdout.str() + result.stderr.str()
    assert says in text
    assert "Traceback" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without CUDA")
def test_gpu_without_cuda_is_one_line_with_the_torch_build(pytester):
    result = pytester.runpytest_inprocess("--gpu")
    assert result.ret == 4
    assert torch.__version__ in result.stderr.str()


def test_a_missing_file_is_a_usage_error(pytester):
    result = pytester.runpytest_inprocess("--model", "nowhere.py")
    assert result.ret == 4
    assert "nowhere.py" in result.stderr.str()


def test_artifacts_of_another_subject_lie_in_a_folder_of_their_own(student, pytester):
    result = student(CAUSAL, "-m", "sanity")
    assert result.ret == 0
    (folder,) = [p for p in (pytester.path / "out").iterdir() if p.is_dir()]
    assert "student" in folder.name
    assert (folder / "report.md").exists()
    assert (folder / "sanity_check_1" / "loss.png").exists()


def test_an_unwritable_folder_is_said_and_the_verdicts_stand(student, pytester):
    (pytester.path / "file").write_text("in the way")
    result = student(CAUSAL, "-m", "sanity", "--out", "file/out")
    result.stdout.fnmatch_lines(["*2 passed*"])
    assert "file/out" in result.stdout.str()


def test_a_strangers_run_is_left_alone(pytester):
    """A repository whose conftest defines our options runs unchanged, and nothing heavy is imported for it."""
    pytester.makeconftest("""
        def pytest_addoption(parser):
            for name in ("--gpu", "--slow"):
                parser.addoption(name, action="store_true")
            for name in ("--model", "--device", "--seed"):
                parser.addoption(name, default="theirs")
    """)
    pytester.makepyfile("""
        import sys

        def test_options(request):
            assert request.config.getoption("model") == "theirs"
            assert request.config.getoption("--gpu") is True
            assert request.config.getoption("--seed") == "12"

        def test_nothing_heavy():
            assert not {"torch", "transformer_checks.checks.subject", "matplotlib"} & set(sys.modules)
    """)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "--gpu", "--seed", "12", "-q", "-p", "no:cacheprovider"],
        cwd=pytester.path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert "2 passed" in result.stdout


def test_workers_share_the_seed_of_the_run(pytester):
    (pytester.path / "student.py").write_text(CAUSAL)
    subprocess.run(
        [sys.executable, "-m", "pytest", "--model", "student.py", "-n", "2", "--verdicts", "v.jsonl", *CAUSALITY],
        cwd=pytester.path, capture_output=True, check=True,
    )  # fmt: skip
    commands = [r["reproduce"] for r in verdict_lines(pytester.path / "v.jsonl") if "check" in r]
    assert len({command.split("--seed ")[1].split()[0] for command in commands}) == 1


def test_an_expected_failure_is_none_and_one_that_passes_is(student, pytester):
    found = student(LEAKING, *CAUSALITY, "--verdicts", "v.jsonl").ret
    assert found == 1
    failed = [r["check"] for r in verdict_lines(pytester.path / "v.jsonl") if r.get("outcome") == "failed"]
    (pytester.path / "expected.txt").write_text("".join(f"{check}: it is an encoder\n" for check in failed))
    assert student(LEAKING, *CAUSALITY, "--expected-failures", "expected.txt").ret == 0
    result = student(CAUSAL, *CAUSALITY, "--expected-failures", "expected.txt")
    assert result.ret == 1
    assert f"{failed[0]} was expected to fail (it is an encoder) and passed" in result.stdout.str()


@pytest.mark.parametrize(("text", "says"), [("check_x: y", "check_x"), ("check_contract.check_ties_survive", "reason")])
def test_a_bad_line_of_expected_failures_is_a_usage_error(student, pytester, text, says):
    (pytester.path / "expected.txt").write_text(text)
    result = student(CAUSAL, *CAUSALITY, "--expected-failures", "expected.txt")
    assert result.ret == 4
    assert says in result.stderr.str()
