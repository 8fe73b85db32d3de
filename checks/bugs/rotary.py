"""Wrong rotary positions: frequencies, angles, the rotation itself, and what is rotated."""

from __future__ import annotations

import torch
from torch import Tensor

from ...transformer.model import Attention, KeyValueCache, RotaryPositions, Rotation, Transformer
from ..check_numerics import check_long_sequences_stay_close
from ..check_positions import (
    check_order_of_tokens_matters,
    check_rotary_angle_depends_on_distance,
    check_rotary_positions_stay_apart_in_bfloat16,
)
from ..check_spec import check_logits_agree
from . import bug
from .damage import LLAMA, attend_with, blocks, redefine

# -- frequencies and angles


@bug("the rotary base is hard-coded to 1000, whatever the configuration says", check_logits_agree, **LLAMA)
def rope_base_of_its_own(model: Transformer) -> None:
    def angles(self: RotaryPositions, positions: Tensor, dtype: torch.dtype) -> Tensor:
        pairs = torch.arange(0, self.head_width, 2, device=positions.device, dtype=dtype)
        return positions[..., None].to(dtype) * 1000.0 ** (-pairs / self.head_width)

    redefine(model.positions, angles=angles)


@bug("the rotary exponent of pair i is i / D instead of 2i / D", check_logits_agree, **LLAMA)
def rope_exponent_halved(model: Transformer) -> None:
    def angles(self: RotaryPositions, positions: Tensor, dtype: torch.dtype) -> Tensor:
        pairs = torch.arange(self.head_width // 2, device=positions.device, dtype=dtype)
        return positions[..., None].to(dtype) * self.base ** (-pairs / self.head_width)

    redefine(model.positions, angles=angles)


@bug("the rotary exponent of pair i is 4i / D instead of 2i / D", check_logits_agree, **LLAMA)
def rope_exponent_doubled(model: Transformer) -> None:
    def angles(self: RotaryPositions, positions: Tensor, dtype: torch.dtype) -> Tensor:
        pairs = torch.arange(0, self.head_width, 2, device=positions.device, dtype=dtype)
        return positions[..., None].to(dtype) * self.base ** (-2 * pairs / self.head_width)

    redefine(model.positions, angles=angles)


@bug("the rotary exponent is divided by the model width instead of the head width", check_logits_agree, **LLAMA)
def rope_exponent_by_model_width(model: Transformer) -> None:
    width = model.config.n_embd

    def angles(self: RotaryPositions, positions: Tensor, dtype: torch.dtype) -> Tensor:
        pairs = torch.arange(0, self.head_width, 2, device=positions.device, dtype=dtype)
        return positions[..., None].to(dtype) * self.base ** (-pairs / width)

    redefine(model.positions, angles=angles)


@bug("the rotary exponent has the wrong sign: frequencies grow from pair to pair", check_logits_agree, **LLAMA)
def rope_exponent_positive(model: Transformer) -> None:
    def angles(self: RotaryPositions, positions: Tensor, dtype: torch.dtype) -> Tensor:
        pairs = torch.arange(0, self.head_width, 2, device=positions.device, dtype=dtype)
        return positions[..., None].to(dtype) * self.base ** (pairs / self.head_width)

    redefine(model.positions, angles=angles)


@bug(
    "rotary angles are computed in bfloat16: distant positions get equal angles",
    check_rotary_angle_depends_on_distance,
    source="https://github.com/huggingface/transformers/pull/29285 ; "
    "https://github.com/NVIDIA/Megatron-LM/issues/535 ; "
    "https://github.com/KellerJordan/modded-nanogpt/issues/39",
    positions="rotary",
)
def rope_half_precision(model: Transformer) -> None:
    class Half(RotaryPositions):
        def angles(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
            return super().angles(positions, dtype).bfloat16().to(torch.promote_types(dtype, torch.float32))

    model.positions.__class__ = Half


@bug(
    "rotary angles are computed in the type of the model: in bfloat16 positions beyond 256 get equal angles",
    check_rotary_positions_stay_apart_in_bfloat16,
    source="https://github.com/huggingface/transformers/pull/29285",
    positions="rotary",
)
def rope_angles_in_the_models_type(model: Transformer) -> None:
    class OfTheModel(RotaryPositions):
        def angles(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
            return super().angles(positions.to(dtype), dtype).to(dtype)

    model.positions.__class__ = OfTheModel


@bug(
    "rotary angles are computed by a matrix product, which autocast runs in bfloat16",
    check_long_sequences_stay_close,
    source="https://github.com/huggingface/transformers/pull/29285",
    positions="rotary",
)
def rope_angles_by_matmul(model: Transformer) -> None:
    class Product(RotaryPositions):
        def angles(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
            dtype = torch.promote_types(dtype, torch.float32)
            pairs = torch.arange(0, self.head_width, 2, device=positions.device, dtype=dtype)
            frequencies = self.base ** (-pairs / self.head_width)
            return positions.to(dtype)[..., None] @ frequencies[None]

    model.positions.__class__ = Product


@bug("rotary positions start again after 32 tokens", check_order_of_tokens_matters, positions="rotary")
def rotary_positions_start_again(model: Transformer) -> None:
    class Cyclic(RotaryPositions):
        def angles(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
            return super().angles(positions % 32, dtype)

    model.positions.__class__ = Cyclic


# -- the rotation


@bug("sign error: (a cos + b sin, b cos + a sin) is no rotation", check_logits_agree, **LLAMA)
def rope_sign_lost(model: Transformer) -> None:
    def rotation(self: RotaryPositions, positions: Tensor, dtype: torch.dtype) -> Rotation:
        angles = self.angles(positions, dtype).unsqueeze(-3)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

        def rotate(x: Tensor) -> Tensor:
            a, b = self.pairs(x)
            return self.unpair(a * cos + b * sin, b * cos + a * sin)

        return rotate

    redefine(model.positions, rotation=rotation)


@bug(
    "angles for interleaved pairs of features are applied to halves: that is no rotation",
    check_rotary_angle_depends_on_distance,
    source="https://github.com/karpathy/nanochat/issues/264 ; https://github.com/rasbt/LLMs-from-scratch/pull/750",
    positions="rotary",
)
def rope_pairing_mismatch(model: Transformer) -> None:
    class Mismatched(RotaryPositions):
        def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
            angles = self.angles(positions, dtype).repeat_interleave(2, dim=-1).unsqueeze(-3)
            cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

            def rotate(x: Tensor) -> Tensor:
                a, b = self.pairs(x)
                return x * cos + torch.cat((-b, a), dim=-1) * sin

            return rotate

    model.positions.__class__ = Mismatched


@bug("only half of each head's features are rotated, as in GPT-NeoX but not in Llama", check_logits_agree, **LLAMA)
def rope_half_of_the_features(model: Transformer) -> None:
    def rotation(self: RotaryPositions, positions: Tensor, dtype: torch.dtype) -> Rotation:
        angles = self.angles(positions, dtype).unsqueeze(-3)
        turned = self.head_width // 4 * 2
        cos, sin = (f[..., : turned // 2].to(dtype) for f in (angles.cos(), angles.sin()))

        def rotate(x: Tensor) -> Tensor:
            a, b = self.pairs(x[..., :turned])
            return torch.cat((self.unpair(a * cos - b * sin, b * cos + a * sin), x[..., turned:]), dim=-1)

        return rotate

    redefine(model.positions, rotation=rotation)


@bug("the rotary angle grows along heads instead of along tokens", check_order_of_tokens_matters, positions="rotary")
def rope_on_the_wrong_axis(model: Transformer) -> None:
    class RotaryAlongHeads(RotaryPositions):
        def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
            along = super().rotation

            def rotate(x: Tensor) -> Tensor:
                heads = torch.arange(x.shape[1], device=x.device)
                return along(heads, dtype)(x.transpose(1, 2)).transpose(1, 2)

            return rotate

    model.positions.__class__ = RotaryAlongHeads


# -- what is rotated


@bug("queries and keys are not rotated: the model has no positions", check_logits_agree, **LLAMA)
def rope_missing(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.attention, place=lambda self, q, k, rotate: (q, k))


@bug("queries and keys are rotated twice", check_logits_agree, **LLAMA)
def rope_twice(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.attention, place=lambda self, q, k, rotate: (rotate(rotate(q)), rotate(rotate(k))))


@bug("values are rotated like queries and keys", check_logits_agree, **LLAMA)
def rope_on_v(model: Transformer) -> None:
    def forward(
        self: Attention, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:
        self.turn = rotate  # type: ignore[assignment]
        return Attention.forward(self, x, rotate, visible, cache)

    def split_heads(self: Attention, qkv: Tensor) -> tuple[Tensor, ...]:
        q, k, v = Attention.split_heads(self, qkv)
        return q, k, self.turn(v)  # type: ignore[operator]

    for block in blocks(model):
        redefine(block.attention, forward=forward, split_heads=split_heads)


@bug(
    "only queries are rotated, not keys",
    check_rotary_angle_depends_on_distance,
    check_order_of_tokens_matters,
    positions="rotary",
)
def rope_only_on_q(model: Transformer) -> None:
    class OnlyQ(Attention):
        def place(self, q: Tensor, k: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor]:
            return rotate(q), k

    attend_with(model, OnlyQ)


@bug("only keys are rotated, not queries", check_rotary_angle_depends_on_distance, positions="rotary")
def rope_only_on_k(model: Transformer) -> None:
    class OnlyK(Attention):
        def place(self, q: Tensor, k: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor]:
            return q, rotate(k)

    attend_with(model, OnlyK)


@bug("the last layer rotates only queries, not keys", check_rotary_angle_depends_on_distance, positions="rotary")
def rope_only_on_q_in_one_layer(model: Transformer) -> None:
    class OnlyQ(Attention):
        def place(self, q: Tensor, k: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor]:
            return rotate(q), k

    attend_with(model, OnlyQ, slice(-1, None))


@bug("queries and keys are rotated in opposite directions", check_rotary_angle_depends_on_distance, positions="rotary")
def rope_opposite_signs(model: Transformer) -> None:
    class Apart(Attention):
        def place(self, q: Tensor, k: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor]:
            return rotate(q), self.halves_exchanged(rotate(self.halves_exchanged(k)))

        def halves_exchanged(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, dim=-1)
            return torch.cat((b, a), dim=-1)

    attend_with(model, Apart)
