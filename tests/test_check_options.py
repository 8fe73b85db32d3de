"""Options that change nothing are found wherever they are lost; switches, limits and dependent options are not."""

from __future__ import annotations

import pytest

from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.check_options import check_every_option_has_an_effect
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.run.verdict import Verdict, judge

MODEL = """
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Config:
    vocab_size: int = 31
    block_size: int = 16
    n_embd: int = 32
    n_layer: int = 2
{fields}

class Mixer(nn.Module):
    def __init__(self, config, window=None):
        super().__init__()
        self.config, self.window = config, window
        self.inner, self.outer = nn.Linear(config.n_embd, 64), nn.Linear(64, config.n_embd)

    def reach(self, T):
{reach}

    def forward(self, x):
        T = x.shape[1]
        past = torch.ones(T, T, dtype=x.dtype).tril()
        if self.reach(T) is not None:
            past = past.triu(1 - self.reach(T))
        x = (past / past.sum(-1, keepdim=True)) @ x
        return self.outer(self.inner(x).relu())


class Model(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)
        self.layers = nn.ModuleList(Mixer(config{passed}) for layer in range(config.n_layer))

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)
{more}
"""


def verdict(folder, fields, reach, passed="", more="") -> Verdict:
    written = MODEL.format(
        fields="\n".join(f"    {field}" for field in fields),
        reach="\n".join(f"        {line}" for line in reach),
        passed=passed,
        more=more,
    )
    (folder / "model.py").write_text(written)
    return judge(check_every_option_has_an_effect, subject_of(str(folder / "model.py"), seed=0), {})


WRONG = {
    "read by no code": (
        ["window: int = 4", "global_every: int = 2"],
        ["return self.config.window"],
        "",
        "global_every",
    ),
    "computed and dropped": (
        ["window: int = 4", "window_scale: float = 2.0"],
        ["longer = self.config.window * self.config.window_scale", "return self.config.window"],
        "",
        "window_scale",
    ),
    "stored and never used": (["window: int = 4"], ["return None"], ", config.window", "window"),
    "checked and never used": (
        ["window: int = 4"],
        ["if self.config.window < 0:", "    raise ValueError", "return None"],
        "",
        "window",
    ),
    "a window with the wrong sign, of which only 0 hides anything": (
        ["window: int = 4"],
        ["return None if self.config.window > 0 else 2"],
        "",
        "window",
    ),
    "a switch that switches nothing": (
        ["use_window: bool = True", "window: int = 4"],
        ["return self.config.window"],
        "",
        "use_window",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_option_without_effect_is_found(tmp_path, kind):
    fields, reach, passed, option = WRONG[kind]
    found = verdict(tmp_path, fields, reach, passed)
    assert found.outcome == "failed" and f"the option {option} " in found.says and found.evidence["option"] == option
    line = found.where.line
    assert option in (tmp_path / "model.py").read_text().splitlines()[line - 1]


@pytest.mark.parametrize("computed", [True, False])
def test_a_finding_says_whether_any_code_computes_with_it(tmp_path, computed):
    kind = "computed and dropped" if computed else "read by no code"
    found = verdict(tmp_path, *WRONG[kind][:3])
    assert ("computes with it" in found.says) == computed and ("no code reads it" in found.says) != computed


RIGHT = {
    "an option that acts": (["window: int = 4"], ["return self.config.window"]),
    "an option of a part that is switched off": (
        ["use_window: bool = False", "window: int = 4"],
        ["return self.config.window if self.config.use_window else None"],
    ),
    "an option beside one that hides it": (
        ["window: int = 16", "wider: int = 2"],
        ["return self.config.window + self.config.wider"],
    ),
    "an option that only a limit reads": (
        ["window: int = 4", "max_window: int = 64"],
        ["return min(self.config.window, self.config.max_window)"],
    ),
    "a memory switch": (
        ["window: int = 4", "gradient_checkpointing: bool = False"],
        ["return self.config.window if self.config.gradient_checkpointing else self.config.window"],
    ),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_options_that_act_or_need_not_are_not_accused(tmp_path, kind):
    found = verdict(tmp_path, *RIGHT[kind])
    assert found.outcome in ("passed", "not_applicable"), found.says


def test_an_option_that_other_code_computes_with_is_not_accused(tmp_path):
    found = verdict(
        tmp_path,
        ["window: int = 4", "head_scale: float = 2.0"],
        ["return self.config.window"],
        more="\n    def score(self, ids):\n        return self(ids) * self.layers[0].config.head_scale",
    )
    assert found.outcome == "passed" and found.evidence["without_effect_alone"] == ["head_scale"]


def test_an_option_that_a_file_beside_it_reads_is_not_accused(tmp_path):
    (tmp_path / "train.py").write_text("from model import Config, Model\nprint(Config().global_every)\n")
    assert verdict(tmp_path, *WRONG["read by no code"][:3]).outcome == "passed"


def test_an_option_computed_from_others_is_not_accused(tmp_path):
    fields = ["window: int = 4", "head_width: int = 2", "", "def __post_init__(self):", "    self.head_width = 8"]
    assert verdict(tmp_path, fields, ["return self.config.window + self.config.head_width"]).outcome == "passed"


def test_an_unread_option_that_need_not_be_of_the_model_is_told_as_advice(tmp_path):
    found = verdict(tmp_path, ["window: int = 4", "flavour: int = 2"], ["return self.config.window"])
    assert (
        found.outcome == "passed" and "flavour is declared at" in found.remarks[0] and "model.py:15" in found.remarks[0]
    )


def test_a_model_without_options_is_not_judged(tmp_path):
    assert verdict(tmp_path, [], ["return None"]).outcome == "not_applicable"


@pytest.mark.parametrize(
    ("bug", "option"), [("option-never-read", "norm_eps"), ("option-computed-and-dropped", "rope_base")]
)
def test_the_known_bugs_are_named(bug, option):
    found = judge(check_every_option_has_an_effect, all_bugs()[bug].subject(), {})
    assert found.outcome == "failed" and f"the option {option} " in found.says
