"""Which crashes inside a check are held against the model, and which come from what the check chose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from transformer_checks.checks.bugs.designs import changed
from transformer_checks.checks.run.crashes import explained
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.run.verdict import Verdict, judge
from transformer_checks.checks.subject import Subject
from transformer_checks.transformer.model import Transformer

CONVENTIONS = Path(__file__).parent / "conventions"


def raising(error, when):
    """The reference, which raises the error in forward `when(model, mask, positions)`."""

    def change(model: Transformer) -> None:
        forward = model.forward

        def read(tokens, mask=None, cache=None, positions=None):
            if when(model, mask, positions):
                raise error
            return forward(tokens, mask, cache)

        model.forward = read

    return Subject("raises", changed(change))


def with_dropout(subject: Subject) -> None:
    """Rule."""
    model = subject.build(dropout=0.3).train()
    model(subject.tokens(2, 5))


def with_a_mask(subject: Subject) -> None:
    """Rule."""
    tokens = subject.tokens(2, 5)
    subject.logits(subject.build(), tokens, torch.ones_like(tokens, dtype=torch.bool))


def with_positions(subject: Subject) -> None:
    """Rule."""
    tokens = subject.tokens(2, 5)
    subject.logits(subject.build(), tokens, positions=torch.arange(5).expand_as(tokens))


def dropout_set(model, mask, positions):
    return model.training and model.config.dropout > 0


def training(model, mask, positions):
    return model.training


def masked(model, mask, positions):
    return mask is not None


def placed(model, mask, positions):
    return positions is not None


def verdict(check, error, when) -> Verdict:
    return judge(check, raising(error, when), {})


def test_a_refusal_that_names_an_option_of_our_choice_is_not_the_models_fault():
    found = verdict(with_dropout, ValueError("attention_dropout > 0 is not supported"), dropout_set)
    assert found.outcome == "not_applicable"
    assert "refuses dropout=0.3" in found.says and "is not supported" in found.says


def test_a_refusal_that_names_an_argument_of_our_choice_is_not_the_models_fault():
    found = verdict(with_positions, ValueError("positions must be one row"), placed)
    assert found.outcome == "not_applicable" and "refuses positions" in found.says


@pytest.mark.parametrize(
    ("check", "error", "when"),
    [
        (with_dropout, RuntimeError("The size of tensor a must match, dropout or not"), dropout_set),  # no refusal
        (with_dropout, ValueError("not supported"), dropout_set),  # names nothing
        (with_dropout, ValueError("dropout is not supported"), training),  # nor does it train without
        (with_a_mask, ValueError("mask is not supported"), masked),  # though forward declares it
        (with_positions, IndexError("positions out of range"), placed),
    ],
)
def test_any_other_crash_is_the_models_own(check, error, when):
    found = verdict(check, error, when)
    assert found.outcome == "error" and str(error) in found.says


def with_targets(subject: Subject) -> None:
    """Rule."""
    tokens = subject.tokens(2, 5)
    subject.build()(tokens, labels=tokens)


def test_a_call_without_what_the_model_always_needs_is_ours():
    subject = subject_of(str(CONVENTIONS / "cache_of_some_layers.py"))
    found = judge(with_targets, subject, {})
    assert found.outcome == "not_applicable" and "called without use_cache, with which it works" in found.says


def test_targets_that_the_model_cannot_take_are_a_fault(tmp_path):
    source = (CONVENTIONS / "cache_of_some_layers.py").read_text()
    (tmp_path / "model.py").write_text(source.replace("logits[:, :-1].flatten(0, 1)", "logits[:, :-2].flatten(0, 1)"))
    found = judge(with_targets, subject_of(str(tmp_path / "model.py")), {})
    assert found.outcome == "error"


def test_a_crash_outside_the_model_is_not_explained():
    assert explained(RuntimeError("never raised"), raising(ValueError(), masked)) == ""
