"""What PyTorch's functions do is recognised in every spelling, and a fault in attention is found in each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformer_checks.checks.check_parts import check_attention_weights_sum_to_one
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.run.verdict import judge
from transformer_checks.checks.watch.attention import Attentions, LaterKeys
from transformer_checks.checks.watch.operations import fused_attention, product, softmax_axis
from transformer_checks.checks.watch.products import Attended

A, B = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 5, 6)


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (torch.matmul, (A, B), {}),
        (torch.matmul, (A,), {"other": B}),
        (Tensor.matmul, (A, B), {}),
        (Tensor.__matmul__, (A, B), {}),
        (torch.bmm, (A.flatten(0, 1), B.flatten(0, 1)), {}),
        (torch.baddbmm, (torch.zeros(6, 4, 6), A.flatten(0, 1), B.flatten(0, 1)), {"beta": 0}),
        (torch.einsum, ("bhts,bhsd->bhtd", A, B), {}),
        (torch.einsum, ("bhts, bhsd -> bthd", A, B), {}),
        (torch.einsum, ("bhts,bhsd->bhtd", [A, B]), {}),
        (torch.einsum, ("bths,bshd->bthd", A.transpose(1, 2), B.transpose(1, 2)), {}),
        (torch.einsum, ("bhst,bhsd->bhtd", A.transpose(2, 3), B), {}),
        (torch.einsum, ("...ts,...sd->...td", A, B), {}),
        (torch.einsum, ("b...ts,b...sd->b...td", [A, B]), {}),
    ],
)
def test_a_product_is_the_same_matrices_in_every_spelling(func, args, kwargs):
    found = product(func, args, kwargs)
    got = (found.left @ found.right).reshape(2, 3, 4, 6)
    assert torch.allclose(got, A @ B, atol=1e-6)


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (torch.add, (A, A)),
        (torch.einsum, ("bhts->bhst", A)),
        (torch.einsum, ("bhts,bhts->bht", A, A)),
        (torch.einsum, ("bhts,hsd->bhtd", A, B[0])),
        (torch.einsum, ("...ts,...ts->...t", A, A)),
        (torch.matmul, (A, torch.randn(5))),
    ],
)
def test_other_calls_are_no_product_of_activations(func, args):
    assert product(func, args, {}) is None


def test_fused_attention_is_read_by_place_and_by_name():
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    mask = torch.ones(4, 4, dtype=torch.bool)
    for args, kwargs in (((q, k, v, mask), {}), ((q,), {"key": k, "value": v, "attn_mask": mask})):
        given = fused_attention(F.scaled_dot_product_attention, args, kwargs)
        assert given.key is k and given.mask is mask and not given.causal
    for watcher in (Attentions(4), LaterKeys(4), Attended(nn.Identity(), 4)):
        with watcher:
            F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True)


@pytest.mark.parametrize(
    ("call", "axis"),
    [
        (lambda x: x.softmax(-1), -1),
        (lambda x: x.softmax(dim=3), -1),
        (lambda x: torch.softmax(input=x, dim=2), -2),
        (lambda x: F.softmax(x, dim=-1), -1),
        (lambda x: nn.Softmax(dim=1)(x), -3),
        (lambda x: x.exp(), None),
    ],
)
def test_the_axis_of_a_softmax_is_counted_from_the_end(call, axis):
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(softmax_axis(func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Watch():
        call(A)
    assert [found for found in seen if found is not None] == ([] if axis is None else [axis])


MODEL = """
import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, 4, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        weights = weights{damage}
        y = {product}
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class GPT(nn.Module):
    def __init__(self, vocab_size=31, block_size=16, n_embd=32, n_layer=2):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(Attention(n_embd) for _ in range(n_layer))
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, idx):
        x = self.tokens(idx) + self.places(torch.arange(idx.shape[1]))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)
"""
FLAT = "(weights.flatten(0, 1), v.flatten(0, 1)"
SPELLINGS = [
    "weights @ v",
    "torch.matmul(weights, v)",
    "weights.matmul(other=v)",
    f"torch.bmm{FLAT}).view(B, 4, T, -1)",
    f"torch.baddbmm(torch.zeros(()),{FLAT[1:]}, beta=0).view(B, 4, T, -1)",
    "torch.einsum('bhts,bhsd->bhtd', weights, v)",
    "torch.einsum('bhts,bshd->bthd', weights, v.transpose(1, 2)).transpose(1, 2)",
    "torch.einsum('bths,bhsd->bthd', weights.transpose(1, 2), v).transpose(1, 2)",
]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("damage", ["", " * 0.7"])
def test_shrunk_attention_weights_are_found_in_every_spelling(tmp_path, spelling, damage):
    (tmp_path / "model.py").write_text(MODEL.format(damage=damage, product=spelling))
    found = judge(check_attention_weights_sum_to_one, subject_of(str(tmp_path / "model.py"), seed=0), {})
    assert found.outcome == ("failed" if damage else "passed"), found.says
    assert not damage or ("multiplied by 0.7" in found.says and found.where.line == 17)
