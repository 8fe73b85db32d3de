"""TrainConfig, how a model is trained, and its two recipes for the sentence: quick (the defaults) and published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. The defaults are the quick recipe, which learns the sentence in about fifty steps.

    All copies of the sentence are equal, so a batch of two teaches as much as one of a hundred. A batch of one would
    hide a mistake in the batch axis.
    """

    steps: int = 1000  # maximum number of optimizer steps
    stop_loss: float | None = 1e-5  # training ends at the first loss this low, in nats per target; None: never
    batch_size: int = 2  # examples per optimizer step, over all processes
    micro_batch_size: int | None = None  # examples computed at once, to save memory; None: the whole batch
    optimizer: Literal["adam", "adamw"] = "adam"  # adam adds weight decay to the gradient, adamw to the weights
    learning_rate: float = 3e-3  # after warm-up
    beta1: float = 0.9  # decay rate of the mean of the gradient
    beta2: float = 0.85  # decay rate of the mean of its square; small, so that steps stay large
    eps: float = 1e-8  # added to the root of the mean square
    weight_decay: float = 0.0  # of matrices; norms, biases and embeddings (a tied head is one) do not decay
    warmup_steps: int = 5  # steps over which the learning rate rises linearly
    schedule: Literal["constant", "cosine"] = "constant"  # of the learning rate after warm-up
    min_learning_rate: float = 0.0  # at the last step of the cosine
    clip_norm: float | None = 0.25  # maximum 2-norm of the whole gradient; None: no clipping
    precision: Literal["float32", "bfloat16"] = "float32"  # of the computation; the weights stay float32
    device: str = "cpu"  # cpu, cuda, cuda:1, mps, xpu
    seed: int = 0  # of data order and dropout; on the command line also of the initial weights
    log_interval: int = 1  # steps between loss readings; each one waits for the device
    eval_interval: int = 0  # steps between evaluations on the validation split; 0: only at the end
    save_interval: int = 1000  # steps between checkpoints; 0: only at the end

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")


LEAST = dict(
    steps=1, stop_loss=0, batch_size=1, micro_batch_size=1, eps=0, weight_decay=0, warmup_steps=0, min_learning_rate=0,
    log_interval=1, eval_interval=0, save_interval=0,
)  # fmt: skip
CHOICES = dict(optimizer=("adam", "adamw"), schedule=("constant", "cosine"), precision=("float32", "bfloat16"))

# The recipe published with the homework: right, but slow.
PUBLISHED = TrainConfig(
    steps=3000, batch_size=32, learning_rate=3e-3, beta2=0.999, warmup_steps=0, clip_norm=None, eval_interval=25
)
