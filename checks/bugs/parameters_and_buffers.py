"""Parameters and buffers that are not registered, not used, or lost when a model is saved, loaded or copied."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...transformer.model import LearnedPositions, Transformer
from ..check_contract import (
    check_copies_are_independent,
    check_every_tensor_is_registered,
    check_state_dict_restores_the_model,
)
from ..check_distributed import check_two_processes_train_as_one
from ..check_gradients import check_every_parameter_gets_a_gradient
from ..check_spec import check_weights_are_the_familys
from . import bug
from .damage import GPT2, blocks

# -- not registered, or not used


@bug(
    "the head is in a wrapper that is no nn.Module: optimizer and state_dict miss it",
    check_every_tensor_is_registered,
    check_state_dict_restores_the_model,
    source="https://github.com/EleutherAI/gpt-neox/pull/267",
    tied=False,
)
def parameter_outside_module(model: Transformer) -> None:
    class Wrapper:
        def __init__(self, layer: nn.Module) -> None:
            self.layer = layer

        def __call__(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x.to(torch.float32))
            return out.to(x.dtype)

    wrapped = Wrapper(model.head)
    del model.head
    model.head = wrapped  # type: ignore[assignment]


@bug(
    "a table is a plain attribute instead of a buffer: .to() leaves it behind",
    check_every_tensor_is_registered,
    source="https://github.com/OpenNMT/OpenNMT-py/pull/240",
)
def buffer_not_registered(model: Transformer) -> None:
    class Scaled(LearnedPositions):
        scale: Tensor

        def add(self, x: Tensor, positions: Tensor) -> Tensor:
            return super().add(x, positions) * self.scale

    model.positions.__class__ = Scaled
    model.positions.scale = torch.linspace(1, 2, model.config.n_embd)


@bug("every block has a norm that is never used", check_weights_are_the_familys, **GPT2)
def weights_without_a_place(model: Transformer) -> None:
    for block in blocks(model):
        block.output_norm = nn.LayerNorm(model.config.n_embd)


@bug(
    "a second head is left from a loss no longer used: it gets no gradient",
    check_two_processes_train_as_one,
    check_every_parameter_gets_a_gradient,
    source="https://github.com/pytorch/pytorch/issues/43259",
)
def parameter_never_used(model: Transformer) -> None:
    model.second_head = nn.Linear(model.config.n_embd, 2)


# -- saved, loaded and copied


@bug("names in the state_dict depend on the random state: it does not load", check_state_dict_restores_the_model)
def state_dict_does_not_load(parts: SimpleNamespace) -> None:
    build = parts.build_model

    def build_model(**sizes: Any) -> nn.Module:
        model: nn.Module = build(**sizes)
        name = f"scratch_{torch.randint(2**30, ())}"
        model.register_buffer(name, torch.zeros(()))
        return model

    parts.build_model = build_model


@bug(
    "loading a state_dict initializes the loaded weights again",
    check_state_dict_restores_the_model,
    source="https://github.com/huggingface/transformers/pull/45591",
)
def init_reruns_after_load(model: Transformer) -> None:
    class Again(Transformer):
        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            loaded = super().load_state_dict(*args, **kwargs)
            self.initialize()
            return loaded

    model.__class__ = Again


@bug("a deep copy of the model still calls the original's embedding", check_copies_are_independent)
def copy_calls_the_original(model: Transformer) -> None:
    class Original:
        def __init__(self, embedding: nn.Module) -> None:
            self.embedding = embedding

        def __deepcopy__(self, memo: dict[int, Any]) -> Original:
            return self

    class Bound(Transformer):
        original: Original

        def embed(self, tokens: Tensor) -> Tensor:
            x: Tensor = self.original.embedding(tokens)
            return x

    model.__dict__["original"] = Original(model.embedding)
    model.__class__ = Bound
