"""A subject's generate in a setting where the right answer is known: its model's logits are rewritten by a script.

Under the script every sampler is greedy, or every distribution is known. The model itself still runs, cache included;
the naive loop (read the whole text, take the likeliest token) gives the right answer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..expect import NotApplicable
from ..probes.precision import Coarsest, precision
from ..subject import Companion, Subject
from .calls import Read, Script, find_logits_module, watched
from .met_generate import Decoder, Rows, decoder

STEP = 30.0  # nats between a token and the next likeliest under the script: a token of probability e^-30 is never drawn
MANY, FEW = 64, 3  # vocabulary size up to which every id is tried; how many ids a generate may ban
# torch.topk's own words, for a sampler that keeps more tokens than exist; and enough ids for the usual 40 to 200.
TOO_MANY, ROOM = "selected index k out of range", 256
RANKS = 20  # likeliest tokens that keep their order; all others are equally unlikely
# Standard deviations of the logits within which two tokens may swap, by the coarsest type on the way.
TIE = {torch.float64: 1e-7, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
VARIES = "the model returns different logits for the same text from call to call, in eval mode"


def ranked(logits: Tensor, tokens: Tensor | None, banned: tuple[int, ...] = ()) -> Tensor:
    """The tokens in the same order, 30 nats apart, the token just read last: every sampler becomes greedy.

    If the token just read could follow itself, a tied model would repeat one token for ever and hide every mistake.
    """
    scores = logits.detach().double().clone()
    scores[..., list(banned)] = -torch.inf
    if tokens is not None and tokens.shape[-1] >= scores.shape[-2]:
        read = tokens[..., tokens.shape[-1] - scores.shape[-2] :]
        scores.scatter_(-1, read.reshape(*scores.shape[:-1], 1), -torch.inf)
    likeliest = scores.topk(min(RANKS, scores.shape[-1]), dim=-1).indices
    rank = torch.full_like(scores, RANKS)
    rank.scatter_(-1, likeliest, torch.arange(likeliest.shape[-1]).to(rank).expand_as(likeliest))
    return (-STEP * rank).log_softmax(dim=-1).to(logits)


def dealt(scores: Tensor) -> Script:
    """The same logits [B, V] after every text, by row; a row beyond B starts again at the first."""

    def script(logits: Tensor, tokens: Tensor | None) -> Tensor:
        mine = scores.to(logits)[torch.arange(logits.shape[0] if logits.dim() > 1 else 1) % len(scores)]
        if logits.dim() == 3:
            mine = mine[:, None]
        return mine.expand_as(logits).clone() if logits.dim() > 1 else mine[0].clone()

    return script


@dataclass
class Stage:
    """A model of the subject, its generate, and what is needed to know the right answer."""

    subject: Subject
    model: nn.Module
    decoder: Decoder
    logits_module: str  # the outermost module that returns logits
    vocab_size: int  # of the logits
    tie: float  # two tokens nearer than this may swap; in standard deviations of the logits
    banned: tuple[int, ...] = ()  # ids that generate never produces: it takes the next likeliest instead
    script: Script = ranked
    sees_tokens: bool = True  # whether the script is told the tokens that the logits follow
    reads: list[Read] = field(default_factory=list)

    @property
    def block_size(self) -> int:
        return self.subject.sizes.block_size

    @property
    def reads_one(self) -> bool:
        """Whether the model reads a text of a single token; those that refuse it are not blamed for that."""
        try:
            self.ask(self.subject.tokens(1, 1))
        except Exception:
            return False
        return True

    def generate(self, prompts: Tensor | Rows, n: int, **options: Any) -> Rows:
        """The new tokens from the subject's generate, under the script; `reads` are then its calls of the model."""
        with self.watching():
            return self.decoder(self.model, prompts, n, **options)

    def greedy(self, prompts: Tensor | Rows, n: int, **options: Any) -> Rows:
        """The same, by the greedy option where generate has one; under the script sampling gives the same."""
        if {"sample", "greedy"} & self.decoder.takes.keys():
            options["sample"] = False
        return self.generate(prompts, n, **options)

    @contextmanager
    def watching(self) -> Iterator[None]:
        with watched(self.model, self.logits_module, self.vocab_size, self.script) as self.reads:
            yield

    @property
    def cache_options(self) -> list[dict[str, bool]]:
        """With the cache and without, if generate has an option for it; otherwise as it is."""
        if "use_cache" in self.decoder.takes and isinstance(self.decoder.defaults.get("use_cache", False), bool):
            return [{"use_cache": True}, {"use_cache": False}]
        return [{}]

    def naive(self, prompts: Tensor, n: int) -> Tensor:
        """The right answer [B, n]: each step reads the last block from scratch and takes the likeliest token."""
        return self.naively(prompts, n)[0]

    def naively(self, prompts: Tensor, n: int) -> tuple[Tensor, float]:
        """The right answer, and its smallest lead over a next likeliest token, in standard deviations of the logits."""
        text, lead = prompts, float("inf")
        for _ in range(n):
            logits = self.ask(text[:, -self.block_size :])
            lead = min(lead, narrowest(logits, text[:, -1] if self.sees_tokens else None))
            text = torch.cat((text, self.follow(logits, text)[:, None]), dim=1)
        return text[:, prompts.shape[1] :], lead

    def follow(self, logits: Tensor, text: Tensor) -> Tensor:
        """The token [B] that the script makes the likeliest after the text, from the model's own logits [B, V]."""
        latest = text[:, -1:] if self.sees_tokens else None
        return self.script(logits[:, None], latest)[:, -1].argmax(dim=-1)

    @torch.no_grad()
    def ask(self, text: Tensor) -> Tensor:
        """The model's own logits [B, V] for the token after the text, read as a whole and without a cache."""
        return self.subject.logits(self.model, text)[:, -1]

    def prompts(self, B: int, T: int, n: int) -> Tensor:
        """Random prompts [B, T] after which rounding cannot change any step of the naive loop."""
        for draw in range(8):
            prompts = self.subject.tokens(B, T, seed=self.subject.seed + 100 * draw + B)
            if self.naively(prompts, n)[1] > self.tie:
                return prompts
        raise NotApplicable("after every prompt tried, two tokens are almost equally likely at some step", tried=8)


def narrowest(logits: Tensor, latest: Tensor | None) -> float:
    """The smallest lead of a row's likeliest token over the next, in deviations; the token just read does not count."""
    others = logits.double() if latest is None else logits.double().scatter(-1, latest[:, None], -torch.inf)
    top = others.topk(2, dim=-1).values
    return float((top[:, 0] - top[:, 1]).min() / logits.double().std())


def stage(subject: Subject, further: Companion | None = None, **sizes: Any) -> Stage:
    """The subject's generate, or a further function of its, with a model of strong weights, in float64 if it can.

    Raises NotApplicable if there is no generate, or none whose model can be watched.
    """
    known = subject.once(learn, further)
    asked: dict[str, Any] = {**known.sizes, **sizes}
    model = subject.amplified(seed=subject.seed, dtype=known.dtype, **asked)
    script = functools.partial(ranked, banned=known.banned) if known.banned else ranked
    return Stage(
        subject, model, known.decoder, known.logits_module, known.vocab_size, known.tie, known.banned, script,
        known.sees_tokens,
    )  # fmt: skip


@dataclass(frozen=True)
class Known:
    """What is found out once per subject."""

    decoder: Decoder
    logits_module: str
    vocab_size: int
    dtype: torch.dtype
    tie: float
    banned: tuple[int, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)  # sizes that have to be larger than the subject's
    sees_tokens: bool = True


def learn(subject: Subject, further: Companion | None = None) -> Known:
    """A sampler that always keeps its 50 likeliest tokens is given a larger vocabulary than ours."""
    try:
        return learn_at(subject, further)
    except RuntimeError as error:
        if TOO_MANY not in str(error) or not subject.can_vary("vocab_size"):
            raise
        return learn_at(subject, further, vocab_size=ROOM)


def learn_at(subject: Subject, further: Companion | None = None, **sizes: int) -> Known:
    """A generate that fails in float64 is tried in float32; an error there is passed on."""
    found = precision(subject)
    try:
        return meet(subject, further, found.dtype, found.inside, **sizes)
    except NotApplicable:
        raise
    except Exception as error:
        if found.dtype == torch.float32 or TOO_MANY in str(error):
            raise
        return meet(subject, further, torch.float32, torch.float32, **sizes)


def meet(subject: Subject, further: Companion | None, dtype: torch.dtype, inside: torch.dtype, **sizes: Any) -> Known:
    model, text = subject.amplified(seed=subject.seed, dtype=dtype, **sizes), subject.tokens(2, 3)
    with torch.no_grad():
        logits, again = subject.logits(model, text), subject.logits(model, text)
    if not torch.allclose(logits, again, rtol=0, atol=1e-4 * float(logits.std()), equal_nan=True):
        raise NotApplicable(VARIES)
    V = logits.shape[-1]
    if subject.width > V:
        raise NotApplicable(
            f"the logits have {subject.width} entries, one of them for padding, which generate could choose"
        )
    calls = decoder(subject, model, V, further)
    with Coarsest(inside) as seen:
        name, sees_tokens = find_logits_module(model, calls, V)
    banned = find_banned(subject, model, calls, name, V)
    return Known(calls, name, V, dtype, TIE[seen.dtype], banned, sizes, sees_tokens)


def find_banned(subject: Subject, model: nn.Module, calls: Decoder, name: str, V: int) -> tuple[int, ...]:
    """Ids that generate does not produce although they are by far the likeliest: it takes the next likeliest."""
    if V > MANY:
        return ()
    ids = torch.arange(V)
    scores = torch.zeros(V, V, dtype=torch.float64)
    scores[ids, ids], scores[ids, (ids + 1) % V] = 2 * STEP, STEP
    chosen = []
    try:
        for row in range(0, V, V if calls.batched else 1):
            mine = scores if calls.batched else scores[row : row + 1]
            with watched(model, name, V, dealt(mine)):
                chosen += [new[0] for new in calls(model, subject.tokens(len(mine), 2), 1)]
    except Exception:
        return ()  # the checks will run into the same error
    found = tuple(i for i, token in enumerate(chosen) if token == (i + 1) % V)
    others = [i for i, token in enumerate(chosen) if token != i and i not in found]
    return () if others or len(found) > FEW else found
