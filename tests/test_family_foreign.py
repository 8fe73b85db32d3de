"""Known bugs planted in a library's models: each fails, is named, and its part is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers.models.gpt2.modeling_gpt2 as gpt2
import transformers.models.llama.modeling_llama as llama
from torch.nn import functional as F

from tests.test_family_weights import hf_gpt2, hf_llama
from transformer_checks.checks.check_spec import (
    check_attention_scale_is_usual,
    check_gradients_agree,
    check_logits_agree,
    check_tiny_activations_agree,
)
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.run.verdict import judge
from transformer_checks.transformer import model as ours

Patch = Callable[[pytest.MonkeyPatch], None]


def after_init(kind: type, change: Callable[[Any], None]) -> Patch:
    """Changes every module of the class after it is built."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        made = kind.__init__

        def init(self, *args, **kwargs):
            made(self, *args, **kwargs)
            change(self)

        monkeypatch.setattr(kind, "__init__", init)

    return patch


def instead(owner: Any, name: str, function: Callable) -> Patch:
    return lambda monkeypatch: monkeypatch.setattr(owner, name, function)


def unscaled(attention):
    attention.scaling, attention.scale_attn_weights = 1.0, False


def rms_over_the_sum(self, x):
    return self.weight * x * torch.rsqrt(x.square().sum(-1, keepdim=True) + self.variance_epsilon)


def only_queries_turned(q, k, cos, sin, *args, turn=llama.apply_rotary_pos_emb, **kwargs):
    return turn(q, k, cos, sin)[0], k


GROUPED = hf_llama(2, attn_implementation="eager")
# The library's model, the known bug, how to plant it, the part that the finding names.
PLANTED: list[tuple[Callable, str, Patch, str]] = [
    (hf_gpt2, "relu-for-gelu", after_init(gpt2.GPT2MLP, lambda m: setattr(m.act, "forward", F.relu)), "activation"),
    (hf_gpt2, "mlp-no-activation",
     after_init(gpt2.GPT2MLP, lambda m: setattr(m.act, "forward", lambda x: x)), "feed-forward"),
    (hf_gpt2, "scale-missing", after_init(gpt2.GPT2Attention, unscaled), "attention"),
    (hf_gpt2, "final-norm-missing",
     after_init(gpt2.GPT2Model, lambda m: setattr(m.ln_f, "forward", lambda x: x)), "final norm"),
    (GROUPED, "scale-by-d-model", after_init(
        llama.LlamaAttention, lambda m: setattr(m, "scaling", m.config.hidden_size**-0.5)), "attention scores"),
    (GROUPED, "rms-sum-not-mean", instead(llama.LlamaRMSNorm, "forward", rms_over_the_sum), "norm before attention"),
    (GROUPED, "gate-added", instead(
        llama.LlamaMLP, "forward", lambda m, x: m.down_proj(F.silu(m.gate_proj(x)) + m.up_proj(x))), "feed-forward"),
    (GROUPED, "rope-only-on-q", instead(llama, "apply_rotary_pos_emb", only_queries_turned), "attention scores"),
]  # fmt: skip


@pytest.mark.parametrize("build, bug, patch, part", PLANTED, ids=[bug for _, bug, *_ in PLANTED])
def test_a_bug_planted_in_a_library_is_named(build, bug, patch, part, monkeypatch):
    # Must not depend on how busy the machine is.
    monkeypatch.setattr("transformer_checks.checks.check_spec.SIMULATION_SECONDS", 60.0)
    patch(monkeypatch)
    subject = subject_of(build, seed=3, spec="gpt2" if build is hf_gpt2 else "llama")
    verdict = judge(check_logits_agree, subject, {})
    assert verdict.outcome == "failed", verdict.says
    assert bug in verdict.likely, verdict.says
    assert part in verdict.evidence["first_part_that_differs"]


def test_an_unknown_bug_is_given_no_name(monkeypatch):
    after_init(gpt2.GPT2MLP, lambda m: setattr(m.act, "forward", F.softplus))(monkeypatch)
    subject = subject_of(hf_gpt2, seed=3, spec="gpt2")
    verdict = judge(check_logits_agree, subject, {})
    assert verdict.outcome == "failed"
    assert verdict.likely == ()
    assert "activation" in verdict.evidence["first_part_that_differs"]


def test_one_instance_is_compared_with_its_own_weights_whatever_ran_in_between():
    """Checks run in any order, and every one of them changes the one instance."""
    torch.manual_seed(0)
    model = ours.Transformer(ours.gpt2(vocab_size=23, block_size=16, n_layer=2, n_head=4, n_embd=32))
    subject = subject_of(model, seed=0)
    checks = check_logits_agree, check_tiny_activations_agree, check_attention_scale_is_usual, check_gradients_agree
    want = [judge(check, subject, {}).outcome for check in checks]
    for check, outcome in zip(checks, want, strict=True):
        subject.amplified(dtype=torch.float32)
        subject.leave()
        assert judge(check, subject, {}).outcome == outcome
    assert want[2] == "passed"
