"""A subject's generate on a stage where the right answer is known: its model's logits watched, or written by a script.

A script turns the logits of a call, so that every sampler is greedy or every distribution is known; the model itself
still runs, cache and all. The naive loop beside it is the right answer.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..expect import NotApplicable
from ..probes.cached import Coarsest
from ..probes.precision import precision
from ..subject import Subject
from .met_generate import NAMES, Decoder, Rows, decoder

# Logits [..., V] and the tokens they follow, if known, to logits of the same shape.
Script = Callable[[Tensor, Tensor | None], Tensor]

STEP = 30.0  # nats between a token and the next likeliest on the stage: e^-30 is never drawn
MANY, FEW = 64, 3  # tokens of a vocabulary that are all tried; tokens that a generate may never say
# torch.topk's own words, for a sampler that keeps more tokens than there are; and ids enough for the usual 40 to 200.
TOO_MANY, ROOM = "selected index k out of range", 256
RANKS = 20  # likeliest tokens that keep their order; the others are all as unlikely
# Deviations of the logits: two tokens nearer than that may swap, by the coarsest type on the way.
TIE = {torch.float64: 1e-7, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
CACHES = {"cache", "past_key_values", "past_kv", "past_kvs", "kv_cache", "kv_caches", "layer_past", "past", "input_pos"}


def ranked(logits: Tensor, tokens: Tensor | None, banned: tuple[int, ...] = ()) -> Tensor:
    """The same order of tokens in steps of 30 nats, the token just read last: every sampler becomes greedy.

    Without the latter a tied model says one token for ever, and nothing could be told apart.
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
    """The same logits [B, V] after every text, by row; rows beyond B begin again."""

    def script(logits: Tensor, tokens: Tensor | None) -> Tensor:
        mine = scores.to(logits)[torch.arange(logits.shape[0] if logits.dim() > 1 else 1) % len(scores)]
        if logits.dim() == 3:
            mine = mine[:, None]
        return mine.expand_as(logits).clone() if logits.dim() > 1 else mine[0].clone()

    return script


@dataclass
class Read:
    """One call of the model by a generate: what it read and what it was answered, as the script had it."""

    tokens: Tensor | None  # [B, T]
    logits: Tensor  # [B, T or 1, V]
    cached: bool  # whether something like a cache was handed in
    masked: bool  # whether something like a padding mask was
    training: bool  # whether any module was in train mode


@dataclass
class Stage:
    """A model of the subject, its generate, and what is needed to know what that should say."""

    subject: Subject
    model: nn.Module
    decoder: Decoder
    speaker: str  # the outermost module that answers with logits
    vocab_size: int  # of the logits
    tie: float  # deviations of the logits: two tokens nearer than that may swap
    banned: tuple[int, ...] = ()  # ids that generate never says, and passes over to the next likeliest
    script: Script = ranked
    reads: list[Read] = field(default_factory=list)

    @property
    def block_size(self) -> int:
        return self.subject.sizes.block_size

    @property
    def reads_one(self) -> bool:
        """Whether the model reads a text of a single token; some refuse that, and are not blamed for it."""
        try:
            self.ask(self.subject.tokens(1, 1))
        except Exception:
            return False
        return True

    def generate(self, prompts: Tensor | Rows, n: int, **options: Any) -> Rows:
        """What the subject's generate says, its model speaking by the script; `reads` are then its calls."""
        with self.watching():
            return self.decoder(self.model, prompts, n, **options)

    @contextmanager
    def watching(self) -> Iterator[None]:
        with watched(self.model, self.speaker, self.vocab_size, self.script) as self.reads:
            yield

    def naive(self, prompts: Tensor, n: int) -> Tensor:
        """The right answer [B, n]: each step reads the last block anew and takes the likeliest token."""
        return self.naively(prompts, n)[0]

    def naively(self, prompts: Tensor, n: int) -> tuple[Tensor, float]:
        """The right answer, and the narrowest lead of a token in it, in deviations of the logits."""
        text, lead = prompts, float("inf")
        for _ in range(n):
            logits = self.ask(text[:, -self.block_size :])
            lead = min(lead, narrowest(logits, text[:, -1]))
            text = torch.cat((text, self.script(logits[:, None], text[:, -1:])[:, -1].argmax(dim=-1)[:, None]), dim=1)
        return text[:, prompts.shape[1] :], lead

    @torch.no_grad()
    def ask(self, text: Tensor) -> Tensor:
        """The model's own logits [B, V] for the token after the text, read whole and without a cache."""
        return self.subject.logits(self.model, text)[:, -1]

    def prompts(self, B: int, T: int, n: int) -> Tensor:
        """Random prompts [B, T] after which no step of the naive loop is a tie to rounding."""
        for draw in range(8):
            prompts = self.subject.tokens(B, T, seed=self.subject.seed + 100 * draw + B)
            if self.naively(prompts, n)[1] > self.tie:
                return prompts
        raise NotApplicable("every prompt tried leads to a near tie of two tokens", tried=8)


def narrowest(logits: Tensor, latest: Tensor) -> float:
    """The least lead of a row's likeliest token over the next, in deviations; the token just read does not count."""
    others = logits.double().scatter(-1, latest[:, None], -torch.inf)
    top = others.topk(2, dim=-1).values
    return float((top[:, 0] - top[:, 1]).min() / logits.double().std())


def stage(subject: Subject, **sizes: Any) -> Stage:
    """The subject's generate with a model of strong weights, in float64 where the model can.

    Raises NotApplicable where there is no generate, or none whose model can be watched.
    """
    known = subject.once(learn)
    model = subject.amplified(seed=subject.seed, dtype=known.dtype, **{**known.sizes, **sizes})
    script = functools.partial(ranked, banned=known.banned) if known.banned else ranked
    return Stage(
        subject, model, known.decoder, known.speaker, known.vocab_size, known.tie, known.banned, script,
    )  # fmt: skip


@dataclass(frozen=True)
class Known:
    """What is learned of a subject once."""

    decoder: Decoder
    speaker: str
    vocab_size: int
    dtype: torch.dtype
    tie: float
    banned: tuple[int, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)  # what the model must have more of than the subject has


def learn(subject: Subject) -> Known:
    """A sampler that keeps its 50 likeliest tokens, whatever the vocabulary, is met with a larger one than ours."""
    try:
        return learn_at(subject)
    except RuntimeError as error:
        if TOO_MANY not in str(error) or not subject.can_vary("vocab_size"):
            raise
        return learn_at(subject, vocab_size=ROOM)


def learn_at(subject: Subject, **sizes: int) -> Known:
    """A generate that dies in float64 is met in float32; what it raises there passes through."""
    found = precision(subject)
    try:
        return meet(subject, found.dtype, found.inside, **sizes)
    except NotApplicable:
        raise
    except Exception as error:
        if found.dtype == torch.float32 or TOO_MANY in str(error):
            raise
        return meet(subject, torch.float32, torch.float32, **sizes)


def meet(subject: Subject, dtype: torch.dtype, inside: torch.dtype, **sizes: int) -> Known:
    model, text = subject.amplified(seed=subject.seed, dtype=dtype, **sizes), subject.tokens(2, 3)
    with torch.no_grad():
        logits, again = subject.logits(model, text), subject.logits(model, text)
    if not torch.allclose(logits, again, rtol=0, atol=1e-4 * float(logits.std()), equal_nan=True):
        raise NotApplicable("the model answers the same text differently from call to call, in eval mode")
    V = logits.shape[-1]
    calls = decoder(subject, model, V)
    with Coarsest(inside) as seen:
        speaker = find_speaker(model, calls, V)
    banned = find_banned(subject, model, calls, speaker, V)
    return Known(calls, speaker, V, dtype, TIE[seen.dtype], banned, sizes)


def find_banned(subject: Subject, model: nn.Module, calls: Decoder, speaker: str, V: int) -> tuple[int, ...]:
    """Ids that are never said although they are the likeliest by far: the next likeliest is said in their place."""
    if V > MANY:
        return ()
    ids = torch.arange(V)
    scores = torch.zeros(V, V, dtype=torch.float64)
    scores[ids, ids], scores[ids, (ids + 1) % V] = 2 * STEP, STEP
    said = []
    try:
        for row in range(0, V, V if calls.batched else 1):
            mine = scores if calls.batched else scores[row : row + 1]
            with watched(model, speaker, V, dealt(mine)):
                said += [new[0] for new in calls(model, subject.tokens(len(mine), 2), 1)]
    except Exception:
        return ()  # whatever it is, the checks will meet it
    found = tuple(i for i, token in enumerate(said) if token == (i + 1) % V)
    others = [i for i, token in enumerate(said) if token != i and i not in found]
    return () if others or len(found) > FEW else found


def find_speaker(model: nn.Module, calls: Decoder, V: int) -> str:
    """The outermost module whose forward answers with logits while generate runs."""
    depth = 0
    found: dict[str, int] = {}

    def wrap(name: str, module: nn.Module) -> None:
        forward = module.forward

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                answer = forward(*args, **kwargs)
            finally:
                depth -= 1
            if find_logits(answer, V) is not None:
                found[name] = min(depth, found.get(name, depth))
            return answer

        module.__dict__["forward"] = wrapped

    modules = list(model.named_modules())
    try:
        for name, module in modules:
            wrap(name, module)
        calls(model, [[0, 1]], 2)
    finally:
        for _, module in modules:
            module.__dict__.pop("forward", None)
    if not found:
        raise NotApplicable(f"{calls.name} calls no module of the model it is given that answers with logits")
    return min(found, key=lambda name: found[name])


@contextmanager
def watched(model: nn.Module, speaker: str, V: int, script: Script) -> Iterator[list[Read]]:
    """Records the calls of the module that speaks, whose logits the script turns."""
    reads: list[Read] = []
    module = model.get_submodule(speaker)
    forward = module.forward

    @functools.wraps(forward)  # a generate may look up what its model's forward takes: positions, a mask
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        answer = forward(*args, **kwargs)
        tokens, said = read_tokens(args, kwargs), torch.empty(0)

        def turn(logits: Tensor) -> Tensor:
            nonlocal said
            said = script(logits, tokens)
            return said + 0 * logits.nan_to_num() if logits.requires_grad else said

        answer = replace_logits(answer, V, turn)
        cached = any(value is not None and name in CACHES for name, value in kwargs.items())
        masked = any(value is not None and name in NAMES["mask"] for name, value in kwargs.items())
        masked = masked or any(isinstance(value, Tensor) and value.dim() > 1 for value in args[1:])
        reads.append(Read(tokens, said, cached, masked, any(m.training for m in model.modules())))
        return answer

    module.__dict__["forward"] = wrapped
    try:
        yield reads
    finally:
        module.__dict__.pop("forward", None)


@contextmanager
def graphs(model: nn.Module) -> Iterator[list[int]]:
    """How many autograd graphs of the embeddings' calls are alive, at each such call."""
    alive: list[int] = []
    held: weakref.WeakSet[Sentinel] = weakref.WeakSet()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)][:1]

    def wrap(forward: Callable) -> Callable:
        def wrapped(tokens: Tensor) -> Tensor:
            vectors = forward(tokens)
            marked = Marked.apply(vectors, held) if vectors.requires_grad else vectors
            alive.append(len(held))
            return marked

        return wrapped

    for table in tables:
        table.__dict__["forward"] = wrap(table.forward)
    try:
        yield alive
    finally:
        for table in tables:
            table.__dict__.pop("forward", None)


class Sentinel:
    """Lives as long as the autograd graph that holds it."""


class Marked(torch.autograd.Function):
    """The identity, with a sentinel in its graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: weakref.WeakSet) -> Tensor:
        ctx.sentinel = Sentinel()
        held.add(ctx.sentinel)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def read_tokens(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The token ids among a call's arguments: the first of integers, or one of a usual name."""
    named = [kwargs[name] for name in NAMES["prompt"] if name in kwargs]
    for value in (*args, *named):
        if isinstance(value, Tensor) and not value.is_floating_point() and value.dim() in (1, 2):
            return value.detach().clone()
    return None


def find_logits(answer: Any, V: int) -> Tensor | None:
    """The first floating-point tensor [..., V] in a module's answer."""
    found: list[Tensor] = []

    def take(logits: Tensor) -> Tensor:
        found.append(logits)
        return logits

    replace_logits(answer, V, take)
    return found[0] if found else None


def replace_logits(answer: Any, V: int, change: Callable[[Tensor], Tensor]) -> Any:
    """The answer with its logits, the first floating-point tensor [..., V] in it, changed."""
    if isinstance(answer, Tensor):
        fits = answer.is_floating_point() and answer.dim() > 0 and answer.shape[-1] == V
        return change(answer) if fits else answer
    if isinstance(answer, dict) or hasattr(answer, "logits"):
        logits = answer.get("logits") if isinstance(answer, dict) else answer.logits
        if isinstance(logits, Tensor) and logits.shape[-1] == V:
            if isinstance(answer, dict):
                answer["logits"] = change(logits)
            else:
                answer.logits = change(logits)
        return answer
    if isinstance(answer, tuple | list):
        items = list(answer)
        for i, item in enumerate(items):
            if isinstance(item, Tensor) and item.is_floating_point() and item.dim() > 0 and item.shape[-1] == V:
                items[i] = change(item)
                break
        return type(answer)(*items) if hasattr(answer, "_fields") else type(answer)(items)
    return answer
