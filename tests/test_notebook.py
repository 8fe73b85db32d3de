"""check_model in a cell, the report that it gives, weights from a file, and failures that are expected."""

from __future__ import annotations

import io
import json
import re
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from transformer_checks.checks import check_model
from transformer_checks.checks.meet import UsageError
from transformer_checks.checks.probes.precision import precision
from transformer_checks.checks.run.expected_failures import read
from transformer_checks.checks.run.order import all_listed, position
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.transformer.model import ModelConfig, Transformer

EXAMPLE = Path(__file__).parent.parent / "examples" / "colab.ipynb"
CONTRACT = ("contract", "causality")


class Leaking(nn.Module):
    """Every position hears the mean of all."""

    def __init__(self, vocab_size=17, n_embd=32):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocab_size, n_embd), nn.Linear(n_embd, vocab_size)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(x + x.mean(dim=1, keepdim=True))


def test_one_model_is_checked_at_its_own_sizes_and_left_as_it_was():
    model = Transformer(ModelConfig(vocab_size=19, block_size=11, n_layer=2, n_embd=32)).train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    report = check_model(model, checks=CONTRACT, seed=1)
    assert report.passed and len(report) == len(list(report)) > 5
    assert "one instance, at its own sizes" in repr(report)
    assert report.subject.sizes.vocab_size == 19 and report.subject.sizes.block_size == 11
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], x) for name, x in before.items())
    assert all(module.training for module in model.modules()), "it was given in training mode"


def test_a_report_of_a_broken_model_reads_well():
    report = check_model(Leaking, checks=CONTRACT, seed=1)
    assert not report.passed
    verdict = report["check_future_cannot_change_past"]
    assert verdict.outcome == "failed" and verdict in report.broken
    said = repr(report)
    assert "Leaking(vocab_size, n_embd)" in said and "seed 1" in said
    assert "check_causality.check_future_cannot_change_past" in said and "position" in said
    with pytest.raises(KeyError):
        report["check_of_nobody"]


def test_a_factory_builds_afresh():
    made = []

    def build_model(vocab_size, block_size):
        made.append(vocab_size)
        return Transformer(ModelConfig(vocab_size=vocab_size, block_size=block_size, n_embd=32))

    report = check_model(build_model, checks=["contract"], seed=1)
    assert report.passed and set(made) >= {17}
    assert report.subject.builds_afresh


def test_parts_are_functions_or_live_in_files(tmp_path):
    (tmp_path / "train.py").write_text("def masked(logits, targets):\n    return logits.sum()\n")

    def loss(logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    subject = check_model(Leaking, checks=["contract"], loss=loss, seed=1).subject
    assert subject.brings("loss") and not subject.brings("generate")
    subject = subject_of(Leaking, parts={"loss": f"{tmp_path / 'train.py'}:masked"})
    assert float(subject.parts.loss(torch.ones(2, 3), None)) == 6.0


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"los": print}, ("'los'", "loss, generate")),
        ({"loss": "nowhere.py:masked"}, ("no file nowhere.py",)),
        ({"loss": f"{Path(__file__)}:nothing"}, ("has no nothing", "loss")),
    ],
)
def test_a_part_that_is_not_there_is_said(parts, words):
    with pytest.raises(UsageError) as refusal:
        subject_of(Leaking, parts=parts)
    for word in words:
        assert word in str(refusal.value)


def test_a_mistake_shows_no_traceback_of_ours_in_a_cell():
    with pytest.raises(UsageError) as refusal:
        check_model("nowhere.py")
    assert refusal.value._render_traceback_() == str(refusal.value).splitlines()


def test_checks_are_chosen_by_theme_or_name():
    report = check_model(Leaking, checks="check_logits_have_shape", seed=1)
    assert [v.check for v in report] == ["check_contract.check_logits_have_shape"]
    with pytest.raises(UsageError, match="no check or theme is called 'causalty'"):
        check_model(Leaking, checks=["causalty"])


# -- while it runs, and how long


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


class Cell(io.StringIO):
    """What a notebook's kernel puts in place of standard output."""


Cell.__module__ = "ipykernel.iostream"


@pytest.mark.parametrize(("name", "stream"), [("stderr", Screen()), ("stdout", Cell())], ids=["terminal", "notebook"])
def test_the_first_finding_is_shown_as_it_is_found(monkeypatch, name, stream):
    monkeypatch.setattr(f"sys.{name}", stream)
    report = check_model(Leaking, checks=CONTRACT, seed=1)
    said = stream.getvalue()
    assert said.count("✗") == 1 and "✗ check_causality.check_future_cannot_change_past" in said
    assert f"0 of {len(report)} checks" in said and said.endswith("\r")
    assert len(report.broken) >= 1


def test_nothing_is_shown_where_nobody_watches(capsys):
    assert not check_model(Leaking, checks=CONTRACT, seed=1).passed
    said = capsys.readouterr()
    assert said.out == said.err == ""


def test_an_expected_failure_is_not_shown(monkeypatch, tmp_path):
    fails = [v.check for v in check_model(Leaking, checks=CONTRACT, seed=1).broken]
    file = listed(tmp_path, "".join(f"{name}: it is a bag of words\n" for name in fails))
    monkeypatch.setattr("sys.stderr", screen := Screen())
    check_model(Leaking, checks=CONTRACT, expected_failures=file, seed=1)
    assert "✗" not in screen.getvalue()


def test_a_budget_leaves_out_checks_and_says_so():
    report = check_model(Leaking, budget=0.5, seed=1)
    outcomes = {verdict.outcome for verdict in report}
    assert len(report) == len(all_listed()) and {"passed", "skipped"} <= outcomes
    assert re.search(r"the budget of 0.5 s left out \d+ checks; only they catch \d+ % of the known bugs", repr(report))


def test_the_report_is_in_the_order_of_the_themes_whatever_ran_first():
    report = check_model(Leaking, checks=["causality", "contract"], seed=1)
    ids = [verdict.check for verdict in report]
    assert ids == sorted(ids, key=position) and ids[0].startswith("check_contract.")


# -- weights from a file


def saved(tmp_path, wrap=lambda state: state, **sizes) -> tuple[str, nn.Module]:
    model = Transformer(ModelConfig(**{**dict(vocab_size=21, block_size=9, n_layer=3, n_embd=32), **sizes}))
    file = str(tmp_path / "weights.pt")
    torch.save(wrap(model.state_dict()), file)
    return file, model.eval()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "config": {"n_head": 4, "n_layer": 3}, "step": 7},
        lambda state: {"state_dict": {f"_orig_mod.{name}": x for name, x in state.items()}},
    ],
    ids=["plain", "with its configuration", "compiled"],
)
def test_a_checkpoint_brings_its_weights_and_its_sizes(tmp_path, wrap):
    file, model = saved(tmp_path, wrap)
    subject = subject_of("transformer_checks.transformer.model:Transformer", checkpoint=file)
    assert (subject.sizes.vocab_size, subject.sizes.block_size, subject.sizes.n_layer) == (21, 9, 3)
    tokens = subject.tokens(2, 9)
    assert torch.equal(subject.logits(subject.build(), tokens), model(tokens))
    assert not subject.builds_afresh and "with weights of" in subject.header
    assert ("n_head=4, which" in subject.header) == ("n_head" not in str(torch.load(file).get("config")))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, ("no such file",)),
        (lambda path: path.write_text("not weights"), ("cannot be read as weights", "torch.save")),
        (lambda path: torch.save({"step": 3}, path), ("holds no state_dict", "step")),
        (lambda path: torch.save({"strange": torch.ones(2)}, path), ("does not fit", "not in the model: strange")),
    ],
    ids=["missing", "no weights", "no state", "of another model"],
)
def test_a_checkpoint_that_does_not_fit_is_said(tmp_path, make, words):
    path = tmp_path / "weights.pt"
    make(path)
    with pytest.raises(UsageError) as refusal:
        subject_of("transformer_checks.transformer.model:Transformer", checkpoint=str(path))
    for word in ("--checkpoint", str(path), *words):
        assert word in str(refusal.value)


# -- expected failures

LEAK = "check_causality.check_future_cannot_change_past"
KNOWN = list(all_listed())


def listed(tmp_path, text: str) -> str:
    path = tmp_path / "expected.txt"
    path.write_text(text)
    return str(path)


def test_an_expected_failure_is_no_news(tmp_path):
    fails = [v.check for v in check_model(Leaking, checks=CONTRACT, seed=1).broken]
    file = listed(tmp_path, "# known\n\n" + "".join(f"{name}: it is a bag of words\n" for name in fails))
    report = check_model(Leaking, checks=CONTRACT, expected_failures=file, seed=1)
    assert report.passed and "it is a bag of words" in repr(report)


def test_an_expected_failure_that_passes_is_an_error(tmp_path):
    file = listed(tmp_path, "check_logits_have_shape: they never do\n")
    report = check_model(Leaking, checks=["check_logits_have_shape"], expected_failures=file, seed=1)
    assert not report.passed
    assert "was expected to fail (they never do) and passed" in repr(report)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{LEAK}\n", ("expected.txt:1", "no reason", LEAK)),
        (f"\n{LEAK}:   \n", ("expected.txt:2", "no reason")),
        ("check_of_nobody: because\n", ("expected.txt:1", "no check is called 'check_of_nobody'")),
        (f"{LEAK}: one\n{LEAK}: two\n", ("expected.txt:2", "listed twice")),
    ],
)
def test_a_list_that_is_wrong_is_said_with_its_line(tmp_path, text, words):
    with pytest.raises(UsageError) as refusal:
        read(listed(tmp_path, text), KNOWN)
    for word in words:
        assert word in str(refusal.value)


def test_a_list_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UsageError, match=r"--expected-failures .*nowhere\.txt"):
        read(str(tmp_path / "nowhere.txt"), KNOWN)


# -- the example


def test_the_example_has_three_cells_that_run(monkeypatch):
    cells = [cell for cell in json.loads(EXAMPLE.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 3
    urls = tomllib.loads((EXAMPLE.parent.parent / "pyproject.toml").read_text())["project"]["urls"]
    assert cells[0]["source"][-1] == "%pip install -q {source}"
    monkeypatch.chdir(EXAMPLE.parent)
    scope: dict = {}
    for cell in cells:
        lines = [line for line in cell["source"] if not line.startswith(("%", "!"))]
        exec(compile("".join(lines), "colab.ipynb", "exec"), scope)
    assert scope["report"].passed
    assert (EXAMPLE.parent / scope["source"] / "pyproject.toml").is_file()
    assert f"git+{urls['Source']}" in "".join(cells[0]["source"])  # no name that an index may not have


class Taught(nn.Module):
    """Returns logits and, where targets come, a loss; drops out; decodes."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(29, 32), nn.Embedding(16, 32)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(32, 29)

    def forward(self, idx, targets=None):
        T = idx.shape[1]
        x = self.tokens(idx) + self.places(torch.arange(T, device=idx.device))
        logits = self.head(self.block(x, torch.ones(T, T, dtype=torch.bool, device=idx.device).triu(1)))
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens):
        for _ in range(max_new_tokens):
            probabilities = self(idx[:, -16:])[0][:, -1].softmax(dim=-1)
            idx = torch.cat((idx, torch.multinomial(probabilities, 1)), dim=1)
        return idx


class Overflowing(Taught):
    """Fills its mask with float64's least number and casts the scores down: -inf, and NaN where all is masked."""

    def forward(self, idx, mask=None):
        T = idx.shape[1]
        x = self.tokens(idx) + self.places(torch.arange(T, device=idx.device))
        hidden = torch.ones(T, T, dtype=torch.bool, device=idx.device).triu(1)[None]
        hidden = hidden if mask is None else hidden | ~mask[:, None, :].bool()
        scores = (x @ x.mT).masked_fill(hidden, torch.finfo(x.dtype).min)
        return self.head(x + scores.float().softmax(dim=-1).to(x.dtype) @ x)


class Multiplying(Taught):
    """Multiplies float64's least number by what an integer mask leaves, in float32: NaN for real tokens."""

    def forward(self, idx, attention_mask=None):
        T = idx.shape[1]
        x = self.tokens(idx) + self.places(torch.arange(T, device=idx.device))
        hidden = torch.ones(T, T, dtype=torch.bool, device=idx.device).triu(1)
        scores = (x @ x.mT / 32).masked_fill(hidden, -1e9)
        if attention_mask is not None:
            scores = scores + (1.0 - attention_mask[:, None, :]) * torch.finfo(x.dtype).min
        return self.head(x + scores.softmax(dim=-1) @ x)


@pytest.mark.parametrize("model", [Overflowing, Multiplying])
def test_one_instance_is_judged_in_the_type_that_it_bears(model):
    """To learn that it takes a mask, the instance is put back: the probe must not go on with what it held before."""
    subject = subject_of(model(), seed=5)
    assert subject.takes_mask and precision(subject).dtype == torch.float32


def test_a_mask_that_only_float64_spoils_is_no_mistake():
    report = check_model(Multiplying(), seed=2, checks=["check_mask_of_ones_changes_nothing"])
    assert report.passed, str(report)


def test_one_model_is_as_it_was_for_every_check():
    """The parts that one check replaces, in a head or a rate, are there again for the next and at the end."""
    model = Taught()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    report = check_model(model, seed=2, checks=["contract", "loss", "generation", "devices", "training", "modes"])
    assert report.passed, str(report)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert model.block.dropout.p == 0.1
