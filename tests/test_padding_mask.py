"""Which form of padding mask a model is found to take."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transformer_checks.checks.meet.padding_mask import find_mask_forms

V = 17


def tokens() -> Tensor:
    return torch.randint(V, (3, 7), generator=torch.Generator().manual_seed(6))


def attention(*, rounding: float = 0.0, combines: bool = True):
    """One layer of uniform attention: a [B, T] mask is combined with its causal mask, a [B, 1, 1, T] one replaces it.

    Where a [B, T] mask drops something, every token of the batch moves every logit by `rounding` of its size.
    """
    table = nn.Embedding(V, V)
    with torch.no_grad():
        table.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))

    def read(ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        T = ids.shape[1]
        seen = torch.ones(T, T, dtype=torch.bool).tril()
        if attention_mask is not None and attention_mask.dim() == 2 and combines:
            seen = seen & attention_mask[:, None].bool()
        elif attention_mask is not None:
            if attention_mask.dim() != 4 or (combines and attention_mask.shape[2] != 1):
                raise ValueError("this shape is not taken")
            seen = attention_mask[:, 0].bool().expand(-1, T, T)
        weights = seen.float() / seen.sum(-1, keepdim=True).clamp(min=1)
        logits = 20 * table(ids) + 0.1 * weights @ table(ids)
        drops = attention_mask is not None and attention_mask.dim() == 2 and not bool(attention_mask.all())
        return logits * (1 + rounding * torch.sin(ids.sum().float())) if drops else logits

    return read


def test_rounding_that_depends_on_masked_tokens_is_no_reason_to_doubt_the_usual_form():
    found = find_mask_forms("attention_mask", attention(rounding=5e-7), tokens(), V)
    assert found[0].shape == "[B, T]" and found[0].keep


def test_a_mask_of_rows_is_taken_before_one_that_replaces_the_causal_mask():
    found = find_mask_forms("attention_mask", attention(rounding=1e-4), tokens(), V)
    assert {form.shape for form in found} == {"[B, T]"}  # nothing is obeyed to the digit


def test_a_mask_that_can_only_replace_the_causal_one_is_handed_with_it():
    found = find_mask_forms("attention_mask", attention(combines=False), tokens(), V)
    assert found[0].shape == "[B, 1, T, T]" and found[0].with_causal


def test_a_mask_that_is_ignored_is_still_found_so_that_a_check_reports_it():
    read = attention()
    found = find_mask_forms("attention_mask", lambda ids, attention_mask=None: read(ids), tokens(), V)
    assert found[0].shape == "[B, T]"
