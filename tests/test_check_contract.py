"""What the contract checks report: shapes, lengths, ids, state between calls, parts without effect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.messages import BUGS, Told, expect_told
from transformer_checks.checks.bugs.designs import changed
from transformer_checks.checks.check_contract import (
    check_earlier_calls_leave_no_trace,
    check_every_block_matters,
    check_every_head_matters,
)
from transformer_checks.checks.probes.ablation import head_projections, passed_by
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.run.verdict import judge
from transformer_checks.checks.subject import Subject
from transformer_checks.transformer.model import Transformer

FOUND: dict[str, Told] = {
    "logits-time-first": ("logits_have_shape", None, ("[13, 3, 17]", "[3, 13, 17]"), "logits-time-first"),
    "length-one-squeezed": ("every_length_is_read", None, ("2 rows of 1 tokens", "[2, 17]"), "length-one-squeezed"),
    "block-size-off-by-one": (
        "every_length_is_read",
        None,
        ("a sequence of 13 tokens", "block size is 13"),
        "block-size-off-by-one",
    ),
    "mask-positive-inf": (
        "logits_are_finite",
        "blocks.0.attention",
        ("position 0 is nan", "3757 of 3757"),
        "mask-positive-inf",
    ),
    "state-leaks-between-calls": (
        "earlier_calls_leave_no_trace",
        "Remembers",
        ("after the same call",),
        "state-leaks-between-calls",
    ),
    "mask-kept-from-the-first-call": (
        "earlier_calls_leave_no_trace",
        "blocks.0.attention",
        ("after a call with a mask",),
        "mask-kept-from-the-first-call",
    ),
    "decoding-state-left-behind": (
        "earlier_calls_leave_no_trace",
        "Decodes",
        ("after a single token",),
        "decoding-state-left-behind",
    ),
    "backward-leaves-a-mark": (
        "earlier_calls_leave_no_trace",
        "Marked",
        ("after a backward pass in train mode",),
        "backward-leaves-a-mark",
    ),
    "tokens-changed-in-place": (
        "inputs_are_left_alone",
        None,
        ("caller's own tokens", "was 1 and is now 0"),
        "tokens-changed-in-place",
    ),
    "position-ids-mutated-in-place": (
        "inputs_are_left_alone",
        None,
        ("caller's own position_ids", "row 0, position 0 was 0 and is now 1"),
        "position-ids-mutated-in-place",
    ),
    "targets-changed-in-place": (
        "inputs_are_left_alone",
        None,
        ("caller's own targets", "is now -100"),
        "targets-changed-in-place",
    ),
    "mask-changed-in-place": (
        "inputs_are_left_alone",
        None,
        ("caller's own mask", "was False and is now True"),
        "mask-changed-in-place",
    ),
    "scale-stays-after-a-long-text": (
        "earlier_calls_leave_no_trace",
        "blocks.0.attention",
        ("after a text of 131 tokens, one of 6",),
        "scale-stays-after-a-long-text",
    ),
    "too-long-cut-silently": (
        "too_long_a_sequence_is_no_silent_error",
        None,
        ("15 tokens", "[2, 13, 17]"),
        "too-long-cut-silently",
    ),
    "token-ids-wrapped": ("unknown_token_ids_are_refused", None, ("token id 17", "0 to 16"), "token-ids-wrapped"),
    "parameter-outside-module": (
        "every_tensor_is_registered",
        None,
        ("head.layer", "no optimizer sees"),
        "parameter-outside-module",
    ),
    "buffer-not-registered": (
        "every_tensor_is_registered",
        None,
        ("positions.scale", "leaves it behind"),
        "buffer-not-registered",
    ),
    "init-reruns-after-load": (
        "state_dict_restores_the_model",
        "embedding",
        ("not in its state_dict",),
        "init-reruns-after-load",
    ),
    "copy-calls-the-original": ("copies_are_independent", None, ("a deep copy",), "copy-calls-the-original"),
    "tied-weights-broken": (
        "ties_survive",
        None,
        ("embedding.weight and head.weight", "config.tied"),
        "tied-weights-broken",
    ),
    "tie-lost-by-wrapping": ("ties_survive", None, ("after .double() they are two",), "tie-lost-by-wrapping"),
    "block-output-discarded": (
        "every_block_matters",
        "blocks.1",
        ("leaving out blocks.1", "by 0 standard deviations"),
        "block-output-discarded",
    ),
    "block-never-runs": (
        "every_block_matters",
        "blocks.1",
        ("blocks.1 never runs, although blocks.0 does",),
        "block-never-runs",
    ),
    "last-head-dropped": (
        "every_head_matters",
        "blocks.0.attention.output",
        ("head 3 of 4 silenced",),
        "last-head-dropped",
    ),
    "gqa-heads-collapse-to-one": (
        "nothing_projected_is_thrown_away",
        "blocks.0.attention.qkv",
        ("outputs 40 to 47 of 64",),
        "gqa-heads-collapse-to-one",
    ),
}


@pytest.mark.parametrize("bug", FOUND)
def test_a_mistake_is_told_by_its_place_and_its_cause(bug):
    expect_told("contract", bug, FOUND[bug])


def test_statistics_kept_in_training_are_no_memory():
    """Training may update a running mean in a registered buffer (a router's balance, say); evaluation only reads it."""

    def change(model):
        class Centred(Transformer):
            def embed(self, tokens):
                x = super().embed(tokens)
                y = x - self.mean
                if self.training:
                    self.mean.lerp_(x.detach().mean(dim=(0, 1)), 0.1)
                return y

        model.register_buffer("mean", torch.zeros(model.config.n_embd))
        model.__class__ = Centred

    subject = Subject("centred", changed(change), seed=2)
    found = judge(check_earlier_calls_leave_no_trace, subject, {})
    assert found.outcome == "passed", found.says


def test_one_mistake_is_one_finding():
    """A model that keeps state between calls fails one check: the check of repetition is blocked by it."""
    from transformer_checks.checks.check_modes import check_eval_repeats_itself

    subject = BUGS["state-leaks-between-calls"].subject(seed=3)
    memory = judge(check_earlier_calls_leave_no_trace, subject, {})
    assert judge(check_eval_repeats_itself, subject, {memory.check: memory}).outcome == "blocked"


def test_attention_called_by_keyword_is_silenced_head_by_head():
    subject = subject_of(str(Path(__file__).parent / "conventions" / "annotated_dictionary.py"), seed=3)
    found = judge(check_every_head_matters, subject, {})
    assert found.outcome == "passed", found.says
    assert any("attention" in name for name in head_projections(subject, subject.build(), subject.sizes.n_head))


def test_a_block_that_hands_on_what_it_was_given_is_passed_by_in_what_is_new():
    first, newest = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    streams, latest = passed_by(lambda streams, latest: (streams, latest + 1))([first, newest], newest)
    assert torch.equal(streams[0], first) and torch.equal(streams[1], newest)
    assert torch.equal(latest, first), "only its own output is replaced by its input, not what it hands on"


def test_a_block_is_passed_by_in_its_output_and_not_in_the_cache_beside_it():
    x, cache = torch.zeros(2, 3, 4), torch.ones(2, 5, 4)
    kept, output = passed_by(lambda x: (cache, x + 1))(x)
    assert torch.equal(kept, cache) and torch.equal(output, x)


def test_blocks_that_return_dataclasses_matter(tmp_path):
    """And one whose result is dropped is still found."""
    text = (Path(__file__).parent / "conventions" / "blocks_of_dataclasses.py").read_text()
    used = "            x = step.output\n"
    assert used in text
    for name, source, outcome in (
        ("used", text, "passed"),
        ("dropped", text.replace(used, "            x = step.output if i else x\n"), "failed"),
    ):
        (tmp_path / f"{name}.py").write_text(source)
        found = judge(check_every_block_matters, subject_of(str(tmp_path / f"{name}.py"), seed=3), {})
        assert found.outcome == outcome, found.says
        assert outcome == "passed" or "leaving out blocks.0" in found.says
