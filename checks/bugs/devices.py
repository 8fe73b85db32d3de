"""Bugs of kernels, precisions and devices, and of what a step costs there."""

from __future__ import annotations

import torch
from torch import Tensor

from ...transformer.model import Attention, ExplicitAttention, GeluFeedForward, Rotation, Transformer
from . import bug

KERNELS = "check_devices.check_every_attention_kernel_agrees"
MIXED = "check_devices.check_mixed_precision_keeps_the_gradient"
SWITCHES = "check_devices.check_precision_switches_are_left_alone"
CPU = "check_devices.check_device_agrees_with_the_cpu"
WAITS = "check_devices.check_step_does_not_wait_at_each_token"
GROWS = "check_devices.check_memory_does_not_grow"
BATCH = "check_devices.check_memory_grows_no_faster_than_the_batch"
DETERMINISTIC = "check_devices.check_deterministic_algorithms_repeat_the_step"


@bug("path-chosen-by-kernel-switches", "where the math kernel is off, a path of its own is taken, without the scale",
     caught_by=(KERNELS,), model=True)  # fmt: skip
def path_by_switches(model: Transformer) -> None:
    class Asking(Attention):
        def scale(self) -> float:
            return super().scale() if torch.backends.cuda.math_sdp_enabled() else 1.0

    for block in model.blocks:
        block.attention.__class__ = Asking


@bug("fp16-autocast-mask-overflow", "under autocast masks are -1e9 times 0 or 1 in float16: -inf times 0 is NaN",
     caught_by=(MIXED,), model=True, attention="explicit")  # fmt: skip
def autocast_mask_overflow(model: Transformer) -> None:
    class Multiplied(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            return scores + (~visible).to(scores) * torch.tensor(-1e9).to(scores)

    for block in model.blocks:
        block.attention.__class__ = Multiplied


@bug("autocast-cuts-the-gradient", "under autocast the feed-forward casts through .data, which cuts the gradient",
     caught_by=(MIXED,), model=True)  # fmt: skip
def autocast_cuts_the_gradient(model: Transformer) -> None:
    class Cut(GeluFeedForward):
        def activation(self, x: Tensor) -> Tensor:
            if torch.is_autocast_enabled(x.device.type):
                x = x.data.to(torch.get_autocast_dtype(x.device.type))
            return super().activation(x)

    for block in model.blocks:
        block.feed_forward.__class__ = Cut


@bug("forward-turns-tf32-on", "a forward turns TF32 on for the whole process",
     source="https://github.com/pytorch/pytorch/issues/67384", caught_by=(SWITCHES,), model=True)  # fmt: skip
def forward_turns_tf32_on(model: Transformer) -> None:
    class Hasty(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            torch.set_float32_matmul_precision("high")
            return super().embed(tokens)

    model.__class__ = Hasty


@bug("another-scale-on-the-device", "on a GPU another path computes attention, without the scale",
     caught_by=(CPU,), model=True, device="cuda")  # fmt: skip
def another_scale_on_the_device(model: Transformer) -> None:
    class Elsewhere(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            return super().attend(q if q.device.type == "cpu" else q / self.scale(), k, v, visible)

    for block in model.blocks:
        block.attention.__class__ = Elsewhere


@bug("number-read-at-each-token", "token ids are tested one position after another, each test read by Python",
     caught_by=(WAITS,), model=True)  # fmt: skip
def number_read_at_each_token(model: Transformer) -> None:
    class Testing(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            for t in range(tokens.shape[1]):
                if bool((tokens[:, t] >= self.config.vocab_size).any()):
                    raise ValueError(f"position {t} holds no token")
            return super().embed(tokens)

    model.__class__ = Testing


@bug("forward-keeps-its-activations", "every forward appends its output to a list, for a plot that is never made",
     caught_by=(GROWS,), model=True)  # fmt: skip
def forward_keeps_its_activations(model: Transformer) -> None:
    kept: list[Tensor] = []

    class Keeping(GeluFeedForward):
        def forward(self, x: Tensor) -> Tensor:
            kept.append(super().forward(x))
            return kept[-1]

    for block in model.blocks:
        block.feed_forward.__class__ = Keeping


@bug("every-row-with-every-row", "queries of every row meet keys of every row, and only the diagonal is kept",
     caught_by=(BATCH,), model=True, attention="explicit")  # fmt: skip
def every_row_with_every_row(model: Transformer) -> None:
    class Crossed(ExplicitAttention):
        def scores(self, q: Tensor, k: Tensor) -> Tensor:
            every = q[:, None] @ k[None].transpose(-2, -1) * self.scale()  # [B, B, H, T, S]
            rows = torch.arange(len(q), device=q.device)
            return every[rows, rows]

    for block in model.blocks:
        block.attention.__class__ = Crossed


@bug("jitter-no-seed-reaches", "training jitters queries by a generator of its own, seeded by the clock",
     caught_by=(DETERMINISTIC,), model=True)  # fmt: skip
def jitter_no_seed_reaches(model: Transformer) -> None:
    generator = torch.Generator()
    generator.seed()

    class Jittered(Attention):
        def place(self, q: Tensor, k: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor]:
            q, k = super().place(q, k, rotate)
            noise = torch.randn(q.shape, generator=generator).to(q)
            return (q + 0.01 * noise if self.training else q), k

    for block in model.blocks:
        block.attention.__class__ = Jittered
