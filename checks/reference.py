"""The reference of this project as a subject, and its parts, to be replaced one at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn

from ..transformer import checkpoint, data, generation, loss, trainer
from ..transformer.model import ModelConfig, Transformer
from .subject import Option, Subject


def reference(**declared: Any) -> Subject:
    """The reference as a subject; `declared` are a seed, a device and so on, as of `Subject`."""
    return Subject("transformer", reference_parts(), **declared)


def reference_parts(*, spec: str | None = None, **config: Any) -> SimpleNamespace:
    """The parts of the reference, to be replaced one at a time; `config` fixes fields of its ModelConfig.

    `spec` is the architecture that they declare to be, "gpt2" or "llama"; by default they declare none.
    """

    def build_model(**sizes: Any) -> nn.Module:
        return Transformer(ModelConfig(**{**config, **sizes}))

    used = ModelConfig(**config).positions != "learned"
    return SimpleNamespace(
        build_model=build_model,
        options=(
            Option("norm_eps", ModelConfig.norm_eps, (0.1, 1e-3)),
            *((Option("rope_base", ModelConfig.rope_base, (100.0, 1e6)),) if used else ()),
        ),
        loss=loss.next_token_loss,
        generate=generation.generate,
        objective=trainer.next_token_objective,
        trainer=trainer.Trainer,
        pad_batch=data.pad_batch,
        save=checkpoint.save,
        load=checkpoint.load,
        load_weights=checkpoint.load_weights,
        declares=dict(
            spec=spec,
            called="loss(logits, targets, mask)", shift=0, skip=0, reduction="mean", empty=0.0, smoothing=0.0,
            pad=None, float32=True,  # so far the loss
            clip="norm", decay="matrices", order="every example once an epoch",  # the training
        ),
    )  # fmt: skip
