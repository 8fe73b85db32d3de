"""Wrong initialization: deviations, means, and draws that layers share or that the seed does not decide."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ...transformer.model import Transformer
from ..check_initialization import (
    check_gains_do_not_start_around_zero,
    check_layers_start_different,
    check_loss_starts_near_uniform,
    check_matrices_start_centred,
    check_projections_keep_the_size,
    check_seed_decides_the_weights,
    check_tokens_matter_from_the_start,
)
from ..check_spec import check_initialization_is_the_familys
from . import bug
from .damage import GPT2, blocks, norms

# -- the deviation


@bug(
    "embedding and tied head keep nn.Embedding's std of 1",
    check_loss_starts_near_uniform,
    source="https://github.com/syncdoth/RetNet/issues/31",
)
def init_std_one(model: Transformer) -> None:
    nn.init.normal_(model.embedding.weight)


@bug("output projections start with std 0.02 instead of 0.02 / √(2 L)", check_initialization_is_the_familys, **GPT2)
def residual_init_unscaled(model: Transformer) -> None:
    for block in blocks(model):
        for projection in (block.attention.output, block.feed_forward.output):
            nn.init.normal_(projection.weight, std=0.02)


@bug("output projections start with std 0.02 / √L, not 0.02 / √(2 L)", check_initialization_is_the_familys, **GPT2)
def residual_init_counts_layers_once(model: Transformer) -> None:
    for block in blocks(model):
        for projection in (block.attention.output, block.feed_forward.output):
            nn.init.normal_(projection.weight, std=0.02 * model.config.n_layer**-0.5)


@bug("the feed-forward's output starts with std 0.02, not 0.02 / √(2 L)", check_initialization_is_the_familys, **GPT2)
def residual_init_scales_attention_only(model: Transformer) -> None:
    for block in blocks(model):
        nn.init.normal_(block.feed_forward.output.weight, std=0.02)


@bug("output projections start with std √(2 L) / 0.02 instead of 0.02 / √(2 L)", check_projections_keep_the_size)
def init_scale_inverted(model: Transformer) -> None:
    for block in blocks(model):
        for projection in (block.attention.output, block.feed_forward.output):
            nn.init.normal_(projection.weight, std=(2 * model.config.n_layer) ** 0.5 / 0.02)


@bug("the feed-forward's output projection starts with std 1, whatever its width", check_projections_keep_the_size)
def init_not_for_the_width(model: Transformer) -> None:
    for block in blocks(model):
        nn.init.normal_(block.feed_forward.output.weight)


@bug("the blocks' matrices keep the default initialization of nn.Linear", check_initialization_is_the_familys, **GPT2)
def init_left_to_pytorch(model: Transformer) -> None:
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()


@bug("biases keep the random initialization of nn.Linear instead of zero", check_initialization_is_the_familys, **GPT2)
def bias_init_random(model: Transformer) -> None:
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.uniform_(module.bias, -(module.in_features**-0.5), module.in_features**-0.5)


@bug("the norms' gains are drawn around one instead of set to one", check_initialization_is_the_familys, **GPT2)
def gain_init_random(model: Transformer) -> None:
    for norm in norms(model):
        nn.init.normal_(norm.weight, mean=1.0, std=0.02)


# -- the mean


@bug("matrices are drawn around one, as the gains of norms are", check_matrices_start_centred)
def init_mean_one(model: Transformer) -> None:
    for block in blocks(model):
        nn.init.normal_(block.feed_forward.output.weight, mean=1.0, std=0.02)


@bug("the norms' gains are drawn around zero, in a loop over all parameters", check_gains_do_not_start_around_zero)
def gains_redrawn_with_the_matrices(model: Transformer) -> None:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)


@bug("every matrix starts as one constant: all features stay the same", check_tokens_matter_from_the_start)
def init_constant(model: Transformer) -> None:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.constant_(parameter, 0.02)


@bug("every matrix starts at zero: no gradient reaches any of them", check_tokens_matter_from_the_start)
def init_zero(model: Transformer) -> None:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.zeros_(parameter)


# -- layers and seeds


@bug(
    "all layers start from the same weights, copied from one",
    check_layers_start_different,
    source="https://github.com/pytorch/pytorch/issues/86274",
)
def layers_identical_at_init(model: Transformer) -> None:
    first = model.blocks[0]
    for block in blocks(model)[1:]:
        block.load_state_dict(copy.deepcopy(first.state_dict()))


@bug("every block seeds the generator before it draws its weights: all draw the same", check_seed_decides_the_weights)
def every_layer_seeded_alike(model: Transformer) -> None:
    for block in blocks(model):
        torch.manual_seed(1337)
        for parameter in block.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)


@bug("the constructor calls torch.manual_seed(42): every seed gives the same model", check_seed_decides_the_weights)
def constructor_seeds(parts: SimpleNamespace) -> None:
    build = parts.build_model

    def seeded(**sizes: Any) -> nn.Module:
        torch.manual_seed(42)
        model: nn.Module = build(**sizes)
        return model

    parts.build_model = seeded


@bug("weights are drawn from a generator seeded by the clock: no seed repeats them", check_seed_decides_the_weights)
def weights_from_their_own_generator(model: Transformer) -> None:
    generator = torch.Generator()
    generator.seed()
    nn.init.normal_(model.embedding.weight, std=0.02, generator=generator)
