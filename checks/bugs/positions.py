"""Mistakes at the positions: tables, angles, and which place a token is said to stand at."""

from __future__ import annotations

import torch
from torch import Tensor

from ...transformer.model import Attention, LearnedPositions, RotaryPositions, Rotation, Transformer
from . import bug
from .attention import PREFIX, REACH
from .designs import PlacedTransformer, placed
from .masking import attend_with

ORDER = "check_positions.check_order_of_tokens_matters"
ANGLE = "check_positions.check_rotary_angle_depends_on_distance"
LEFT = "check_masking.check_left_padding_changes_nothing"


# -- which place a token stands at


@bug(
    "position-constant",
    "one row of the table, pe[:, T] instead of pe[:, :T], is added to every token",
    source="https://github.com/DiffPoseTalk/DiffPoseTalk/issues/20",
    caught_by=(ORDER,),
    model=True,
)
def position_constant(model: Transformer) -> None:
    class Constant(LearnedPositions):
        def add(self, x: Tensor, positions: Tensor) -> Tensor:
            return super().add(x, positions[..., -1:])

    model.positions.__class__ = Constant


@bug("position-reversed", "positions are counted from the end: a prefix stands elsewhere than in the whole",
     caught_by=(PREFIX, "check_masking.check_right_padding_changes_nothing"), model=True)  # fmt: skip
def position_reversed(model: Transformer) -> None:
    class FromTheEnd(Transformer):
        def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
            return S - 1 - super().token_positions(mask, T, S, device)

    model.__class__ = FromTheEnd


@bug("positions-start-again", "positions start again after 8 tokens: token 8 stands where token 0 does",
     caught_by=(ORDER,), model=True)  # fmt: skip
def positions_start_again(model: Transformer) -> None:
    class Cyclic(Transformer):
        def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
            return super().token_positions(mask, T, S, device) % 8

    model.__class__ = Cyclic


@bug("rotary-positions-start-again", "angles start again after 32 tokens: token 32 stands where token 0 does",
     caught_by=(ORDER,), model=True, positions="rotary")  # fmt: skip
def angles_start_again(model: Transformer) -> None:
    class Cyclic(RotaryPositions):
        def angles(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
            return super().angles(positions % 32, dtype)

    model.positions.__class__ = Cyclic


@bug("positions-start-again-at-128", "positions are held in 7 bits: token 128 stands where token 0 does",
     caught_by=(ORDER,), model=True)  # fmt: skip
def positions_in_seven_bits(model: Transformer) -> None:
    class Cyclic(Transformer):
        def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
            return super().token_positions(mask, T, S, device) % 128

    model.__class__ = Cyclic


@bug("positions-clamped", "positions beyond 100 are all taken for 100", caught_by=(ORDER,), model=True)
def positions_clamped(model: Transformer) -> None:
    class Clamped(Transformer):
        def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
            return super().token_positions(mask, T, S, device).clamp(max=100)

    model.__class__ = Clamped


@bug(
    "left-pad-positions-not-from-mask",
    "positions are counted over padding on the left: a short prompt of a batch stands too far right",
    source="https://github.com/unslothai/unsloth/issues/3699 ; https://github.com/ndif-team/nnsight/pull/673",
    caught_by=(LEFT,),
    model=True,
)
def padding_counted(model: Transformer) -> None:
    class CountsPadding(Transformer):
        def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
            return super().token_positions(None, T, S, device)

    model.__class__ = CountsPadding


@bug(
    "position-table-detached",
    "the table of positions is read through .data: it is never trained",
    source="https://github.com/d2l-ai/d2l-en/pull/2121",
    caught_by=(REACH,),
    model=True,
)
def table_detached(model: Transformer) -> None:
    class Detached(LearnedPositions):
        def add(self, x: Tensor, positions: Tensor) -> Tensor:
            return x + self.table.weight.data[positions]

    model.positions.__class__ = Detached


@bug(
    "position-ids-mutated-in-place",
    "places are made from 1 on by += on the caller's own tensor: the next call counts from 2",
    source="https://github.com/open-edge-platform/physical-ai-studio/issues/589",
    caught_by=("check_contract.check_inputs_are_left_alone",),
    model=True,
    of=placed,
)
def positions_mutated(model: Transformer) -> None:
    class Mutates(PlacedTransformer):
        def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
            positions = super().token_positions(mask, T, S, device)
            positions += 1
            return positions - 1

    model.__class__ = Mutates


# -- rotary angles


@bug("rope-only-on-q", "queries are turned and keys are not: the score knows the query's place alone",
     caught_by=(ANGLE, ORDER), model=True, positions="rotary")  # fmt: skip
def only_queries_turned(model: Transformer) -> None:
    class OnlyQ(Attention):
        def place(self, q: Tensor, k: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor]:
            return rotate(q), k

    attend_with(model, OnlyQ)


@bug("rope-only-on-k", "keys are turned and queries are not: the score knows the key's place alone",
     caught_by=(ANGLE,), model=True, positions="rotary")  # fmt: skip
def only_keys_turned(model: Transformer) -> None:
    class OnlyK(Attention):
        def place(self, q: Tensor, k: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor]:
            return q, rotate(k)

    attend_with(model, OnlyK)


@bug("rope-only-on-q-in-one-layer", "the last layer turns its queries and leaves its keys; the others are right",
     caught_by=(ANGLE,), model=True, positions="rotary")  # fmt: skip
def only_queries_of_the_last(model: Transformer) -> None:
    class OnlyQ(Attention):
        def place(self, q: Tensor, k: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor]:
            return rotate(q), k

    attend_with(model, OnlyQ, slice(-1, None))


@bug("rope-opposite-signs", "keys are turned backwards: the score depends on the sum of the places",
     caught_by=(ANGLE,), model=True, positions="rotary")  # fmt: skip
def turned_apart(model: Transformer) -> None:
    class Apart(Attention):
        def place(self, q: Tensor, k: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor]:
            return rotate(q), self.halves_exchanged(rotate(self.halves_exchanged(k)))

        def halves_exchanged(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, dim=-1)
            return torch.cat((b, a), dim=-1)

    attend_with(model, Apart)


@bug(
    "rope-pairing-mismatch",
    "angles are laid out for neighbouring features, and halves are turned: no rotation at all",
    source="https://github.com/karpathy/nanochat/issues/264 ; https://github.com/rasbt/LLMs-from-scratch/pull/750",
    caught_by=(ANGLE,),
    model=True,
    positions="rotary",
)
def pairs_mismatched(model: Transformer) -> None:
    class Mismatched(RotaryPositions):
        def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
            angles = self.angles(positions, dtype).repeat_interleave(2, dim=-1).unsqueeze(-3)
            cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

            def rotate(x: Tensor) -> Tensor:
                a, b = self.pairs(x)
                return x * cos + torch.cat((-b, a), dim=-1) * sin

            return rotate

    model.positions.__class__ = Mismatched


@bug("rope-on-the-wrong-axis", "the angle grows from head to head and not from token to token",
     caught_by=(ORDER,), model=True, positions="rotary")  # fmt: skip
def turned_along_heads(model: Transformer) -> None:
    class RotaryAlongHeads(RotaryPositions):
        def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
            along = super().rotation

            def rotate(x: Tensor) -> Tensor:
                heads = torch.arange(x.shape[1], device=x.device)
                return along(heads, dtype)(x.transpose(1, 2)).transpose(1, 2)

            return rotate

    model.positions.__class__ = RotaryAlongHeads


@bug(
    "rope-half-precision",
    "positions and angles are computed in bfloat16: places far apart look alike",
    source="https://github.com/huggingface/transformers/pull/29285 ; "
    "https://github.com/NVIDIA/Megatron-LM/issues/535 ; https://github.com/KellerJordan/modded-nanogpt/issues/39",
    caught_by=(ANGLE,),
    model=True,
    positions="rotary",
)
def angles_in_half_precision(model: Transformer) -> None:
    class Half(RotaryPositions):
        def angles(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
            return super().angles(positions, dtype).bfloat16().to(torch.promote_types(dtype, torch.float32))

    model.positions.__class__ = Half
