"""The implementation under test, behind one interface: build, logits, loss, generate, train step, tokenizer.

What is here is called as the reference is; meet/ has the same interface over foreign code. Nothing here judges.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from types import MappingProxyType, SimpleNamespace
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar
from typing import cast as as_type

import torch
from torch import Tensor, nn

from .expect import NotApplicable, Where

Made = TypeVar("Made")
Arguments = ParamSpec("Arguments")


@dataclass(frozen=True)
class Sizes:
    """What a check may ask a model to be. All differ, so that no axis can be mistaken for another."""

    vocab_size: int = 17
    block_size: int = 13
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 32
    dropout: float = 0.0


SWEEP = 2e10  # floating-point operations of one sweep of a check: half a second of one core in float64
LARGE = 2**23  # parameters: 8.4 million, 32 MB in float32
DRAWN_IN_FLOAT64 = 2**20  # numbers of one tensor; larger ones are drawn in float32, in a sixth of the time

# Gain of the projections and deviation of the embeddings (for `Subject.amplified`). Default initialization hides bugs.
ABSENCE = (1.5, 1.0)  # laws that something must not show: leaks, batch, length
EXISTENCE = (None, (1.0, 0.5), (1.5, 1.0))  # laws that something must show: the best of these; None: as initialized


@dataclass(frozen=True)
class MaskForm:
    """One way to write a padding mask [B, T], True for real tokens, as the argument of a model's forward."""

    argument: str
    dtype: torch.dtype = torch.bool
    keep: bool = True  # whether true, or 1, marks real tokens rather than padding
    shape: str = "[B, T]"
    additive: bool = False  # 0 for real tokens and -∞ for padding
    with_causal: bool = False  # the causal mask as well, in shapes that have two times T

    def encode(self, mask: Tensor) -> Tensor:
        mask = mask.bool()
        B, T = mask.shape
        seen = mask
        if self.shape == "[B, 1, 1, T]":
            seen = mask[:, None, None, :]
        elif self.shape in ("[B, T, T]", "[B, 1, T, T]"):
            seen = mask[:, None, :].expand(B, T, T)
            if self.with_causal:
                seen = seen & torch.ones_like(seen).tril() | torch.eye(T, dtype=torch.bool, device=mask.device)
            seen = seen[:, None] if self.shape == "[B, 1, T, T]" else seen
        if self.additive:
            return torch.zeros(seen.shape, dtype=self.dtype, device=mask.device).masked_fill(~seen, -torch.inf)
        return (seen if self.keep else ~seen).to(self.dtype)

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        says = "0 keeps, -inf drops" if self.additive else "true keeps" if self.keep else "true drops"
        return f"{self.argument} {self.shape} {kind}, {says}"


@dataclass(frozen=True)
class Option:
    """What a model can be asked for beside sizes: its name, its value, and other values to try."""

    name: str
    value: Any
    others: tuple[Any, ...]


@dataclass(frozen=True)
class Reading:
    """Whether the model's code computes with an option, and the first line that does, or else that declares it."""

    computed: bool
    where: Where | None = None


@dataclass(frozen=True)
class Spec:
    """The architecture that a subject is declared to be: gpt2 or llama; auto where none is declared."""

    family: str = "auto"
    file: str = ""  # where the user's table of weights came from
    table: Mapping[str, str] = field(default_factory=dict)  # theirs to ours, a layer's number written *

    def __str__(self) -> str:
        return f"{self.family}:{self.file}" if self.file else self.family


UNDECLARED = Spec()


@dataclass(frozen=True)
class Companion:
    """What a file has beside its model and the parts of a `Subject`: a schedule, an average of weights, a tokenizer."""

    kind: str  # evaluation, generation, preference loss, distillation loss, schedule, average, optimizer, tokenizer
    name: str
    value: Any  # the function or class
    where: Where


class KeyValueCache(Protocol):
    """What `Subject.new_cache` gives and `Subject.logits` fills."""

    inside_the_model: bool  # the model keeps its one cache itself: one text at a time


@contextlib.contextmanager
def unwarned() -> Iterator[None]:
    """What a subject warns of is its own business, also where whoever runs the checks makes every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Checks build small models, on which threads cost more than they give, and on a busy machine far more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def torch_seeded(seed: int) -> Iterator[None]:
    """Seeds PyTorch's generators, those of the CPU and of accelerators in use, and restores them afterwards.

    torch.manual_seed takes a hundred times as long: it puts calls aside, each with a stack trace, for accelerators that
    may come into use later.
    """
    generators = [torch.default_generator]
    for accelerator in (torch.cuda, torch.xpu):
        if accelerator.is_initialized():
            generators += accelerator.default_generators
    if torch.backends.mps.is_available():
        generators.append(torch.mps._get_default_mps_generator())
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


class Subject:
    """A model under test and what comes with it.

    `parts` is any object with `build_model(**sizes) -> nn.Module`, and optionally `loss(logits, targets, mask)`,
    `generate(model, prompt, max_new_tokens, …)`, `train_step(model, optimizer, batch)`, `trainer`, `tokenizer`.
    """

    def __init__(
        self,
        name: str,
        parts: SimpleNamespace,
        *,
        seed: int = 0,
        device: str = "cpu",
        causal: bool = True,
        spec: Spec = UNDECLARED,
    ) -> None:
        self.name, self.parts, self.seed, self.causal, self.spec = name, parts, seed, causal, spec
        self.device = torch.device(device)
        self.sizes = Sizes()
        self._made: dict[Any, Any] = {}
        self.chosen: dict[str, Any] = {}  # by name, the sizes and options of the latest model that are not its own

    def changed(self, *, device: str | None = None, sizes: Sizes | None = None) -> Self:
        """The same subject on another device or at other sizes."""
        other = copy.copy(self)
        other._made = {}  # which was made for this device and these sizes
        if self.builds_afresh:
            for name in ("learns", "parameters"):
                vars(other).pop(name, None)
        other.device = self.device if device is None else torch.device(device)
        other.sizes = self.sizes if sizes is None else sizes
        return other

    def once(
        self,
        make: Callable[Concatenate[Any, Arguments], Made],
        *arguments: Arguments.args,
        **named: Arguments.kwargs,
    ) -> Made:
        """What `make(subject, …)` gives or why it is not applicable, found when first asked for and then kept."""
        key = (make, arguments, tuple(named.items()))
        if key not in self._made:
            try:
                self._made[key] = make(self, *arguments, **named)
            except NotApplicable as reason:
                self._made[key] = reason
        made = self._made[key]
        if isinstance(made, NotApplicable):
            raise NotApplicable(made.reason, **made.evidence)
        return as_type(Made, made)

    @property
    def header(self) -> str:
        """One line of facts: what was loaded, how it is built and called, which parts it has, what was assumed."""
        return self.name

    @unwarned()
    def build(self, *, seed: int = 0, options: Mapping[str, Any] = MappingProxyType({}), **sizes: Any) -> nn.Module:
        """A fresh model in eval mode, its weights drawn from the seed; sizes not given are those of `self.sizes`.

        `options` are other values for some of `self.options`.

        Of a subject that is one instance (`builds_afresh` is False), that instance as it was. Raises NotApplicable for
        a size that the subject cannot take.
        """
        for name, value in sizes.items():
            if value != getattr(self.sizes, name) and not self.can_vary(name):
                raise NotApplicable(f"the model's {name} is fixed at {getattr(self.sizes, name)}", asked=value)
        torch.empty(0, device=self.device)  # an accelerator has a generator to seed once it is in use
        with torch_seeded(seed):
            self.chosen = {name: value for name, value in sizes.items() if value != getattr(self.sizes, name)}
            self.chosen |= options
            model: nn.Module = self.parts.build_model(**vars(replace(self.sizes, **sizes)), **options)
            return model.to(self.device).eval()

    def leave(self) -> None:
        """Puts a subject that is one instance back to what it was, its training mode included."""

    def amplified(
        self,
        scheme: tuple[float, float] | None = ABSENCE,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        **sizes: Any,
    ) -> nn.Module:
        """A model whose weights are large enough to show what initialization hides."""
        model = cast(self.build(seed=seed, **sizes), dtype)
        if scheme is None:
            return model
        if self.builds_afresh or not self.large:
            amplify(model, *scheme, seed=seed)
            return model
        # The last weights drawn are kept: drawing them anew takes longer than most forwards.
        key = (scheme, seed, dtype)
        kept = self._made.get(Subject.amplified)
        if kept is None or kept[0] != key:
            self._made.pop(Subject.amplified, None)
            amplify(model, *scheme, seed=seed)
            self._made[Subject.amplified] = key, [parameter.detach().clone() for parameter in model.parameters()]
        else:
            with torch.no_grad():
                for parameter, values in zip(model.parameters(), kept[1], strict=True):
                    parameter.copy_(values)
        return model

    def logits(
        self,
        model: nn.Module,
        tokens: Tensor,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        *,
        form: MaskForm | None = None,
        **more: Any,
    ) -> Tensor:
        """[B, T] token ids to [B, T, V], whatever the model returns; mask [B, T] is True for real tokens.

        `form`, one of `mask_forms`, is how the mask is written for the model; the first of them by default. `more`
        goes to the model as it is: document ids, say. Over a cache, some models answer for the last token only.
        """
        if mask is not None and form is not None:
            mask = form.encode(mask)
        given = {name: value for name, value in (("mask", mask), ("cache", cache)) if value is not None}
        return as_type(Tensor, model(tokens, **given, **more))

    def beside(self, model: nn.Module, tokens: Tensor) -> dict[str, Any]:
        """By name, what `logits` gives the model's forward with these tokens: a check that calls it does the same."""
        return {}

    def new_cache(self, model: nn.Module, batch_size: int) -> KeyValueCache | None:
        """An empty key-value cache for `logits`, which fills it; None if the subject has no cache known here.

        Its `inside_the_model` is True where the model keeps its one cache itself: one text at a time.
        """
        create: Any = getattr(model, "new_cache", None)
        return create(batch_size, self.sizes.block_size) if create else None

    @property
    def without_cache(self) -> str:
        """Why `new_cache` gives None: the reason for which checks of the cache do not apply."""
        return "no key-value cache was found in the model"

    @property
    def takes_mask(self) -> bool:
        """Whether `logits` takes a padding mask."""
        return bool(self.mask_forms)

    @property
    def mask_forms(self) -> tuple[MaskForm, ...]:
        """The ways to write a padding mask that the model does not refuse: its own first, then other dtypes of it."""
        return tuple(MaskForm("mask", dtype) for dtype in (torch.bool, torch.int64, torch.float32))

    @property
    def longest(self) -> int | None:
        """How many tokens the model reads at most; None if it has no such limit. `sizes.block_size` may be less."""
        return self.sizes.block_size

    @property
    def returns(self) -> str:
        """What stands for logits in what the model returns: "logits", "log-probabilities" or "probabilities"."""
        return "logits"

    def tokens(self, B: int, T: int, *, seed: int = 0, vocab_size: int | None = None) -> Tensor:
        """Random token ids [B, T], every id as likely."""
        generator = torch.Generator().manual_seed(seed)
        V = vocab_size or self.sizes.vocab_size
        return torch.randint(V, (B, T), generator=generator).to(self.device)

    def brings(self, part: str) -> bool:
        """Whether the subject has its own `loss`, `generate`, `train_step`, `trainer` or `tokenizer`."""
        return self.part(part) is not None

    @property
    def generates(self) -> bool:
        """Whether it has a generate, as a part or as a method of its model."""
        return self.brings("generate") or callable(getattr(self.build(), "generate", None))

    def part(self, name: str) -> Any:
        """A part that comes with the model, None where there is none."""
        return getattr(self.parts, name, None)

    def companions(self, *kinds: str) -> list[Companion]:
        """What the subject's file has of these kinds beside its model. Raises NotApplicable if that is nothing."""
        found = [one for one in self.part("companions") or () if one.kind in kinds]
        if not found:
            raise NotApplicable(f"no {' or '.join(kinds)} was found in your file")
        return found

    def can_vary(self, name: str) -> bool:
        """Whether `build` can be asked for another size of this name (`n_layer`, …)."""
        return True

    @functools.cached_property
    def learns(self) -> bool:
        """Whether the model has parameters to train: one in NumPy has none."""
        return any(parameter.requires_grad for parameter in self.build().parameters())

    @functools.cached_property
    def parameters(self) -> int:
        """How many numbers the model learns, at the sizes of `self.sizes`; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.build().parameters())

    def affordable(self, tokens: int, wanted: int, *, least: int = 1, sweeps: float = 1.0) -> int:
        """How many of `wanted` forwards, each over `tokens` tokens, fit into these sweeps; at least `least`.

        A forward takes about 2 operations per token and parameter, the vocabulary's tables included. What a law is
        about (ids, pairs of positions, rows, lengths) is tried whole where that is affordable, as it is for every small
        model; of a larger one a part is tried, drawn by the run's seed. Nothing is timed: the same model is tried in
        the same cases on every machine.
        """
        each = max(2.0 * tokens * self.parameters, 1.0)
        return min(wanted, max(least, int(sweeps * SWEEP / each)))

    @property
    def large(self) -> bool:
        """Whether weights in float64, and copies of them, would take too much time and memory."""
        return self.parameters >= LARGE

    def too_slow_in(self, dtype: torch.dtype) -> str:
        """Why a forward in this type would take minutes; "" if it does not."""
        slow = dtype == torch.float16 and self.device.type == "cpu" and self.large
        return f"float16 takes minutes on a CPU with {self.parameters:,} parameters" if slow else ""

    @property
    def builds_afresh(self) -> bool:
        """Whether each `build` is a new model; else it is always the same one, put back to what it was."""
        return True

    def declared(self, what: str) -> Any:
        """What the subject says of itself in its part `declares`, a dict; None where it says nothing of this."""
        return (self.part("declares") or {}).get(what)

    @property
    def foreign(self) -> bool:
        """Whether it is called in a way that was found out, rather than as the reference is."""
        return False

    @property
    def padded_up(self) -> bool:
        """Whether the model fails for texts shorter than its block, so that `logits` pads them on the right."""
        return False

    @property
    def mask_left_out(self) -> str:
        """The argument by which a model would be causal that is not so when its callers leave it out; else ""."""
        return ""

    @property
    def width(self) -> int:
        """How many ids the logits have room for: more than `sizes.vocab_size` where a model rounds it up."""
        return self.sizes.vocab_size

    @property
    def given_more(self) -> bool:
        """Whether `logits` hands the model's forward more than tokens: targets, say, without which it answers less."""
        return False

    @property
    def options(self) -> tuple[Option, ...]:
        """What the model can be asked for beside sizes; those that need not change any number are left out."""
        return self.part("options") or ()

    def reading(self, option: str, run: Callable[[], Any]) -> Reading | None:
        """Where the model's code computes with an option while `run` runs; None if other code may as well."""
        return Reading(True)

    def running(self) -> AbstractContextManager[Any]:
        """Surrounds calls of the subject's code that do not go through `build`, `logits` and its other methods."""
        return contextlib.nullcontext()

    def code(self) -> Iterator[tuple[str, list[ast.AST]]]:
        """The file and the syntax nodes of each module of the subject's own code."""
        return iter(())

    def owns(self, filename: str) -> bool:
        """Whether a source file is the subject's own."""
        return False

    def reproduce(self, check: Callable[..., Any]) -> str:
        """The command that runs this check alone, with this seed."""
        module, name = check.__module__.rpartition(".")[2], check.__name__
        declared = f" --spec {shlex.quote(str(self.spec))}" if self.spec.family != "auto" else ""
        declared += "" if self.causal else " --not-causal"
        return f"pytest --model {shlex.quote(self.name)} --seed {self.seed}{declared} -k '{module} and {name}'"


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in another floating-point type; `model.to(dtype)` would make complex numbers (rotary angles) real."""
    model._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)  # type: ignore[no-untyped-call]
    return model


def amplify(model: nn.Module, gain: float, embedding: float, *, seed: int) -> None:
    """Redraws a model's trainable weights, as strong as can be without saturating attention.

    A projection gets N(0, (gain/√fan)²), fan the geometric mean of its last two dimensions; an embedding deviation
    `embedding`; a vector at a constant c ≠ 0 becomes c (1 + 0.3 N), other vectors get + 0.3 N. Buffers, frozen
    parameters and padding rows stay.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    tables = {id(m.weight): m.padding_idx for m in model.modules() if isinstance(m, nn.Embedding)}
    seen: set[int] = set()
    with torch.no_grad():
        for parameter in model.parameters():
            strong = parameter.requires_grad and parameter.is_floating_point() and parameter.numel()
            if id(parameter) in seen or not strong:
                continue
            seen.add(id(parameter))
            drawn_in = torch.float64 if parameter.numel() <= DRAWN_IN_FLOAT64 else torch.float32
            noise = torch.randn(parameter.shape, generator=generator, dtype=drawn_in).to(parameter)
            if parameter.dim() < 2:
                constant = parameter.numel() > 0 and bool((parameter == parameter.flatten()[0]).all())
                c = parameter.flatten()[0].clone() if constant else torch.zeros(())
                parameter.copy_(c * (1 + 0.3 * noise) if constant and c != 0 else parameter + 0.3 * noise)
            elif id(parameter) in tables:
                row = tables[id(parameter)]
                kept = None if row is None else parameter[row].clone()
                parameter.copy_(embedding * noise)
                if kept is not None:
                    parameter[row] = kept
            else:
                fan = (parameter.shape[-1] * parameter.shape[-2]) ** 0.5
                parameter.copy_(gain * fan**-0.5 * noise)
