"""Bugs of what a model holds: its weights at the start, ties, buffers, devices, and the gradients of its ends."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...transformer.model import Block, KeyValueCache, LearnedPositions, Rotation, Transformer
from . import bug

LOSS = "check_initialization.check_loss_starts_near_uniform"
LAYERS = "check_initialization.check_layers_start_different"
SEED = "check_initialization.check_seed_decides_the_weights"
REACH = "check_gradients.check_every_parameter_gets_a_gradient"
SLOPES = "check_gradients.check_gradients_equal_finite_differences"
TRAINING_SLOPES = "check_gradients.check_training_gradients_equal_finite_differences"
REGISTERED = "check_contract.check_every_tensor_is_registered"
RESTORED = "check_contract.check_state_dict_restores_the_model"
TIES = "check_contract.check_ties_survive"
DEVICE = "check_portability.check_forward_stays_on_its_device"


# -- weights at the start


@bug(
    "init-std-one",
    "the token embedding keeps nn.Embedding's own standard deviation of 1, and the head is tied to it",
    source="https://github.com/syncdoth/RetNet/issues/31",
    caught_by=(LOSS,),
    model=True,
)
def initial_deviation_of_one(model: Transformer) -> None:
    nn.init.normal_(model.embedding.weight)


@bug("logits-multiplied-by-width", "the logits are multiplied by √C, not divided: the first guess is far too sure",
     caught_by=(LOSS,), model=True)  # fmt: skip
def logits_multiplied(model: Transformer) -> None:
    class Multiplied(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * x.shape[-1]

    model.head.__class__ = Multiplied


@bug(
    "layers-identical-at-init",
    "one layer is built and copied: all start from the same weights",
    source="https://github.com/pytorch/pytorch/issues/86274",
    caught_by=(LAYERS,),
    model=True,
)
def layers_identical(model: Transformer) -> None:
    first = model.blocks[0]
    for block in model.blocks[1:]:
        block.load_state_dict(copy.deepcopy(first.state_dict()))


@bug("every-layer-seeded-alike", "each block seeds the generator before it draws its weights: all draw the same",
     caught_by=(SEED,), model=True)  # fmt: skip
def every_layer_seeded(model: Transformer) -> None:
    for block in model.blocks:
        torch.manual_seed(1337)
        for parameter in block.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)


@bug("constructor-seeds", "the constructor calls torch.manual_seed(42): every seed gives the same model",
     caught_by=(SEED,))  # fmt: skip
def constructor_seeds(parts: SimpleNamespace) -> None:
    build = parts.build_model

    def seeded(**sizes: Any) -> nn.Module:
        torch.manual_seed(42)
        return build(**sizes)

    parts.build_model = seeded


@bug("weights-from-their-own-generator", "weights are drawn from a generator seeded by the clock",
     caught_by=(SEED,), model=True)  # fmt: skip
def weights_from_their_own_generator(model: Transformer) -> None:
    generator = torch.Generator()
    generator.seed()
    nn.init.normal_(model.embedding.weight, std=0.02, generator=generator)


# -- parameters, ties, buffers, devices


@bug(
    "parameter-outside-module",
    "the head is held by a wrapper that is no nn.Module: no optimizer sees it, no state_dict saves it",
    source="https://github.com/EleutherAI/gpt-neox/pull/267",
    caught_by=(REGISTERED, RESTORED),
    model=True,
    tied=False,
)
def parameter_outside(model: Transformer) -> None:
    class Wrapper:
        def __init__(self, layer: nn.Module) -> None:
            self.layer = layer

        def __call__(self, x: Tensor) -> Tensor:
            return self.layer(x.to(torch.float32)).to(x.dtype)

    wrapped = Wrapper(model.head)
    del model.head
    model.head = wrapped  # type: ignore[assignment]


@bug(
    "tied-weights-broken",
    "the head starts as a copy of the embedding: one more table, which drifts away",
    source="https://github.com/TransformerLensOrg/TransformerLens/issues/1725",
    caught_by=(TIES,),
    model=True,
)
def tied_weights_broken(model: Transformer) -> None:
    model.head.weight = nn.Parameter(model.embedding.weight.detach().clone())


@bug(
    "tie-lost-by-wrapping",
    "converting the model converts head and embedding one by one, each into a parameter of its own",
    source="https://github.com/NVIDIA-NeMo/Automodel/pull/2213",
    caught_by=(TIES,),
    model=True,
)
def tie_lost(model: Transformer) -> None:
    class Parted(Transformer):
        def double(self) -> Self:
            super().double()
            self.head.weight = nn.Parameter(self.head.weight.detach().clone())
            return self

    model.__class__ = Parted


@bug(
    "init-reruns-after-load",
    "loading a state_dict initializes again what was loaded",
    source="https://github.com/huggingface/transformers/pull/45591",
    caught_by=(RESTORED,),
    model=True,
)
def initialized_after_load(model: Transformer) -> None:
    class Again(Transformer):
        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            loaded = super().load_state_dict(*args, **kwargs)
            self.initialize()
            return loaded

    model.__class__ = Again


@bug(
    "buffer-not-registered",
    "a table is a plain attribute: .to() leaves it behind",
    source="https://github.com/OpenNMT/OpenNMT-py/pull/240",
    caught_by=(REGISTERED,),
    model=True,
)
def buffer_not_registered(model: Transformer) -> None:
    class Scaled(LearnedPositions):
        def add(self, x: Tensor, positions: Tensor) -> Tensor:
            return super().add(x, positions) * self.scale  # type: ignore[operator]

    model.positions.__class__ = Scaled
    model.positions.scale = torch.linspace(1, 2, model.config.n_embd)


@bug(
    "device-hardcoded",
    "positions are made on the default device: the forward fails anywhere else",
    source="https://github.com/mlverse/torch/pull/1473",
    caught_by=(DEVICE,),
    model=True,
)
def device_hardcoded(model: Transformer) -> None:
    class OnDefaultDevice(Transformer):
        def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
            return torch.arange(S - T, S) if mask is None else super().token_positions(mask, T, S, device)

    model.__class__ = OnDefaultDevice


# -- gradients of both ends


@bug(
    "embedding-no-grad",
    "the embedding is read under no_grad: only the head's side of the tied table trains",
    source="https://github.com/ml-jku/helm/issues/3",
    caught_by=(SLOPES,),
    model=True,
)
def embedding_without_gradient(model: Transformer) -> None:
    class Frozen(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            with torch.no_grad():
                return super().embed(tokens)

    model.__class__ = Frozen


@bug("untied-embedding-no-grad", "the embedding is read under no_grad: the table never trains",
     source="https://github.com/ml-jku/helm/issues/3", caught_by=(REACH,), model=True, tied=False)  # fmt: skip
def untied_embedding_without_gradient(model: Transformer) -> None:
    embedding_without_gradient(model)


@bug("head-detached", "the logits are products with the detached embedding: only its input side trains",
     caught_by=(SLOPES,), model=True)  # fmt: skip
def head_detached(model: Transformer) -> None:
    class Detached(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.detach())

    model.head.__class__ = Detached


@bug("tie-by-storage", "head and embedding are two parameters on one storage: each gets a part of the gradient",
     caught_by=(TIES,), model=True)  # fmt: skip
def tie_by_storage(model: Transformer) -> None:
    model.head.weight = nn.Parameter(model.embedding.weight.detach())


@bug(
    "checkpoint-recompute-rng",
    "activation checkpointing computes the block again under another random state, with other dropout masks",
    source="https://github.com/allenai/OLMo-core/pull/828",
    caught_by=(TRAINING_SLOPES,),
    model=True,
)
def recomputed_under_another_state(model: Transformer) -> None:
    class Recomputed(Block):
        def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
            if not self.training:
                return super().forward(x, rotate, visible, cache)
            return checkpoint(super().forward, x, rotate, visible, cache, use_reentrant=False, preserve_rng_state=False)

    for block in model.blocks:
        block.__class__ = Recomputed
