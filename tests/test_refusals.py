"""Models that cannot be loaded or crash: each gets a clear answer with its own file and line, and none ever passes."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy
import pytest
import torch

from transformer_checks.checks import check_model
from transformer_checks.checks.meet import UsageError, imports, process, sandbox
from transformer_checks.checks.run.subjects import subject_of

HERE = Path(__file__).parent / "bad_subjects"

# file[:NAME] -> words of the error, which also names the line marked "# here" if there is one
REFUSED = {
    "another_framework.py": ("written for mlx", "PyTorch and NumPy models"),
    "broken_notebook.ipynb": ("not a notebook",),
    "computes_with_a_missing_library.py": ("fused_of_nowhere.scan", "install fused_of_nowhere"),
    "exits_at_import.py": ("sys.exit(0)",),
    "exits_in_forward.py": ("sys.exit(0)", "remove that line"),
    "factory_gives_a_dict.py": ("build_model", "got dict", "return MyModel("),
    "function_of_weights.py": ("lambda inputs: gpt2(inputs, wte=…",),
    "hangs_at_import.py": ("still running after 4 s", "of processor time"),
    "hangs_in_forward.py": ("still running after 1 s of processor time",),
    "hidden_states_only.py": ("vocabulary of 17", "have 32", "output head"),
    "holds_a_missing_layer.py": ("not a Module subclass", "install layers_of_nowhere"),
    "imports_what_is_not_there.py": ("ImportError", "missing_name"),
    "integer_logits.py": ("torch.int64", "floating-point"),
    "kills_at_import.py": ("os._exit(0)",),
    "kills_in_forward.py": ("os._exit(0)",),
    "last_position_only.py": ("[3, 17]", "the last position only", "head(x[:, -1])", "def build_model("),
    "needs_a_value_of_a_script/model.py": ("settings.cfg.model.wide: its line was not run", "def build_model("),
    "name_error.py": ("NameError", "correct that line"),
    "needs_a_gpu.py": ("CUDA", "--gpu", "device=tokens.device"),
    "never_initialized.py": ("meta device", "init_weights()"),
    "no_forward.py": ("no forward of its own",),
    "no_model.py": ("no model", "gelu, softmax", "def build_model(vocab_size, block_size):"),
    "other_device.py": ("on meta", "on cpu"),
    "raises_at_import.py": ("ZeroDivisionError", "scale = torch.pi / 0"),
    "raises_in_constructor.py": ("ValueError: the width must be 7",),
    "raises_in_forward.py": ("RuntimeError", "[3, 32]"),
    "recursive_constructor.py": ("RecursionError",),
    "returns_a_loss_only.py": ("expected logits [3, 7, V], got Tensor []", "must return the logits as well"),
    "returns_nothing.py": ("got None",),
    "several_models.py": ("--model", "several_models.py:Small", "several_models.py:Large"),
    "several_models.py:Medium": ("has no Medium", "Small, Large"),
    "several_models.py:nn": ("module, expected a class, a factory or a model",),
    "still_to_be_written.py": ("NotImplementedError", "still to be written"),
    "stops_for_a_debugger.py": ("waits for a debugger", "remove that line"),
    "syntax_error.py": ("SyntaxError", "def broken("),
    "unfillable.py": ("codebook, router", "Model(codebook=…, router=…, …)"),
    "unhashable.py": ("unhashable",),
    "vocabulary_ignored.py": ("vocabulary of 17", "50257", "head is a Linear"),
    "wants_a_graph.py": ("graph.degree",),
}
ANYWHERE = ("recursive_constructor.py",)  # Python decides which of its frames is the last


def here(name: str) -> str:
    """`file.py:12`, the marked line; only the file's name if no line is marked."""
    file = name.partition(":")[0]
    for number, line in enumerate((HERE / file).read_text().splitlines(), start=1):
        if "# here" in line and file not in ANYWHERE:
            return f"{file}:{number}"
    return file


@pytest.mark.parametrize("name", REFUSED)
def test_the_error_names_its_own_line(name, monkeypatch):
    if name.startswith("hangs"):
        monkeypatch.setattr(sandbox, "RUNNING_SECONDS", 1.0)
        monkeypatch.setattr(imports, "LOADING_SECONDS", 1.0)
    with pytest.raises(UsageError) as refusal:
        subject_of(str(HERE / name))
    said = str(refusal.value)
    assert here(name) in said
    for words in REFUSED[name]:
        assert words in said
    assert "Traceback" not in said and not re.search(r"checks/(meet|subject)", said)
    assert refusal.value.__cause__ is None
    assert refusal.value.__suppress_context__ or refusal.value.__context__ is None


# file -> words of the report of its checks, which also names the marked line
REPORTED_BY_A_CHECK = {
    "nan_logits.py": ("nan",),
    "raises_at_one_token.py": ("no pair of tokens",),
    "raises_at_block_size.py": ("one position too many",),
    "mutates_its_input.py": ("token",),
}


@pytest.mark.parametrize("name", REPORTED_BY_A_CHECK)
def test_a_check_reports_it(name):
    report = check_model(str(HERE / name), checks=["contract", "modes"], seed=1)
    assert not report.passed
    said = " ".join(repr(report).split())
    assert here(name) in said
    for words in REPORTED_BY_A_CHECK[name]:
        assert words in said.lower()
    assert "Traceback" not in said


@pytest.mark.parametrize("name", ("odd_equality.py", "warns.py", "prints_megabytes.py", "changes_global_state.py"))
def test_odd_code_can_be_checked(name, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = check_model(str(HERE / name), checks=["check_logits_have_shape"], seed=1)
    assert report.passed
    assert len(capsys.readouterr().out) < 2 * process.PRINTED_CHARACTERS


def test_global_state_is_restored():
    threads, folder = torch.get_num_threads(), os.getcwd()
    torch.manual_seed(7), numpy.random.seed(7), random.seed(7)
    wanted = torch.rand(1), numpy.random.rand(), random.random()
    torch.manual_seed(7), numpy.random.seed(7), random.seed(7)
    modules, path = set(sys.modules), list(sys.path)
    subject = subject_of(str(HERE / "changes_global_state.py"))
    subject.logits(subject.build(), subject.tokens(2, 3))
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled() and not torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == threads and os.getcwd() == folder
    assert "CHECKED_BY" not in os.environ
    assert sys.path == path and not {name for name in set(sys.modules) - modules if "changes_global" in name}
    assert (torch.rand(1), numpy.random.rand(), random.random()) == wanted
    for setting in ("default dtype", "number of threads", "gradient mode", "deterministic", "working directory"):
        assert setting in subject.header


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nowhere.py", ("no file nowhere.py", "FILE.py[:NAME]")),
        ("nowhere.py:GPT", ("no file nowhere.py",)),
        ("package_of_nowhere.module:GPT", ("no module 'package_of_nowhere.module'",)),
        ("two words", ("'two words'", "FILE.py[:NAME]")),
        (str(HERE) + "/", ("folder",)),
        ("", ("FILE.py[:NAME]",)),
    ],
)
def test_a_model_name_without_a_model_is_an_error(given, words):
    with pytest.raises(UsageError) as refusal:
        subject_of(given)
    for word in words:
        assert word in str(refusal.value)


# file -> how its process ends and in which check; none of these may pass
SUPERVISED = {
    "segfaults.py": ("killed by SIGSEGV", "before its first check"),
    "segfaults_later.py": ("killed by SIGSEGV", "check_"),
    "aborts.py": ("killed by SIGABRT", "before its first check"),
    "ends_without_a_word.py": ("ended itself with exit code 0", "before its first check"),
    "waits_past_python.py": ("wrote no verdict for 15 s", "before its first check"),
}


@pytest.mark.parametrize("name", SUPERVISED)
def test_a_process_that_dies_is_reported(name):
    patience = "15" if name == "waits_past_python.py" else "100"  # on a busy machine the crash comes late
    run = supervised(str(HERE / name), "--patience", patience, "--seed", "1")
    assert run.returncode == 1
    for words in (*SUPERVISED[name], "not green"):
        assert words in run.stderr
    if name != "ends_without_a_word.py":
        assert here(name) in run.stderr


def test_a_usage_error_under_supervision_has_pytests_exit_code():
    run = supervised(str(HERE / "no_model.py"))
    assert run.returncode == 4
    assert "no_model.py has no model" in run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr


def supervised(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "transformer_checks", *arguments, "-p", "no:cacheprovider"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_every_file_is_used():
    files = {path.name for path in HERE.iterdir() if path.is_file()}
    used = {name.partition(":")[0] for name in (*REFUSED, *REPORTED_BY_A_CHECK, *SUPERVISED) if "/" not in name}
    assert files == used | {"odd_equality.py", "warns.py", "prints_megabytes.py", "changes_global_state.py"}
    assert len(files) >= 30
