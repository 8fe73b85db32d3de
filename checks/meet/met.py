"""A subject met: which model, how it is built and called, in which sizes, and what its file brings along."""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..expect import NotApplicable, shown
from ..loss.which_loss import loss_in
from . import vocabulary, weights
from .axes import settle
from .build import Recipe, Unfillable, recipes
from .cache import Cache, Protocol, meet_cache, step
from .errors import UsageError, place, what_happened
from .forward import LENGTH, ROWS, Forward, Uncallable, meet_forward
from .logits import standing_for
from .padding_mask import MaskForm, mask_argument, meet_mask
from .refusals import Trial, explain, label_of, nothing, several
from .sandbox import Sandbox, SubjectHang
from .sizes import Restored, head_place, reach, sizes_of
from .stubs import Stub
from .which_model import COURSE, Named, asked_for, named, second_choice

SEARCH_SECONDS = 20.0  # for all attempts to build and call
# Tried in turn where a constructor refuses the first: widths with larger heads, fewer heads, round lengths.
OTHER_SIZES: tuple[dict[str, int], ...] = (
    {}, {"n_embd": 64}, {"n_head": 2}, {"n_embd": 128, "n_head": 2}, {"n_embd": 256, "n_head": 2},
    {"block_size": 16, "n_embd": 64}, {"block_size": 32, "n_embd": 64}, {"n_layer": 4}, {"block_size": 128},
)  # fmt: skip
PARTS = ("loss", "generate", "train_step", "objective", "trainer", "tokenizer", "declares")


@dataclass
class Met:
    """What is known of a subject once one model of it was built and gave logits."""

    sandbox: Sandbox
    shown: str  # model.py:GPT
    build: Callable[[Mapping[str, Any]], nn.Module]
    sizes: dict[str, Any]
    varies: frozenset[str]  # sizes that can be asked for
    forward: Forward
    constructor: str  # GPTConfig(vocab_size, block_size)
    fresh: bool = True  # whether each build is a new model
    recipe: Recipe | None = None
    parts: dict[str, Any] = field(default_factory=dict)
    longest: int | None = None  # tokens that the model reads at most, if it has such a limit
    device: Any = "cpu"
    has_generate: bool = False  # as a method of the model
    assumed: list[str] = field(default_factory=list)
    leave: Callable[[], None] = lambda: None  # puts an instance back to what it was given as

    def logits(
        self,
        model: nn.Module,
        tokens: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        form: MaskForm | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """[B, T, V]; with a cache, [B, 1, V] of a model that then answers for the last token only."""
        self.settle(model)
        given = dict(more or {})
        seen = mask if cache is None else cache.seen(mask, tokens)
        if seen is not None:
            form = form or self.mask_form
            whole = cache is None or cache.protocol.whole_mask
            given[form.argument] = form.encode(seen if whole else seen[:, -tokens.shape[1] :])
        with self.sandbox:
            if cache is None:
                return self.forward.logits(model, tokens, **given)
            return step(self.forward, model, tokens, cache, given)

    @property
    def mask_form(self) -> MaskForm:
        if not self.mask_forms:
            raise NotApplicable("the model takes no padding mask")
        return self.mask_forms[0]

    @functools.cached_property
    def mask_forms(self) -> tuple[MaskForm, ...]:
        """How the model takes a padding mask; () if it takes none."""
        model = self.build(self.sizes)
        argument = mask_argument(model, frozenset(self.forward.more))
        if argument is None:
            return ()
        tokens = self.some_tokens()
        with self.sandbox, torch.no_grad():
            read = functools.partial(self.forward.logits, model)
            return meet_mask(argument, read, tokens, self.sizes["vocab_size"])

    @functools.cached_property
    def protocol(self) -> Protocol | None:
        """How the model's cache is used; None if it has none that is known here."""
        model = self.build(self.sizes)
        with self.sandbox:
            return meet_cache(self.forward, model, self.sandbox, self.sizes, self.some_tokens())

    def new_cache(self, model: nn.Module, batch_size: int) -> Cache | None:
        if self.protocol is None:
            return None
        with self.sandbox:
            return self.protocol.new(model, batch_size)

    @functools.cached_property
    def returns(self) -> str:
        """What the model gives for logits: "logits", "log-probabilities" or "probabilities"."""
        model = self.build(self.sizes)
        with torch.no_grad():
            return standing_for(self.logits(model, self.some_tokens()))

    def some_tokens(self) -> Tensor:
        return _tokens(self.sizes, self.device)

    def settle(self, model: nn.Module) -> None:
        """The globals of the file, where its functions read sizes there, are those of this model."""
        if self.recipe is not None:
            self.recipe.settle_for(model)


def meet(
    what: Any, *, device: Any, causal: bool, checkpoint: str | None = None, parts: Mapping[str, Any] | None = None
) -> Met:
    """Meets a spec or an object. Raises UsageError."""
    if isinstance(what, str):
        found = named(what)
        targets, sandbox, label = asked_for(found), found.sandbox, found.shown
        if not targets:
            raise UsageError(nothing(found))
    else:
        found, sandbox, targets = None, Sandbox(), [what]
        label = label_of(what)
    name = found.name if found else label
    course: dict[str, Any] = {}
    if found is not None and getattr(targets[0], "__name__", "") == COURSE:
        targets, course = _of_course(found, targets[0])
    met, trials = _first(targets, sandbox, device, causal, label, name)
    if not met and found is not None:
        met, more = _first(second_choice(found, targets), sandbox, device, causal, label, name)
        trials = trials or more
    if len(met) > 1:
        raise UsageError(several(label, [m.shown for m in met]))
    if not met:
        raise UsageError(explain(trials, sandbox, label))
    subject = met[0] if checkpoint is None else _loaded(met[0], checkpoint, device, causal)
    if found is not None:
        subject.parts = {**course, **parts_of(found)}
    subject.parts.update(given_parts(parts or {}))
    return subject


def _of_course(found: Named, load: Callable) -> tuple[list[Any], dict[str, Any]]:
    """The model and the tokenizer of a course's contract, loaded from the file's own folder."""
    assert found.sandbox.file is not None
    try:
        with found.sandbox:
            loaded = load(str(found.sandbox.file.parent))
    except Exception as error:
        happened = what_happened(error, found.sandbox)
        raise UsageError(f"{found.shown}:{COURSE} failed on its folder\n  {happened}") from None
    if not isinstance(loaded, tuple | list) or not isinstance(loaded[0], nn.Module):
        raise UsageError(f"{found.shown}:{COURSE} gave {type(loaded).__name__}: expected (model, tokenizer)")
    found.sandbox.remark(f"{COURSE}(its folder) gives the model")
    return [loaded[0]], {"tokenizer": loaded[1]} if len(loaded) > 1 else {}


def _loaded(met: Met, file: str, device: Any, causal: bool) -> Met:
    """The same model with weights from a file: from now on one instance, at the sizes of the file."""
    state, saved = weights.read(file)
    try:
        saved |= weights.aligned(met.build(met.sizes), state, met.sizes)
        sizes = {**met.sizes, **{k: v for k, v in saved.items() if k in met.varies}}
        model = met.build(sizes)
    except Exception as error:
        told = ", ".join(f"{k} {v}" for k, v in saved.items())
        raise UsageError(
            f"{met.shown} cannot be built in the sizes of --checkpoint {file} ({told or 'none told'})\n"
            f"  {what_happened(error, met.sandbox)}"
        ) from None
    with met.sandbox:
        weights.put(model, state, file)
    trials: list[Trial] = []
    found = _try_instance(model, met.sandbox, device, causal, trials)
    if found is None:
        raise UsageError(explain(trials, met.sandbox, met.shown))
    found.shown, found.recipe = met.shown, met.recipe
    found.constructor = f"{met.constructor} with weights of {shown(file)}"
    found.sizes["n_head"] = sizes["n_head"]
    if "n_head" in met.varies and "n_head" not in saved:
        found.assumed.append(f"n_head={sizes['n_head']}, which {shown(file)} does not tell")
    return found


def given_parts(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Parts that live elsewhere: `FILE:NAME` loaded, anything else as it is. Raises UsageError."""
    return {name: _given_part(name, value) for name, value in parts.items()}


def _given_part(name: str, value: Any) -> Any:
    if name not in PARTS:
        raise UsageError(f"no part is called {name!r}: a subject may bring {', '.join(PARTS)}")
    if not isinstance(value, str):
        return value
    found = named(value)
    part = getattr(found.module, found.name or name, None)
    if part is None or not (callable(part) or name == "tokenizer"):
        there = ", ".join(k for k, v in found.scope.items() if inspect.isfunction(v)) or "no functions"
        raise UsageError(f"{found.shown} has no {found.name or name} to use as {name}; it has {there}")
    return guarded(part, found.sandbox)


def guarded(function: Any, sandbox: Sandbox) -> Any:
    """A function of the subject's that runs on the terms of its sandbox."""
    if not inspect.isfunction(function):
        return function

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with sandbox:
            return function(*args, **kwargs)

    return run


def _first(
    targets: list[Any], sandbox: Sandbox, device: Any, causal: bool, label: str, name: str
) -> tuple[list[Met], list[Trial]]:
    """Those of the targets that can be built and give logits; a factory's success settles it."""
    met: list[Met] = []
    trials: list[Trial] = []
    deadline = time.monotonic() + SEARCH_SECONDS
    for target in targets:
        tried = len(trials)
        found = _try_target(target, sandbox, device, causal, trials, deadline)
        if found is None:
            if len(trials) > tried and isinstance(trials[-1].error, SubjectHang):
                break
            continue
        found.shown = label if label == name else f"{label}:{name or label_of(target)}"
        met.append(found)
        if inspect.isfunction(target):
            break
    return met, trials


def _try_target(
    target: Any, sandbox: Sandbox, device: Any, causal: bool, trials: list[Trial], deadline: float
) -> Met | None:
    if isinstance(target, nn.Module):
        return _try_instance(target, sandbox, device, causal, trials)
    if not inspect.isclass(target) and not inspect.isroutine(target) and not callable(target):
        return None
    everything: Iterable[Recipe] = recipes(target, sandbox, causal)
    for sizes in OTHER_SIZES:
        tried: list[Recipe] = []
        for recipe in everything:
            tried.append(recipe)
            if time.monotonic() > deadline:
                return None
            met = _try_recipe(recipe, sizes, device, trials)
            if met is not None:
                _say_what_fails(recipe, trials, sandbox)
                return met
            if isinstance(trials[-1].error, SubjectHang):
                return None
        if all(isinstance(t.error, Unfillable) for t in trials if t.target is target):
            return None
        everything = tried
    return None


def _say_what_fails(recipe: Recipe, trials: list[Trial], sandbox: Sandbox) -> None:
    """A model whose own configuration breaks its constructor is met in another way, and the header says so."""
    for trial in trials:
        own = [option.says for option in trial.recipe.options.values()] if trial.recipe else []
        if trial.target is recipe.target and own and not trial.built and (where := place(trial.error, sandbox)):
            sandbox.remark(
                f"with {own[0]} as it stands {where} raises {type(trial.error).__name__}: it is built otherwise"
            )
            return


def _try_recipe(recipe: Recipe, changed: Mapping[str, Any], device: Any, trials: list[Trial]) -> Met | None:
    asked = {**vocabulary.DEFAULTS, "device": str(device), **changed}
    asked["padding"] = asked["vocab_size"]
    built = False
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, keep = _built(recipe, asked)
        built = True
        return _met(recipe, model.to(device).eval(), asked, keep, device)
    except Exception as error:
        trials.append(Trial(recipe.target, recipe, error, built))
        return None


def _built(recipe: Recipe, asked: dict[str, Any]) -> tuple[nn.Module, int | None]:
    """A model, and how many of its ids are not padding: its padding id is one more than the ids that checks use."""
    try:
        model = recipe.build(asked)
    except Exception:
        if not _has_padding(recipe):
            raise
    if not _has_padding(recipe):
        return model, None
    keep = asked["vocab_size"]
    return recipe.build({**asked, "vocab_size": keep + 1}), keep


def _has_padding(recipe: Recipe) -> bool:
    return any(vocabulary.squash(name) in vocabulary.PADDING for name in recipe.assumed)


def _met(recipe: Recipe, model: nn.Module, asked: dict[str, Any], keep: int | None, device: Any) -> Met:
    varies = frozenset(recipe.varies.values())
    measured = sizes_of(model)
    if "block_size" not in varies and measured["block_size"] is None:
        with recipe.sandbox:
            measured["block_size"] = reach(model, MOST_TOKENS, device)
    sizes = {k: asked[k] for k in vocabulary.SIZES}
    for size in vocabulary.SIZES:
        if size not in varies and measured.get(size) is not None:
            sizes[size] = measured[size]
    vocab_size = None if "vocab_size" not in varies else asked["vocab_size"] + (keep is not None)
    with recipe.sandbox:
        forward, sizes["vocab_size"] = _forward(recipe, model, vocab_size, sizes, keep, asked, device)
        tokens = _tokens(sizes, device)
        forward = settle(forward, model, tokens, sizes["vocab_size"], is_causal=recipe.causal)
    longest = sizes["block_size"] if "block_size" in varies else measured.get("block_size")
    if "block_size" not in varies and (longest is None or longest > MOST_TOKENS):
        sizes["block_size"] = vocabulary.DEFAULTS["block_size"] if longest is None else MOST_TOKENS

    def build(wanted: Mapping[str, Any]) -> nn.Module:
        full = {**asked, **wanted}
        full["padding"] = full["vocab_size"]
        return recipe.build({**full, "vocab_size": full["vocab_size"] + (keep is not None)})

    constructor = _constructor(recipe)
    return Met(
        recipe.sandbox, "", build, sizes, varies, forward, constructor, recipe=recipe, longest=longest, device=device,
        has_generate=callable(getattr(model, "generate", None)),
    )  # fmt: skip


def _tokens(sizes: Mapping[str, Any], device: Any) -> Tensor:
    length = min(LENGTH, sizes["block_size"])
    generator = torch.Generator().manual_seed(6)
    return torch.randint(sizes["vocab_size"], (ROWS, length), generator=generator).to(device)


MOST_TOKENS = 64  # of a model whose length is fixed: more would cost minutes and show no more


def _forward(
    recipe: Recipe, model: nn.Module, vocab_size: int | None, sizes: dict, keep: int | None, asked: dict, device: Any
) -> tuple[Forward, int]:
    """How to call it, and its vocabulary, which may be padded up from the one asked for."""
    fixed = "block_size" not in recipe.varies.values()

    def block_of(model: nn.Module) -> int:
        return int(min(sizes["block_size"], MOST_TOKENS) if fixed else (recipe.sizes_of(model) or sizes)["block_size"])

    try:
        forward = meet_forward(model, vocab_size, block_of, device, keep)
    except Uncallable:
        if vocab_size is None or keep is not None:
            raise
        forward = meet_forward(model, None, block_of, device)
        given = forward.vocab_size
        if not _padded_up(recipe, asked, given, block_of, device):
            raise VocabularyIgnored(asked["vocab_size"], given, head_place(model, given)) from None
        recipe.sandbox.remark(f"vocabulary padded from {asked['vocab_size']} to {given}")
    return forward, keep or forward.vocab_size


def _padded_up(recipe: Recipe, asked: dict[str, Any], given: int, block_of: Any, device: Any) -> bool:
    """Whether a larger vocabulary than asked for is that one, rounded up: it grows with the vocabulary asked for."""
    more = asked["vocab_size"] + 300
    if given < asked["vocab_size"]:
        return False
    with contextlib.suppress(Exception):
        other = recipe.build({**asked, "vocab_size": more}).to(device).eval()
        return more <= meet_forward(other, None, block_of, device).vocab_size < more + 300
    return False


class VocabularyIgnored(Exception):
    """The constructor takes a vocabulary size and the logits have another."""

    def __init__(self, asked: int, given: int, where: str) -> None:
        super().__init__(f"asked for a vocabulary of {asked}, the logits have {given}{where}")


def _constructor(recipe: Recipe) -> str:
    name = getattr(recipe.target, "__name__", "model")
    chosen = ", ".join(option.says for option in recipe.options.values())
    filled = ", ".join(dict.fromkeys(recipe.varies))
    return f"{chosen or name}({filled})"


def _try_instance(model: nn.Module, sandbox: Sandbox, device: Any, causal: bool, trials: list[Trial]) -> Met | None:
    """One model at its own sizes, put back to what it was before each use."""
    try:
        model = model.to(device)
        measured = sizes_of(model)
        sizes = {**vocabulary.DEFAULTS, **{k: v for k, v in measured.items() if v is not None}}
        with sandbox:
            longest = measured["block_size"] or reach(model, MOST_TOKENS, device)
        sizes["block_size"] = min(longest or vocabulary.DEFAULTS["block_size"], MOST_TOKENS)
        again = Restored(model)
        with contextlib.ExitStack() as stack:
            stack.callback(again.leave)
            stack.enter_context(sandbox)
            forward = meet_forward(model.eval(), measured.get("vocab_size"), lambda m: int(sizes["block_size"]), device)
            sizes["vocab_size"] = forward.vocab_size
            forward = settle(forward, model, _tokens(sizes, device), forward.vocab_size, is_causal=causal)
    except Exception as error:
        trials.append(Trial(model, None, error, True))
        return None
    return Met(
        sandbox, "", lambda wanted: again(), sizes, frozenset(), forward, "one instance, at its own sizes",
        fresh=False, longest=longest, device=device, leave=again.leave,
    )  # fmt: skip


def parts_of(found: Named) -> dict[str, Any]:
    """What the file itself defines beside the model: functions called loss, generate, train_step; a tokenizer."""
    parts = {}
    for name in PARTS:
        value = found.scope.get(name)
        data = name in ("tokenizer", "declares")
        own = getattr(value, "__module__", None) == found.module.__name__ or data
        if value is not None and own and (callable(value) or data) and not isinstance(value, nn.Module | Stub):
            parts[name] = guarded(value, found.sandbox)
    other = None if "loss" in parts else loss_in(found.scope, found.module.__name__)
    if other is not None:
        parts["loss"] = guarded(found.scope[other], found.sandbox)
        found.sandbox.remark(f"{other} is its loss")
    return parts
