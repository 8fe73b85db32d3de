"""Mistakes inside attention: axes, softmax, heads, and what becomes of its output."""

from __future__ import annotations

import torch
from torch import Tensor

from ...transformer.model import Attention, ExplicitAttention, Transformer, causal_mask
from . import bug
from .masking import CAUSAL, ROWS, attend_with

PREFIX = "check_causality.check_prefix_gives_the_same_logits"
THROWN_AWAY = "check_contract.check_nothing_projected_is_thrown_away"
HEADS = "check_contract.check_every_head_matters"
REACH = "check_gradients.check_every_parameter_gets_a_gradient"
SLOPES = "check_gradients.check_gradients_equal_finite_differences"
AVERAGE = "check_modes.check_dropout_keeps_the_average"


# -- softmax


@bug(
    "softmax-over-queries",
    "the softmax runs over queries, not over keys: later queries are in the denominator of earlier ones",
    source="https://github.com/labmlai/annotated_deep_learning_paper_implementations/issues/146 ; "
    "https://github.com/nerdai/llms-from-scratch-rs/pull/30",
    caught_by=(CAUSAL,),
    model=True,
    attention="explicit",
)
def softmax_over_queries(model: Transformer) -> None:
    class Columns(ExplicitAttention):
        def weights(self, scores: Tensor) -> Tensor:
            return scores.softmax(dim=-2)

    attend_with(model, Columns)


@bug(
    "softmax-over-heads",
    "the softmax runs over heads: where every head is masked they share the future evenly",
    source="https://github.com/FudanNLP/fastNLP/issues/254",
    caught_by=(CAUSAL,),
    model=True,
    attention="explicit",
)
def softmax_over_heads(model: Transformer) -> None:
    class Heads(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            return scores.masked_fill(~visible, torch.finfo(scores.dtype).min)

        def weights(self, scores: Tensor) -> Tensor:
            return scores.softmax(dim=1)

    attend_with(model, Heads)


# -- axes


@bug(
    "heads-view-without-transpose",
    "[B, T, C] is viewed as [B, H, T, D] without a transpose: tokens are mixed over time",
    source="https://github.com/reczoo/FuxiCTR/issues/30 ; "
    "https://github.com/649453932/Chinese-Text-Classification-Pytorch/issues/53",
    caught_by=(CAUSAL, PREFIX),
    model=True,
)
def heads_viewed(model: Transformer) -> None:
    class Viewed(Attention):
        def split_heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
            B, T, _ = qkv.shape
            sizes = [n * self.head_width for n in (self.n_head, self.n_kv_head, self.n_kv_head)]
            return tuple(x.reshape(B, -1, T, self.head_width) for x in qkv.split(sizes, dim=-1))

    attend_with(model, Viewed)


@bug(
    "merge-heads-without-transpose",
    "[B, H, T, D] is viewed as [B, T, C] without a transpose: a position gets heads of other positions",
    source="https://github.com/jsbaan/transformer-from-scratch/pull/6 ; "
    "https://github.com/ajhalthor/Transformer-Neural-Network/pull/4",
    caught_by=(CAUSAL, PREFIX),
    model=True,
)
def heads_merged(model: Transformer) -> None:
    class Merged(Attention):
        def merge_heads(self, x: Tensor) -> Tensor:
            B, _, T, _ = x.shape
            return x.reshape(B, T, -1)

    attend_with(model, Merged)


@bug(
    "head-batch-axes-confused",
    "heads and rows folded as (H·B) are unfolded as (B·H): rows talk to each other",
    source="https://github.com/gazelle93/Transformer-Various-Positional-Encoding/issues/1",
    caught_by=(ROWS,),
    model=True,
)
def axes_confused(model: Transformer) -> None:
    class Confused(Attention):
        def merge_heads(self, x: Tensor) -> Tensor:
            B, H, T, D = x.shape
            return super().merge_heads(x.transpose(0, 1).reshape(B, H, T, D))

    attend_with(model, Confused)


# -- groups of heads


@bug(
    "gqa-repeat-on-sequence-dim",
    "key-value heads are repeated along time: each key stands there twice and the later ones are gone",
    source="https://github.com/PrimeIntellect-ai/prime-rl/pull/2681",
    caught_by=(CAUSAL,),
    model=True,
    n_kv_head=2,
)
def repeated_in_time(model: Transformer) -> None:
    class Repeated(Attention):
        def share(self, x: Tensor) -> Tensor:
            B, G, T, D = x.shape
            return x.repeat_interleave(self.n_head // G, dim=2).reshape(B, self.n_head, T, D)

    attend_with(model, Repeated)


@bug(
    "gqa-heads-collapse-to-one",
    "every query head reads the first key-value head: the others are computed and thrown away",
    source="https://github.com/PSAL-POSTECH/ONNXim/pull/34",
    caught_by=(THROWN_AWAY,),
    model=True,
    n_kv_head=2,
)
def heads_collapse(model: Transformer) -> None:
    class First(Attention):
        def share(self, x: Tensor) -> Tensor:
            return x[:, :1].expand(-1, self.n_head, -1, -1)

    attend_with(model, First)


@bug("last-head-dropped", "the last head's output is overwritten with zeros before the projection",
     caught_by=(HEADS,), model=True)  # fmt: skip
def last_head_dropped(model: Transformer) -> None:
    class Drops(Attention):
        def merge_heads(self, x: Tensor) -> Tensor:
            return super().merge_heads(torch.cat((x[:, :-1], torch.zeros_like(x[:, -1:])), dim=1))

    attend_with(model, Drops)


@bug("heads-all-alike", "every head is given the first head's queries, keys and values",
     caught_by=(HEADS,), model=True)  # fmt: skip
def heads_all_alike(model: Transformer) -> None:
    class Alike(Attention):
        def split_heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
            return tuple(x[:, :1].expand_as(x) for x in super().split_heads(qkv))

    attend_with(model, Alike)


# -- paths that are cut


@bug("v-detached", "the values are detached: their projection is never trained",
     caught_by=(SLOPES,), model=True)  # fmt: skip
def values_detached(model: Transformer) -> None:
    class Detached(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            return super().attend(q, k, v.detach(), visible)

    attend_with(model, Detached)


@bug("no-output-projection", "the output projection is there and is not applied",
     caught_by=(REACH,), model=True)  # fmt: skip
def output_not_applied(model: Transformer) -> None:
    class NotApplied(Attention):
        def forward(self, x: Tensor, *rest) -> Tensor:
            rotate, visible, cache = rest
            q, k, v = self.split_heads(self.qkv(x))
            q, k = self.place(q, k, rotate)
            if cache is not None:
                k, v = cache.append(self.layer, k, v)
            return self.merge_heads(self.attend(q, self.share(k), self.share(v), visible))

    attend_with(model, NotApplied)


# -- dropout of the weights


@bug("dropout-rescaled-twice", "F.dropout divides by 1 - p, and so does the line behind it",
     caught_by=(AVERAGE,), model=True, attention="explicit")  # fmt: skip
def rescaled_twice(model: Transformer) -> None:
    class Twice(ExplicitAttention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            y = super().attend(q, k, v, visible)
            return y / (1 - self.dropout) if self.training else y

    attend_with(model, Twice)


@bug("dropout-by-hand-not-rescaled", "weights are multiplied by a mask drawn by hand, and not divided by 1 - p",
     caught_by=(AVERAGE,), model=True, attention="explicit")  # fmt: skip
def dropped_by_hand(model: Transformer) -> None:
    class ByHand(ExplicitAttention):
        def weights(self, scores: Tensor) -> Tensor:
            weights = super().weights(scores)
            return weights * (torch.rand_like(weights) >= self.dropout) if self.training else weights

        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            if visible is None:
                visible = causal_mask(q.shape[2], k.shape[2], q.device)
            return self.weights(self.mask(self.scores(q, k), visible)) @ v

    attend_with(model, ByHand)
