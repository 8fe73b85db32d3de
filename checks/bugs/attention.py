"""Wrong attention: the scale, the softmax, and what becomes of queries, keys, values and heads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...transformer.model import Attention, ExplicitAttention, KeyValueCache, Rotation, Transformer
from ..check_attention import check_scores_are_scaled_by_their_own_width
from ..check_causality import check_future_cannot_change_past, check_prefix_gives_the_same_logits
from ..check_contract import check_every_head_matters, check_nothing_projected_is_thrown_away
from ..check_devices import check_memory_grows_no_faster_than_the_batch
from ..check_gradients import check_every_parameter_gets_a_gradient
from ..check_masking import check_rows_do_not_touch
from ..check_parts import check_attention_weights_sum_to_one, check_heads_that_share_keys_share_values
from ..check_spec import check_attention_scale_is_usual, check_logits_agree
from . import bug
from .damage import EXPLICIT, GPT2, LLAMA, attend_with, blocks, redefine, undamaged

# -- the scale


@bug("attention scores are not divided by √D, the square root of the head width", check_logits_agree, **GPT2)
def scale_missing(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.attention, scale=lambda self: 1.0)


@bug("attention scores are multiplied by √D, not divided", check_logits_agree, check_attention_scale_is_usual, **GPT2)
def scale_multiplied(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.attention, scale=lambda self: self.head_width**0.5)


@bug(
    "attention scores are divided by the square root of the model width instead of the head width",
    check_logits_agree,
    check_scores_are_scaled_by_their_own_width,
    check_attention_scale_is_usual,
    **GPT2,
)
def scale_by_d_model(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.attention, scale=lambda self: (self.n_head * self.head_width) ** -0.5)


@bug("attention scores are divided by D instead of √D", check_logits_agree, check_attention_scale_is_usual, **GPT2)
def scale_without_root(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.attention, scale=lambda self: 1 / self.head_width)


@bug(
    "attention scores are divided by √D twice: once by hand and once inside the kernel",
    check_logits_agree,
    source="https://github.com/pytorch/pytorch/issues/96099",
    **GPT2,
)
def scale_twice(model: Transformer) -> None:
    def attend(self: Attention, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        return undamaged(self).attend(self, q * self.scale(), k, v, visible)

    for block in blocks(model):
        redefine(block.attention, attend=attend)


@bug("scores are divided by the root of the sequence length instead of the head width", check_logits_agree, **EXPLICIT)
def scale_by_sequence(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.attention, scores=lambda self, q, k: q @ k.transpose(-2, -1) * k.shape[-2] ** -0.5)


@bug("scores are divided by the root of the number of heads instead of the head width", check_logits_agree, **GPT2)
def scale_by_heads(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.attention, scale=lambda self: self.n_head**-0.5)


@bug("attention scores are also divided by the layer number, as an option of GPT-2 does", check_logits_agree, **GPT2)
def scale_by_layer(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.attention, scale=lambda self: self.head_width**-0.5 / (self.layer + 1))


@bug(
    "the attention weights are divided by √D after the softmax, not the scores before it",
    check_attention_weights_sum_to_one,
    check_logits_agree,
    **EXPLICIT,
)
def scale_after_softmax(model: Transformer) -> None:
    for block in blocks(model):
        redefine(
            block.attention,
            scores=lambda self, q, k: q @ k.transpose(-2, -1),
            weights=lambda self, scores: scores.softmax(dim=-1) * self.scale(),
        )


# -- the softmax


@bug(
    "the softmax runs over queries instead of keys: later queries change the weights of earlier ones",
    check_future_cannot_change_past,
    source="https://github.com/labmlai/annotated_deep_learning_paper_implementations/issues/146 ; "
    "https://github.com/nerdai/llms-from-scratch-rs/pull/30",
    attention="explicit",
)
def softmax_over_queries(model: Transformer) -> None:
    class Columns(ExplicitAttention):
        def weights(self, scores: Tensor) -> Tensor:
            return scores.softmax(dim=-2)

    attend_with(model, Columns)


@bug(
    "the softmax runs over heads instead of keys: a key masked in every head still gets weight",
    check_future_cannot_change_past,
    source="https://github.com/FudanNLP/fastNLP/issues/254",
    attention="explicit",
)
def softmax_over_heads(model: Transformer) -> None:
    class Heads(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            return scores.masked_fill(~visible, torch.finfo(scores.dtype).min)

        def weights(self, scores: Tensor) -> Tensor:
            return scores.softmax(dim=1)

    attend_with(model, Heads)


@bug(
    "the softmax runs over heads instead of keys, and the mask is applied after it",
    check_attention_weights_sum_to_one,
    attention="explicit",
)
def softmax_over_heads_masked_after(model: Transformer) -> None:
    class Heads(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            return scores.softmax(dim=1) * visible

        def weights(self, scores: Tensor) -> Tensor:
            return scores

    attend_with(model, Heads)


@bug("attention weights are exp(s) / (1 + Σ exp(s)): they do not sum to one", check_logits_agree, **EXPLICIT)
def softmax_plus_one(model: Transformer) -> None:
    def weights(self: ExplicitAttention, scores: Tensor) -> Tensor:
        return F.pad(scores, (0, 1)).softmax(dim=-1)[..., :-1]

    for block in blocks(model):
        redefine(block.attention, weights=weights)


@bug("attention weights are sigmoids of the scores: they do not sum to one", check_logits_agree, **EXPLICIT)
def sigmoid_for_softmax(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.attention, weights=lambda self, scores: scores.sigmoid())


@bug("attention scores are capped at 5 tanh(s / 5), which neither GPT-2 nor Llama does", check_logits_agree, **EXPLICIT)
def attention_softcap_undeclared(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.attention, scores=lambda self, q, k: 5 * (ExplicitAttention.scores(self, q, k) / 5).tanh())


# -- queries, keys, values and the output


@bug("queries and keys are normalized (QK norm), which neither GPT-2 nor Llama does", check_logits_agree, **GPT2)
def query_key_norm_undeclared(model: Transformer) -> None:
    def place(self: Attention, q: Tensor, k: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor]:
        return rotate(F.rms_norm(q, q.shape[-1:])), rotate(F.rms_norm(k, k.shape[-1:]))

    for block in blocks(model):
        redefine(block.attention, place=place)


@bug("attention averages the keys: the value projection is not used", check_logits_agree, **GPT2)
def values_are_keys(model: Transformer) -> None:
    def split_heads(self: Attention, qkv: Tensor) -> tuple[Tensor, ...]:
        q, k, _ = Attention.split_heads(self, qkv)
        return q, k, k

    for block in blocks(model):
        redefine(block.attention, split_heads=split_heads)


@bug("the output projection of attention is never applied", check_every_parameter_gets_a_gradient)
def no_output_projection(model: Transformer) -> None:
    class NotApplied(Attention):
        def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
            q, k, v = self.split_heads(self.qkv(x))
            q, k = self.place(q, k, rotate)
            if cache is not None:
                k, v = cache.append(self.layer, k, v)
            return self.merge_heads(self.attend(q, self.share(k), self.share(v), visible))

    attend_with(model, NotApplied)


@bug(
    "scores are computed between all pairs of rows in a batch, and all but the diagonal discarded",
    check_memory_grows_no_faster_than_the_batch,
    attention="explicit",
)
def every_row_with_every_row(model: Transformer) -> None:
    class Crossed(ExplicitAttention):
        def scores(self, q: Tensor, k: Tensor) -> Tensor:
            every = q[:, None] @ k[None].transpose(-2, -1) * self.scale()  # [B, B, H, T, S]
            rows = torch.arange(len(q), device=q.device)
            return every[rows, rows]

    attend_with(model, Crossed)


# -- heads


@bug(
    "[B, T, C] is viewed as [B, H, T, D] without a transpose: positions are mixed up",
    check_future_cannot_change_past,
    check_prefix_gives_the_same_logits,
    source="https://github.com/reczoo/FuxiCTR/issues/30 ; "
    "https://github.com/649453932/Chinese-Text-Classification-Pytorch/issues/53",
)
def heads_view_without_transpose(model: Transformer) -> None:
    class Viewed(Attention):
        def split_heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
            B, T, _ = qkv.shape
            sizes = [n * self.head_width for n in (self.n_head, self.n_kv_head, self.n_kv_head)]
            return tuple(x.reshape(B, -1, T, self.head_width) for x in torch.split(qkv, sizes, dim=-1))

    attend_with(model, Viewed)


@bug(
    "[B, H, T, D] is viewed as [B, T, C] without a transpose: positions are mixed up",
    check_future_cannot_change_past,
    check_prefix_gives_the_same_logits,
    source="https://github.com/jsbaan/transformer-from-scratch/pull/6 ; "
    "https://github.com/ajhalthor/Transformer-Neural-Network/pull/4",
)
def merge_heads_without_transpose(model: Transformer) -> None:
    class Merged(Attention):
        def merge_heads(self, x: Tensor) -> Tensor:
            B, _, T, _ = x.shape
            return x.reshape(B, T, -1)

    attend_with(model, Merged)


@bug(
    "heads and rows are folded as (H·B) and unfolded as (B·H): rows are mixed up",
    check_rows_do_not_touch,
    source="https://github.com/gazelle93/Transformer-Various-Positional-Encoding/issues/1",
)
def head_batch_axes_confused(model: Transformer) -> None:
    class Confused(Attention):
        def merge_heads(self, x: Tensor) -> Tensor:
            B, H, T, D = x.shape
            return super().merge_heads(x.transpose(0, 1).reshape(B, H, T, D))

    attend_with(model, Confused)


@bug("the last head's output is overwritten with zeros before the output projection", check_every_head_matters)
def last_head_dropped(model: Transformer) -> None:
    class Drops(Attention):
        def merge_heads(self, x: Tensor) -> Tensor:
            return super().merge_heads(torch.cat((x[:, :-1], torch.zeros_like(x[:, -1:])), dim=1))

    attend_with(model, Drops)


@bug("every head uses the first head's queries, keys and values", check_every_head_matters)
def heads_all_alike(model: Transformer) -> None:
    class Alike(Attention):
        def split_heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
            return tuple(x[:, :1].expand_as(x) for x in super().split_heads(qkv))

    attend_with(model, Alike)


# -- grouped-query attention


@bug(
    "key-value heads are repeated along the sequence instead of the heads",
    check_future_cannot_change_past,
    source="https://github.com/PrimeIntellect-ai/prime-rl/pull/2681",
    n_kv_head=2,
)
def gqa_repeat_on_sequence_dim(model: Transformer) -> None:
    class Repeated(Attention):
        def share(self, x: Tensor) -> Tensor:
            B, G, T, D = x.shape
            return x.repeat_interleave(self.n_head // G, dim=2).reshape(B, self.n_head, T, D)

    attend_with(model, Repeated)


@bug(
    "every query head reads the first key-value head: the others are computed and not used",
    check_nothing_projected_is_thrown_away,
    source="https://github.com/PSAL-POSTECH/ONNXim/pull/34",
    n_kv_head=2,
)
def gqa_heads_collapse_to_one(model: Transformer) -> None:
    class First(Attention):
        def share(self, x: Tensor) -> Tensor:
            return x[:, :1].expand(-1, self.n_head, -1, -1)

    attend_with(model, First)


@bug(
    "query heads are grouped unevenly: one alone, the rest together",
    check_heads_that_share_keys_share_values,
    n_kv_head=2,
)
def gqa_groups_of_different_sizes(model: Transformer) -> None:
    class Uneven(Attention):
        def share(self, x: Tensor) -> Tensor:
            head = torch.arange(self.n_head, device=x.device)
            return x[:, (head - self.n_head + self.n_kv_head).clamp(min=0)]

    attend_with(model, Uneven)


@bug(
    "query head h reads the keys of group h // (H/G) but the values of group h mod G",
    check_logits_agree,
    check_heads_that_share_keys_share_values,
    n_kv_head=2,
    **LLAMA,
)
def gqa_k_v_grouping_mismatch(model: Transformer) -> None:
    def attend(self: Attention, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        groups = v[:, :: self.n_head // self.n_kv_head]
        tiled = groups.repeat(1, self.n_head // self.n_kv_head, 1, 1)
        return undamaged(self).attend(self, q, k, tiled, visible)

    for block in blocks(model):
        redefine(block.attention, attend=attend)
