"""`load`: from `FILE.py[:NAME]`, `package.module:NAME` or an object to a model that was built and gave logits.

Every class and factory that can be the model is tried; one must work, or a UsageError says what was tried.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..expect import NotApplicable, shown
from ..subject import LARGE
from . import vocabulary, weights
from .axes import refine
from .build import Recipe, Unfillable, recipes
from .companions import companions_in
from .errors import UsageError, place, what_happened
from .forward import Forward, Uncallable, find_forward
from .loaded import Loaded, some_tokens
from .options import options_of
from .parts import given_parts, parts_of
from .process import Stopwatch, SubjectHang
from .refusals import Trial, explain, label_of, no_model, several_models
from .roles import targets_of
from .sandbox import Sandbox
from .sizes import Restored, head_place, longest_input, sizes_of
from .uncalled import uncalled_in
from .which_model import COURSE, Found, candidates, fallbacks, find

SEARCH_SECONDS = 20.0  # of processor time, for all attempts to build and call
# Tried in turn where a constructor refuses the first: widths with larger heads, fewer heads, round lengths.
OTHER_SIZES: tuple[dict[str, int], ...] = (
    {}, {"n_embd": 64}, {"n_head": 2}, {"n_embd": 128, "n_head": 2}, {"n_embd": 256, "n_head": 2},
    {"block_size": 16, "n_embd": 64}, {"block_size": 32, "n_embd": 64}, {"n_layer": 4}, {"block_size": 128},
)  # fmt: skip
MOST_TOKENS = 64  # for a model whose length is fixed: longer texts would cost minutes and show no more
FEWER_TOKENS = 12  # for a large one; what is long by its nature (causality, say) asks for the longest input itself


def load(
    what: Any, *, device: Any, causal: bool, checkpoint: str | None = None, parts: Mapping[str, Any] | None = None
) -> Loaded:
    """Loads what a string names, or an object. Raises UsageError."""
    if isinstance(what, str):
        found = find(what)
        targets, sandbox, label = candidates(found), found.sandbox, found.shown
        if not targets:
            raise UsageError(no_model(found))
    else:
        found, sandbox, targets = None, Sandbox(), [what]
        label = label_of(what)
    name = found.name if found else label
    course: dict[str, Any] = {}
    if found is not None and getattr(targets[0], "__name__", "") == COURSE:
        targets, course = _of_course(found, targets[0])
    loaded, trials = _try_all(targets, sandbox, device, causal, label, name)
    if not loaded and found is not None:
        loaded, more = _try_all(fallbacks(found, targets), sandbox, device, causal, label, name)
        trials = trials or more
    if len(loaded) > 1:
        raise UsageError(several_models(label, [one.shown for one in loaded]))
    if not loaded:
        raise UsageError(explain(trials, sandbox, label))
    model = loaded[0] if checkpoint is None else _with_weights(loaded[0], checkpoint, device, causal)
    if found is not None:
        model.parts = {**course, **parts_of(found)}
        if companions := companions_in(found, model.parts):
            model.parts["companions"] = companions
        source = found.sandbox.sources.get(found.module.__name__)
        if source is not None and found.sandbox.file is not None:
            model.uncalled = functools.partial(uncalled_in, model, source)
    model.parts.update(given_parts(parts or {}))
    return model


def _of_course(found: Found, function: Callable[..., Any]) -> tuple[list[Any], dict[str, Any]]:
    """The model and the tokenizer of `load_model_and_tokenizer(folder)`, called with the file's own folder."""
    assert found.sandbox.file is not None
    try:
        with found.sandbox:
            given = function(str(found.sandbox.file.parent))
    except Exception as error:
        happened = what_happened(error, found.sandbox)
        raise UsageError(f"{found.shown}:{COURSE} failed when called with its own folder\n  {happened}") from None
    if not isinstance(given, tuple | list) or not isinstance(given[0], nn.Module):
        raise UsageError(f"{found.shown}:{COURSE} returned {type(given).__name__}, expected (model, tokenizer)")
    found.sandbox.remark(f"the model comes from {COURSE}(its folder)")
    return [given[0]], {"tokenizer": given[1]} if len(given) > 1 else {}


def _with_weights(loaded: Loaded, file: str, device: Any, causal: bool) -> Loaded:
    """The same model with the weights of a file: from now on one instance, in the sizes of the file."""
    state, saved = weights.read(file)
    try:
        saved |= weights.sizes_beside(loaded.build(loaded.sizes), state, loaded.sizes)
        sizes = {**loaded.sizes, **{k: v for k, v in saved.items() if k in loaded.varies}}
        model = loaded.build(sizes)
    except Exception as error:
        told = ", ".join(f"{k} {v}" for k, v in saved.items())
        raise UsageError(
            f"{loaded.shown} could not be built in the sizes of --checkpoint {file} ({told or 'it records none'})\n"
            f"  {what_happened(error, loaded.sandbox)}"
        ) from None
    with loaded.sandbox:
        weights.load_into(model, state, file)
    trials: list[Trial] = []
    instance = _try_instance(model, loaded.sandbox, device, causal, trials)
    if instance is None:
        raise UsageError(explain(trials, loaded.sandbox, loaded.shown))
    instance.shown, instance.recipe = loaded.shown, loaded.recipe
    instance.constructor = f"{loaded.constructor} with weights of {shown(file)}"
    instance.sizes["n_head"] = sizes["n_head"]
    if "n_head" in loaded.varies and "n_head" not in saved:
        instance.assumed.append(f"n_head={sizes['n_head']}, which {shown(file)} does not record")
    return instance


# -- attempts


def _try_all(
    targets: list[Any], sandbox: Sandbox, device: Any, causal: bool, label: str, name: str
) -> tuple[list[Loaded], list[Trial]]:
    """The targets that can be built and give logits, and the failed attempts; a factory that works ends the search."""
    loaded: list[Loaded] = []
    trials: list[Trial] = []
    watch = Stopwatch()
    for target in targets:
        tried = len(trials)
        one = _try_target(target, sandbox, device, causal, trials, watch)
        if one is None:
            if len(trials) > tried and isinstance(trials[-1].error, SubjectHang):
                break
            continue
        one.shown = label if label == name else f"{label}:{name or label_of(target)}"
        loaded.append(one)
        if inspect.isfunction(target):
            break
    return loaded, trials


def _try_target(
    target: Any, sandbox: Sandbox, device: Any, causal: bool, trials: list[Trial], watch: Stopwatch
) -> Loaded | None:
    if isinstance(target, nn.Module):
        return _try_instance(target, sandbox, device, causal, trials)
    if not inspect.isclass(target) and not inspect.isroutine(target) and not callable(target):
        return None
    everything: Iterable[Recipe] = recipes(target, sandbox, causal)
    for sizes in OTHER_SIZES:
        tried: list[Recipe] = []
        for recipe in everything:
            tried.append(recipe)
            if watch.over(SEARCH_SECONDS):
                return None
            loaded = _try_recipe(recipe, sizes, device, trials)
            if loaded is not None:
                _remark_on_its_configuration(recipe, trials, sandbox)
                return loaded
            if isinstance(trials[-1].error, SubjectHang):
                return None
        if all(isinstance(t.error, Unfillable) for t in trials if t.target is target):
            return None
        everything = tried
    return None


def _remark_on_its_configuration(recipe: Recipe, trials: list[Trial], sandbox: Sandbox) -> None:
    """If the model's own configuration broke its constructor, the header says so."""
    for trial in trials:
        own = [option.says for option in trial.recipe.options.values()] if trial.recipe else []
        if trial.target is recipe.target and own and not trial.built and (where := place(trial.error, sandbox)):
            sandbox.remark(
                f"with {own[0]} as it is, {where} raises {type(trial.error).__name__}: the model is built another way"
            )
            return


def _try_recipe(recipe: Recipe, changed: Mapping[str, Any], device: Any, trials: list[Trial]) -> Loaded | None:
    asked = {**vocabulary.DEFAULTS, "device": str(device), **changed}
    asked["padding"] = asked["vocab_size"]
    built = False
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, keep = _built(recipe, asked)
        built = True
        return _called(recipe, model.to(device).eval(), asked, keep, device)
    except Exception as error:
        trials.append(Trial(recipe.target, recipe, error, built))
        return None


def _built(recipe: Recipe, asked: dict[str, Any]) -> tuple[nn.Module, int | None]:
    """A model, and if it takes a padding id how many ids are not padding: the padding id comes after them.

    Of a vocabulary that cannot be chosen it is the last id: `asked` then has that vocabulary without it.
    """
    try:
        model = recipe.build(asked)
    except Exception:
        if not _has_padding(recipe):
            raise
    if not _has_padding(recipe):
        return model, None
    if "vocab_size" not in recipe.varies.values() and (fixed := sizes_of(model)["vocab_size"]):
        asked["padding"] = asked["vocab_size"] = fixed - 1  # the last id of its own
        return recipe.build(asked), fixed - 1
    keep = asked["vocab_size"]
    return recipe.build({**asked, "vocab_size": keep + 1}), keep


def _has_padding(recipe: Recipe) -> bool:
    return any(vocabulary.squash(name) in vocabulary.PADDING for name in recipe.assumed)


def _called(recipe: Recipe, model: nn.Module, asked: dict[str, Any], keep: int | None, device: Any) -> Loaded:
    """Finds out how a model that was just built is called, and which sizes it has."""
    varies = frozenset(recipe.varies.values())
    measured = sizes_of(model)
    if "block_size" not in varies and measured["block_size"] is None:
        with recipe.sandbox:
            measured["block_size"] = longest_input(model, MOST_TOKENS, device)
    sizes = {k: asked[k] for k in vocabulary.SIZES}
    for size in vocabulary.SIZES:
        if size not in varies and measured.get(size) is not None:
            sizes[size] = measured[size]
    vocab_size = None if "vocab_size" not in varies else asked["vocab_size"] + (keep is not None)
    with recipe.sandbox:
        forward, sizes["vocab_size"] = _forward(recipe, model, vocab_size, sizes, keep, asked, device)
        tokens = some_tokens(sizes, device)
        forward = refine(forward, model, tokens, sizes["vocab_size"], is_causal=recipe.causal)
        targets = targets_of(model, tokens, sizes["vocab_size"])
    longest = sizes["block_size"] if "block_size" in varies else measured.get("block_size")
    if "block_size" not in varies and (longest is None or longest > MOST_TOKENS):
        sizes["block_size"] = vocabulary.DEFAULTS["block_size"] if longest is None else MOST_TOKENS

    options = options_of(recipe.offered, recipe.varies, recipe.reads.choices)
    names = {option.name for option in options}

    def build(wanted: Mapping[str, Any]) -> nn.Module:
        full = {**asked, **wanted}
        full["padding"] = full["vocab_size"]
        other = {name: value for name, value in wanted.items() if name in names}
        way = recipe.with_options(other) if other else recipe
        try:
            return way.build({**full, "vocab_size": full["vocab_size"] + (keep is not None)})
        except (ValueError, AssertionError, NotImplementedError) as refusal:  # said on purpose, unlike other errors
            others = [f"{name}={value}" for name, value in wanted.items() if value != sizes.get(name)]
            if not others:
                raise
            raise NotApplicable(f"the model refuses {', '.join(others)}: {type(refusal).__name__}: {refusal}") from None

    return Loaded(
        recipe.sandbox, "", build, sizes, varies, forward, _constructor(recipe), recipe=recipe, longest=longest,
        device=device, has_generate=callable(getattr(model, "generate", None)), options=tuple(options),
        targets=targets,
    )  # fmt: skip


def _forward(
    recipe: Recipe,
    model: nn.Module,
    vocab_size: int | None,
    sizes: dict[str, Any],
    keep: int | None,
    asked: dict[str, Any],
    device: Any,
) -> tuple[Forward, int]:
    """How to call the model, and its vocabulary size, which may be rounded up from the one asked for."""
    fixed = "block_size" not in recipe.varies.values()

    def block_of(model: nn.Module) -> int:
        return int(min(sizes["block_size"], MOST_TOKENS) if fixed else (recipe.sizes_of(model) or sizes)["block_size"])

    try:
        forward = find_forward(model, vocab_size, block_of, device, keep)
    except Uncallable:
        if vocab_size is None or keep is not None:
            raise
        forward = find_forward(model, None, block_of, device)
        given = forward.vocab_size
        if not _padded_up(recipe, asked, given, block_of, device):
            raise VocabularyIgnored(asked["vocab_size"], given, head_place(model, given)) from None
        recipe.sandbox.remark(f"vocabulary padded from {asked['vocab_size']} to {given}")
    return forward, keep or forward.vocab_size


def _padded_up(
    recipe: Recipe, asked: dict[str, Any], given: int, block_of: Callable[[nn.Module], int], device: Any
) -> bool:
    """Whether a vocabulary larger than asked for is that one rounded up: if so, it grows with the one asked for."""
    more = asked["vocab_size"] + 300
    if given < asked["vocab_size"]:
        return False
    with contextlib.suppress(Exception):
        other = recipe.build({**asked, "vocab_size": more}).to(device).eval()
        return bool(more <= find_forward(other, None, block_of, device).vocab_size < more + 300)
    return False


class VocabularyIgnored(Exception):
    """The constructor takes a vocabulary size and the logits have another."""

    def __init__(self, asked: int, given: int, where: str) -> None:
        hint = where or ": is its output head missing?"
        super().__init__(f"built with a vocabulary of {asked}, but the logits have {given} entries{hint}")


def _constructor(recipe: Recipe) -> str:
    name = getattr(recipe.target, "__name__", "model")
    chosen = ", ".join(option.says for option in recipe.options.values())
    filled = ", ".join(dict.fromkeys(recipe.varies))
    return f"{chosen or name}({filled})"


def _try_instance(model: nn.Module, sandbox: Sandbox, device: Any, causal: bool, trials: list[Trial]) -> Loaded | None:
    """One model in its own sizes, put back to what it was before each use."""
    try:
        model = model.to(device)
        measured = sizes_of(model)
        sizes = {**vocabulary.DEFAULTS, **{k: v for k, v in measured.items() if v is not None}}
        with sandbox:
            longest = measured["block_size"] or longest_input(model, MOST_TOKENS, device)
        large = sum(parameter.numel() for parameter in model.parameters()) >= LARGE
        most = FEWER_TOKENS if large else MOST_TOKENS
        sizes["block_size"] = min(longest or vocabulary.DEFAULTS["block_size"], most)
        again = Restored(model)
        with contextlib.ExitStack() as stack:
            stack.callback(again.leave)
            stack.enter_context(sandbox)
            forward = find_forward(model.eval(), measured.get("vocab_size"), lambda m: int(sizes["block_size"]), device)
            sizes["vocab_size"] = forward.vocab_size
            forward = refine(forward, model, some_tokens(sizes, device), forward.vocab_size, is_causal=causal)
            targets = targets_of(model, some_tokens(sizes, device), forward.vocab_size)
    except Exception as error:
        trials.append(Trial(model, None, error, True))
        return None
    return Loaded(
        sandbox, "", lambda wanted: again(), sizes, frozenset(), forward, "one instance, at its own sizes",
        fresh=False, longest=longest, device=device, leave=again.leave, targets=targets,
    )  # fmt: skip
