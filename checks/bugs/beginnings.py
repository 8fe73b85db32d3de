"""Bugs that leave every logit as it is: how weights start, what is held and never read, what is dropped and where.

A declared architecture knows these too; the training that follows is another.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...transformer.model import ExplicitAttention, Transformer
from . import bug
from .architecture import GELU, GPT2, LLAMA, blocks, norms, redefine
from .departures import EXPLICIT_GPT2

GRADIENTS = "check_spec.check_gradients_agree"
TINY = "check_spec.check_tiny_activations_agree"
WEIGHTS = "check_spec.check_weights_are_the_familys"
STARTS = "check_spec.check_initialization_is_the_familys"
SITES = "check_spec.check_dropout_sites_are_the_familys"
CENTRED = "check_initialization.check_matrices_start_centred"
GAINS = "check_initialization.check_gains_do_not_start_around_zero"
SIZE = "check_initialization.check_projections_keep_the_size"
TOKENS = "check_initialization.check_tokens_matter_from_the_start"


@bug("embedding-gradient-by-count", "a token's gradient is divided by how often it occurs (scale_grad_by_freq)",
     caught_by=(GRADIENTS, "check_gradients.check_gradients_equal_finite_differences"), model=True, **GPT2)  # fmt: skip
def embedding_gradient_by_count(model: Transformer) -> None:
    model.embedding.scale_grad_by_freq = True


@bug("norm-epsilon-is-a-floor", "the norm divides by the root of max(mean square, 1e-8): nothing is added to it",
     caught_by=(TINY,), model=True, **LLAMA)  # fmt: skip
def norm_epsilon_is_a_floor(model: Transformer) -> None:
    for norm in norms(model):
        redefine(
            norm, forward=lambda self, x: x * x.square().mean(-1, keepdim=True).clamp(min=1e-8).rsqrt() * self.weight
        )


@bug("norm-epsilon-doubled", "norms add 2e-5, where 1e-5 was meant", caught_by=(TINY,), model=True, **GPT2)
def norm_epsilon_doubled(model: Transformer) -> None:
    for norm in norms(model):
        norm.eps = 2e-5  # type: ignore[assignment]


@bug("weights-without-a-place", "every block holds a norm that nothing reads", caught_by=(WEIGHTS,), model=True, **GPT2)
def weights_without_a_place(model: Transformer) -> None:
    for block in blocks(model):
        block.output_norm = nn.LayerNorm(model.config.n_embd)


@bug("head-is-a-copy", "the head starts as a copy of the embedding and is a parameter of its own",
     caught_by=(WEIGHTS,), model=True, **GPT2)  # fmt: skip
def head_is_a_copy(model: Transformer) -> None:
    model.head.weight = nn.Parameter(model.embedding.weight.detach().clone())


# -- how weights start


@bug("residual-init-unscaled", "what writes to the residual stream starts with 0.02, not with 0.02 / √(2 L)",
     caught_by=(STARTS,), model=True, **GPT2)  # fmt: skip
def residual_init_unscaled(model: Transformer) -> None:
    for block in blocks(model):
        for projection in (block.attention.output, block.feed_forward.output):
            nn.init.normal_(projection.weight, std=0.02)


@bug("residual-init-counts-layers-once", "what writes to the residual stream starts with 0.02 / √L, not 0.02 / √(2 L)",
     caught_by=(STARTS,), model=True, **GPT2)  # fmt: skip
def residual_init_counts_layers_once(model: Transformer) -> None:
    for block in blocks(model):
        for projection in (block.attention.output, block.feed_forward.output):
            nn.init.normal_(projection.weight, std=0.02 * model.config.n_layer**-0.5)


@bug("residual-init-scales-attention-only", "the feed-forward's output projection starts with 0.02, not 0.02 / √(2 L)",
     caught_by=(STARTS,), model=True, **GPT2)  # fmt: skip
def residual_init_scales_attention_only(model: Transformer) -> None:
    for block in blocks(model):
        nn.init.normal_(block.feed_forward.output.weight, std=0.02)


@bug("init-left-to-pytorch", "the matrices of the blocks start as nn.Linear draws them",
     caught_by=(STARTS,), model=True, **GPT2)  # fmt: skip
def init_left_to_pytorch(model: Transformer) -> None:
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()


@bug("bias-init-random", "biases start as nn.Linear draws them, not at zero", caught_by=(STARTS,), model=True, **GPT2)
def bias_init_random(model: Transformer) -> None:
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.uniform_(module.bias, -(module.in_features**-0.5), module.in_features**-0.5)


@bug("gain-init-random", "the norms' gains are drawn around one and do not start at it",
     caught_by=(STARTS,), model=True, **GPT2)  # fmt: skip
def gain_init_random(model: Transformer) -> None:
    for norm in norms(model):
        nn.init.normal_(norm.weight, mean=1.0, std=0.02)  # type: ignore[arg-type]


@bug("init-mean-one", "matrices are drawn around one, as the gains of norms are", caught_by=(CENTRED,), model=True)
def init_mean_one(model: Transformer) -> None:
    for block in blocks(model):
        nn.init.normal_(block.feed_forward.output.weight, mean=1.0, std=0.02)


@bug("gains-redrawn-with-the-matrices", "a loop over all parameters draws the gains of norms around zero too",
     caught_by=(GAINS,), model=True)  # fmt: skip
def gains_redrawn_with_the_matrices(model: Transformer) -> None:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)


@bug("init-scale-inverted", "what writes to the residual stream starts with √(2 L) / 0.02, not with 0.02 / √(2 L)",
     caught_by=(SIZE,), model=True)  # fmt: skip
def init_scale_inverted(model: Transformer) -> None:
    for block in blocks(model):
        for projection in (block.attention.output, block.feed_forward.output):
            nn.init.normal_(projection.weight, std=(2 * model.config.n_layer) ** 0.5 / 0.02)


@bug("init-not-for-the-width", "the feed-forward is drawn with a standard deviation of 1, however wide it is",
     caught_by=(SIZE,), model=True)  # fmt: skip
def init_not_for_the_width(model: Transformer) -> None:
    for block in blocks(model):
        nn.init.normal_(block.feed_forward.output.weight)


@bug("init-constant", "every matrix starts at one constant, so that all features are the same for ever",
     caught_by=(TOKENS,), model=True)  # fmt: skip
def init_constant(model: Transformer) -> None:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.constant_(parameter, 0.02)


@bug("init-zero", "every weight starts at zero, those of norms excepted: no gradient reaches any", caught_by=(TOKENS,),
     model=True)  # fmt: skip
def init_zero(model: Transformer) -> None:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.zeros_(parameter)


# -- what is dropped


@bug("dropout-site-missing", "what the feed-forward gives joins the stream without dropout",
     caught_by=(SITES,), model=True, **GELU)  # fmt: skip
def dropout_site_missing(model: Transformer) -> None:
    for block in blocks(model):
        redefine(
            block,
            forward=lambda self, x, *others: _undropped(
                self, self.residual(x, self.attention(self.attention_norm(x), *others))
            ),
        )


def _undropped(block: nn.Module, x: Tensor) -> Tensor:
    return x + block.feed_forward(block.feed_forward_norm(x))  # type: ignore[operator]


@bug("dropout-twice", "what joins the stream is dropped twice, in the sublayer and in the block",
     caught_by=(SITES,), model=True, **GELU)  # fmt: skip
def dropout_twice(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block, residual=lambda self, x, update: x + self.dropout(self.dropout(update)))


@bug("dropout-before-the-softmax", "attention scores are dropped, not attention weights",
     caught_by=(SITES,), model=True, **EXPLICIT_GPT2)  # fmt: skip
def dropout_before_the_softmax(model: Transformer) -> None:
    def attend(self: ExplicitAttention, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = F.dropout(self.scores(q, k), self.dropout, self.training)
        return scores.masked_fill(hidden if visible is None else ~visible, -torch.inf).softmax(dim=-1) @ v

    for block in blocks(model):
        redefine(block.attention, attend=attend)


@bug("dropout-on-the-norm", "what attention reads is dropped, behind the norm", caught_by=(SITES,), model=True, **GPT2)
def dropout_on_the_norm(model: Transformer) -> None:
    rate = model.config.dropout
    for block in blocks(model):
        redefine(
            block.attention_norm, forward=lambda self, x: F.dropout(nn.LayerNorm.forward(self, x), rate, self.training)
        )


@bug("dropout-inside-the-feed-forward", "what the activation gives is dropped too, as in the first transformer",
     caught_by=(SITES,), model=True, **GELU)  # fmt: skip
def dropout_inside_the_feed_forward(model: Transformer) -> None:
    rate = model.config.dropout
    for block in blocks(model):
        redefine(
            block.feed_forward,
            activation=lambda self, x: F.dropout(F.gelu(x, approximate="tanh"), rate, self.training),
        )
