"""Paths that only some devices, kernels or compilers take, and that compute something else or wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...transformer.model import Attention, Transformer
from ..check_devices import (
    check_device_agrees_with_the_cpu,
    check_every_attention_kernel_agrees,
    check_step_does_not_wait_at_each_token,
)
from ..check_portability import (
    check_attention_backends_agree,
    check_compiled_model_agrees,
    check_exported_model_agrees,
    check_forward_stays_on_its_device,
    check_inductor_agrees,
)
from . import bug
from .damage import attend_with, blocks

# -- kernels and compilers


@bug("the model's slow attention path, chosen by its own flag, lacks the scale", check_attention_backends_agree)
def backends_disagree(model: Transformer) -> None:
    class TwoPaths(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            if self.flash:
                return super().attend(q, k, v, visible)
            scores = q @ k.transpose(-2, -1)
            if visible is None:
                visible = torch.ones_like(scores, dtype=torch.bool).tril(k.shape[2] - q.shape[2])
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            return F.dropout(weights, self.dropout, self.training) @ v

    for block in blocks(model):
        block.attention.__class__ = TwoPaths
        block.attention.flash = True


@bug("with the math kernel off, attention takes a path without the scale", check_every_attention_kernel_agrees)
def path_chosen_by_kernel_switches(model: Transformer) -> None:
    class Asking(Attention):
        def scale(self) -> float:
            return super().scale() if torch.backends.cuda.math_sdp_enabled() else 1.0  # type: ignore[no-untyped-call]

    attend_with(model, Asking)


@bug(
    "compiled attention takes a path without the scale",
    check_compiled_model_agrees,
    check_inductor_agrees,
    check_exported_model_agrees,
    source="https://github.com/huggingface/transformers/issues/48745",
)
def other_path_when_compiled(model: Transformer) -> None:
    class Tracing(Attention):
        def scale(self) -> float:
            return 1.0 if torch.compiler.is_compiling() else super().scale()

    attend_with(model, Tracing)


@bug("export freezes a constant: the embedding of the example's tokens", check_exported_model_agrees)
def constant_baked_in(model: Transformer) -> None:
    class Baked(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            if not torch.compiler.is_exporting():
                self.last = tokens.detach().clone()
                return super().embed(tokens)
            return super().embed(self.last)

    model.last = torch.zeros(3, model.config.block_size, dtype=torch.long)
    model.__class__ = Baked


# -- devices


@bug("on a GPU, attention takes a path without the scale", check_device_agrees_with_the_cpu, device="cuda")
def another_scale_on_the_device(model: Transformer) -> None:
    class Elsewhere(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            return super().attend(q if q.device.type == "cpu" else q / self.scale(), k, v, visible)

    attend_with(model, Elsewhere)


@bug(
    "positions are made on the default device: the forward fails on any other",
    check_forward_stays_on_its_device,
    source="https://github.com/mlverse/torch/pull/1473",
)
def device_hardcoded(model: Transformer) -> None:
    class OnDefaultDevice(Transformer):
        def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
            return torch.arange(S - T, S) if mask is None else super().token_positions(mask, T, S, device)

    model.__class__ = OnDefaultDevice


@bug("token ids are tested one position at a time, each waiting for the device", check_step_does_not_wait_at_each_token)
def number_read_at_each_token(model: Transformer) -> None:
    class Testing(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            for t in range(tokens.shape[1]):
                if bool((tokens[:, t] >= self.config.vocab_size).any()):
                    raise ValueError(f"position {t} holds no token")
            return super().embed(tokens)

    model.__class__ = Testing
