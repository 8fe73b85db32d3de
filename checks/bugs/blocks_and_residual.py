"""Wrong residual connections, wrong order of the parts in a block, and blocks that do not run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ...transformer.model import Block, KeyValueCache, Rotation, Transformer
from ..check_causality import check_past_reaches_every_later_position
from ..check_contract import check_every_block_matters
from ..check_gradients import check_every_parameter_gets_a_gradient
from ..check_initialization import check_depth_does_not_blow_up
from ..check_parts import check_tokens_get_past_a_silent_part
from ..check_randomness import check_random_branches_keep_their_mean
from ..check_spec import check_logits_agree
from . import bug
from .damage import GPT2, blocks, redefine
from .designs import stochastic_depth

# -- the residual connection


@bug("no residual connection around attention", check_logits_agree, check_tokens_get_past_a_silent_part, **GPT2)
def attention_residual_missing(model: Transformer) -> None:
    def forward(self: Block, x: Tensor, *others: Any) -> Tensor:
        x = self.dropout(self.attention(self.attention_norm(x), *others))
        return self.residual(x, self.feed_forward(self.feed_forward_norm(x)))

    for block in blocks(model):
        redefine(block, forward=forward)


@bug("no residual connection around the feed-forward", check_logits_agree, check_tokens_get_past_a_silent_part, **GPT2)
def feed_forward_residual_missing(model: Transformer) -> None:
    def forward(self: Block, x: Tensor, *others: Any) -> Tensor:
        x = self.residual(x, self.attention(self.attention_norm(x), *others))
        out: Tensor = self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return out

    for block in blocks(model):
        redefine(block, forward=forward)


@bug("the outputs of attention and feed-forward are subtracted instead of added", check_logits_agree, **GPT2)
def residual_subtracted(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block, residual=lambda self, x, update: x - self.dropout(update))


@bug(
    "x + x instead of x + f(x): the outputs of attention and feed-forward are lost",
    check_every_parameter_gets_a_gradient,
    check_past_reaches_every_later_position,
    check_depth_does_not_blow_up,
    source="https://github.com/kyegomez/BitNet/issues/32",
)
def residual_doubled(model: Transformer) -> None:
    class Doubled(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            return x + x

    for block in blocks(model):
        block.__class__ = Doubled


@bug("the residual sum is halved: (x + f(x)) / 2", check_logits_agree, **GPT2)
def residual_halved(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block, residual=lambda self, x, update: (x + self.dropout(update)) / 2)


@bug(
    "attention and feed-forward outputs are divided by √(2 L), as only their init should be", check_logits_agree, **GPT2
)
def update_scaled_by_depth(model: Transformer) -> None:
    factor = (2 * model.config.n_layer) ** -0.5
    for block in blocks(model):
        redefine(block, residual=lambda self, x, update: x + factor * self.dropout(update))


@bug(
    "the residual is taken after the norm: norm(x) + f(norm(x)) instead of x + f(norm(x))",
    check_logits_agree,
    source="https://github.com/Howuhh/faster-trajectory-transformer/issues/3",
    **GPT2,
)
def residual_from_normed_input(model: Transformer) -> None:
    def forward(self: Block, x: Tensor, *others: Any) -> Tensor:
        normed = self.attention_norm(x)
        x = self.residual(normed, self.attention(normed, *others))
        normed = self.feed_forward_norm(x)
        return self.residual(normed, self.feed_forward(normed))

    for block in blocks(model):
        redefine(block, forward=forward)


@bug("the feed-forward's output is added to the block's input: attention's own is lost", check_logits_agree, **GPT2)
def residual_from_the_blocks_input(model: Transformer) -> None:
    def forward(self: Block, x: Tensor, *others: Any) -> Tensor:
        attended = self.residual(x, self.attention(self.attention_norm(x), *others))
        return self.residual(x, self.feed_forward(self.feed_forward_norm(attended)))

    for block in blocks(model):
        redefine(block, forward=forward)


# -- the order of norms, attention and feed-forward


@bug(
    "post-norm instead of pre-norm: each norm follows the residual sum",
    check_logits_agree,
    source="https://github.com/harvardnlp/annotated-transformer/issues/92",
    **GPT2,
)
def post_norm_for_pre_norm(model: Transformer) -> None:
    def forward(self: Block, x: Tensor, *others: Any) -> Tensor:
        x = self.attention_norm(self.residual(x, self.attention(x, *others)))
        out: Tensor = self.feed_forward_norm(self.residual(x, self.feed_forward(x)))
        return out

    for block in blocks(model):
        redefine(block, forward=forward)


@bug("each norm is applied to the output of attention or feed-forward: x + norm(f(x))", check_logits_agree, **GPT2)
def norm_of_the_update(model: Transformer) -> None:
    def forward(self: Block, x: Tensor, *others: Any) -> Tensor:
        x = self.residual(x, self.attention_norm(self.attention(x, *others)))
        return self.residual(x, self.feed_forward_norm(self.feed_forward(x)))

    for block in blocks(model):
        redefine(block, forward=forward)


@bug("attention and feed-forward read the same input in parallel instead of in sequence", check_logits_agree, **GPT2)
def parallel_for_sequential(model: Transformer) -> None:
    def forward(self: Block, x: Tensor, *others: Any) -> Tensor:
        update = self.attention(self.attention_norm(x), *others)
        return self.residual(self.residual(x, update), self.feed_forward(self.feed_forward_norm(x)))

    for block in blocks(model):
        redefine(block, forward=forward)


@bug("the feed-forward comes before attention in every block", check_logits_agree, **GPT2)
def feed_forward_first(model: Transformer) -> None:
    def forward(self: Block, x: Tensor, *others: Any) -> Tensor:
        x = self.residual(x, self.feed_forward(self.feed_forward_norm(x)))
        return self.residual(x, self.attention(self.attention_norm(x), *others))

    for block in blocks(model):
        redefine(block, forward=forward)


@bug(
    "the feed-forward reads attention's normalized input instead of the sum after attention", check_logits_agree, **GPT2
)
def feed_forward_reads_the_first_norm(model: Transformer) -> None:
    def forward(self: Block, x: Tensor, *others: Any) -> Tensor:
        normed = self.attention_norm(x)
        return self.residual(self.residual(x, self.attention(normed, *others)), self.feed_forward(normed))

    for block in blocks(model):
        redefine(block, forward=forward)


# -- the blocks


@bug("the last block is skipped and never trained", check_every_parameter_gets_a_gradient)
def last_block_skipped(model: Transformer) -> None:
    class Skipped(Block):
        def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
            return x

    blocks(model)[-1].__class__ = Skipped


@bug("the loop over the blocks stops before the last", check_every_block_matters)
def block_never_runs(model: Transformer) -> None:
    class Stops(nn.ModuleList):
        def __iter__(self) -> Iterator[nn.Module]:
            return iter(list(super().__iter__())[:-1])

    model.blocks.__class__ = Stops


@bug("the last block runs and its output is discarded", check_every_block_matters)
def block_output_discarded(model: Transformer) -> None:
    class Discards(Block):
        def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
            super().forward(x, rotate, visible, cache)
            return x

    model.blocks[-1].__class__ = Discards


# -- stochastic depth


@bug(
    "stochastic depth leaves out branches of some rows in training and rescales them in neither mode",
    check_random_branches_keep_their_mean,
    of=stochastic_depth,
)
def stochastic_depth_not_rescaled(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block, scale=lambda self: 1.0)
