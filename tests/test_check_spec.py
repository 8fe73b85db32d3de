"""Agreement with a declared architecture: a difference is reported with its part, its line and its known bug."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests import variants_of_attention  # noqa: F401  (adds its controls)
from tests.controls import CONTROLS
from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.bugs.damage import LLAMA, norms, redefine
from transformer_checks.checks.check_spec import check_logits_agree
from transformer_checks.checks.family.trace import alike, steps
from transformer_checks.checks.reference import reference_parts
from transformer_checks.checks.run.verdict import Verdict, judge
from transformer_checks.checks.subject import Spec, Subject


def verdict(subject: Subject, spec: str = "auto", check: Any = check_logits_agree) -> Verdict:
    subject.spec = Spec(spec)
    return judge(check, subject, {})


# What the finding must name: the first part that differs, and the module of its line.
NAMED = {
    "scale-by-d-model": ("attention scores, mask or softmax of block 0", "blocks.0.attention"),
    "scale-missing": ("attention scores, mask or softmax of block 0", "blocks.0.attention"),
    "gelu-variant": ("activation of block 0", "blocks.0.feed_forward"),
    "relu-for-gelu": ("activation of block 0", "blocks.0.feed_forward"),
    "gelu-for-silu": ("feed-forward output of block 0", "blocks.0.feed_forward"),
    "final-norm-missing": ("final norm", "forward"),
    "post-norm-for-pre-norm": ("norm before attention of block 0", "blocks.0.attention"),
    "residual-from-normed-input": ("residual stream of block 0", "blocks.0"),
    "rope-base-of-its-own": ("rotated queries of block 0", "positions"),
    "rope-pairing-mismatch": ("rotated queries of block 0", "positions"),
    "rope-opposite-signs": ("rotated keys of block 0", "positions"),
    "rope-missing": ("attention scores, mask or softmax of block 0", "blocks.0.attention"),
    "norm-wrong-eps": ("norm before attention of block 0", "blocks.0"),
    "gqa-k-v-grouping-mismatch": ("attention scores, mask or softmax of block 0", "blocks.0.attention"),
    "values-are-keys": ("attention scores, mask or softmax of block 0", "blocks.0.attention"),
    "position-multiplied": ("embedded tokens and positions", "positions"),
    "logits-scaled": ("logits", "forward"),
}


@pytest.mark.parametrize("id", NAMED)
def test_a_known_bug_is_named_with_its_part_and_line(id):
    bug = all_bugs()[id]
    family = bug.sizes.get("spec", "llama")
    parts = bug.of(**{**(LLAMA if family == "llama" else {}), **bug.sizes})
    bug.damage(parts)
    found = verdict(Subject(id, parts, seed=3), family)
    part, module = NAMED[id]
    assert found.outcome == "failed"
    assert id in found.likely and bug.says in found.says
    assert found.evidence["first_part_that_differs"] == part
    assert found.where is not None and found.where.module == module and found.where.line > 0


@pytest.mark.parametrize(
    "name, spec",
    [("gpt2", "gpt2"), ("llama", "llama"), ("llama-grouped-tied-biased", "llama"), ("reference-gpt2-explicit", "gpt2"),
     ("rotary-interleaved", "llama"), ("grouped-and-tiled", "llama"), ("one-key-value-head", "llama"),
     ("rotary-positions-plus-one", "llama"), ("gate-and-value-swapped", "llama"), ("log-probabilities", "gpt2")],
)  # fmt: skip
def test_what_the_family_leaves_open_agrees(name, spec):
    found = verdict(CONTROLS[name](seed=1), spec)
    assert found.outcome == "passed", found.says
    assert found.evidence["family"] == spec and found.evidence["error"] <= 1e-9


@pytest.mark.parametrize("name, spec, what", [("gpt2", "llama", "no gate"), ("llama", "gpt2", "has a gate")])
def test_another_family_is_reported(name, spec, what):
    found = verdict(CONTROLS[name](seed=0), spec)
    assert found.outcome == "failed" and what in found.says


@pytest.mark.parametrize("name, family", [("gpt2", "GPT-2"), ("llama", "Llama"), ("qwen2", "Llama")])
def test_without_a_declaration_the_family_is_reported(name, family):
    found = verdict(CONTROLS[name](seed=0))
    assert found.outcome == "passed" and any(family in remark for remark in found.remarks)


@pytest.mark.parametrize("id", ["scale-by-d-model", "final-norm-missing", "gelu-for-silu"])
def test_without_a_declaration_a_bug_is_advice(id):
    parts = all_bugs()[id].subject(seed=0)
    parts.parts.declares = {}
    found = verdict(parts)
    assert found.outcome == "passed" and any(f"`{id}`" in remark for remark in found.remarks)


@pytest.mark.parametrize("name", ["alibi", "x-t5-bias", "bloom", "parallel-blocks", "shared-layers", "query-key-norm"])
def test_without_a_declaration_another_family_is_not_accused(name):
    found = verdict(CONTROLS[name](seed=0))
    assert found.outcome in ("passed", "not_applicable") and found.likely == ()


def test_a_bug_that_modifies_its_tokens_does_not_affect_the_next_ones():
    """Simulation runs all known bugs on the same tokens."""
    found = verdict(all_bugs()["last-block-skipped"].subject(seed=0), "gpt2")
    assert "last-block-skipped" in found.likely


def test_two_bugs_in_different_parts_are_separated():
    subject = all_bugs()["scale-by-d-model"].subject(seed=0)
    all_bugs()["relu-for-gelu"].damage(subject.parts)
    found = verdict(subject, "gpt2")
    assert set(found.likely) == {"scale-by-d-model", "relu-for-gelu"}
    assert len(found.evidence["stages"]) == 2


def test_ties_are_reported_as_ties():
    """No rotation, and the same rotation for every token, give the same logits."""
    found = verdict(all_bugs()["rope-missing"].subject(seed=0), "llama")
    assert {"rope-missing", "rope-on-the-wrong-axis"} <= set(found.likely)
    assert "with the same logits" in found.says


def test_a_difference_that_no_known_bug_explains_is_reported():
    subject = all_bugs()["scale-by-d-model"].subject(seed=0)
    build = subject.parts.build_model

    def odd(**sizes):
        model = build(**sizes)
        for block in model.blocks:
            block.attention.__class__ = type("Odd", (type(block.attention),), {"scale": lambda self: 0.123})
        return model

    subject.parts.build_model = odd
    found = verdict(subject, "gpt2")
    assert found.outcome == "failed" and found.likely == () and "no known bug" in found.says
    assert found.evidence["first_part_that_differs"] == "attention scores, mask or softmax of block 0"


def test_the_part_named_is_that_of_the_right_variant(monkeypatch):
    """No bug is tried: the layout of RoPE is found by how long the forward passes agree."""
    monkeypatch.setattr("transformer_checks.checks.check_spec.SIMULATION_SECONDS", 0.0)
    bug = all_bugs()["scale-by-d-model"]
    parts = bug.of(**{**LLAMA, "positions": "rotary-interleaved"})
    bug.damage(parts)
    found = verdict(Subject("interleaved", parts), "llama")
    assert found.evidence["first_part_that_differs"] == "attention scores, mask or softmax of block 0"
    assert found.evidence["variant"][0].startswith("interleaved RoPE")


def test_the_part_named_is_that_of_the_right_gelu():
    """A residual update of another size is no known bug: the exact GELU before it must not be blamed."""
    parts = reference_parts()
    build = parts.build_model

    def half_again(**sizes):
        model = build(**sizes)
        for block in model.blocks:
            redefine(block.feed_forward, activation=lambda self, x: F.gelu(x),
                     forward=lambda self, x: 1.5 * self.output(self.activation(self.input(x))))  # fmt: skip
        return model

    parts.build_model = half_again
    found = verdict(Subject("exact", parts, seed=0), "gpt2")
    assert found.outcome == "failed" and found.likely == ()
    assert found.evidence["variant"][0] == "exact GELU"
    assert found.evidence["first_part_that_differs"] == "residual stream of block 0"


def test_a_bug_of_one_norm_is_recognized_in_all_norms():
    parts = reference_parts()
    all_bugs()["norm-over-sequence"].damage(parts)
    build = parts.build_model

    def everywhere(**sizes):
        model = build(**sizes)
        kind = type(model.blocks[0].feed_forward_norm)
        for norm in norms(model):
            norm.__class__ = kind
        return model

    parts.build_model = everywhere
    found = verdict(Subject("over time", parts, seed=0), "gpt2")
    assert found.likely == ("norm-over-sequence",) and "here in every norm" in found.says


def test_what_only_agrees_without_gradients_is_not_named(monkeypatch):
    """With its own entry removed, a bug that gives the same logits only without gradients must not be named instead."""
    known = {id: bug for id, bug in all_bugs().items() if id != "scale-missing"}
    assert "other-scale-without-gradients" in known
    subject = all_bugs()["scale-missing"].subject(seed=0)
    monkeypatch.setattr("transformer_checks.checks.family.known_bugs.all_bugs", lambda: known)
    assert verdict(subject, "gpt2").likely == ()


def test_pieces_of_a_sequence_are_joined():
    """A model may read its tokens one at a time."""
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5), nn.Tanh()).double()
    tokens = torch.arange(8).reshape(2, 4) % 7
    whole = steps(model, lambda: model(tokens), tokens.numel())
    pieces = steps(model, lambda: [model(tokens[:, t : t + 1]) for t in range(4)], tokens.numel())
    assert [step.function for step in whole] == [step.function for step in pieces] == ["embedding", "linear", "tanh"]
    assert all(alike(one.sums, other.sums) for one, other in zip(pieces, whole, strict=True))
