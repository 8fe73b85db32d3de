"""`Loaded`: a model that was built and gave logits, with what is known about building and calling it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..expect import NotApplicable
from ..subject import ABSENCE, KeyValueCache, MaskForm, Option, amplify, torch_seeded
from .arguments import Parameter
from .build import Recipe
from .cache import Cache, Protocol, step
from .cache_search import Found, search
from .forward import LENGTH, ROWS, Forward
from .logits import standing_for
from .padding_mask import find_mask_forms, mask_argument
from .sandbox import Sandbox


@dataclass
class Loaded:
    """The user's model behind one interface: how it is built and called, in which sizes, with which parts."""

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
    longest: int | None = None  # the most tokens that the model can read; None if it has no such limit
    device: Any = "cpu"
    has_generate: bool = False  # as a method of the model
    targets: Parameter | None = None  # of forward, for a loss
    options: tuple[Option, ...] = ()  # that `build` takes beside sizes
    assumed: list[str] = field(default_factory=list)
    uncalled: Callable[[], dict[str, int]] = dict  # what the file defines and no check calls, and its line
    leave: Callable[[], None] = lambda: None  # puts an instance back to what it was given as

    def logits(
        self,
        model: nn.Module,
        tokens: Tensor,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        form: MaskForm | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """[B, T, V]; with a cache, [B, 1, V] if the model then returns the last position only."""
        self.set_globals_for(model)
        given = dict(more or {})
        held = cast(Cache | None, cache)  # ours: made by new_cache
        seen = mask if held is None else held.seen(mask, tokens)
        if seen is not None:
            form = form or self.mask_form
            whole = held is None or held.protocol.whole_mask
            given[form.argument] = form.encode(seen if whole else seen[:, -tokens.shape[1] :])
        start = time.thread_time()
        with self.sandbox:
            if held is None:
                logits = self.forward.logits(model, tokens, **given)
            else:
                logits = step(self.forward, model, tokens, held, given)
        self.sandbox.quickest = min(self.sandbox.quickest, time.thread_time() - start)
        return logits

    @property
    def mask_form(self) -> MaskForm:
        if not self.mask_forms:
            raise NotApplicable("the model takes no padding mask")
        return self.mask_forms[0]

    @functools.cached_property
    def mask_forms(self) -> tuple[MaskForm, ...]:
        """How the model takes a padding mask; () if it takes none."""
        model = self.sample()
        argument = mask_argument(model, frozenset(self.forward.more))
        if argument is None:
            return ()
        tokens = self.some_tokens()
        with self.sandbox, torch.no_grad():
            read = functools.partial(self.forward.logits, model)
            found = find_mask_forms(argument, read, tokens, self.sizes["vocab_size"])
            if found and found[0].shape != "[B, T]" and self.fresh:
                amplify(model, *ABSENCE, seed=0)  # at first a token may move so little that rounding decides
                found = find_mask_forms(argument, read, tokens, self.sizes["vocab_size"]) or found
            return found

    @functools.cached_property
    def cache(self) -> Found:
        """How the model's cache is used, or why no known way works."""
        model = self.sample()
        with self.sandbox:
            return search(self.forward, model, self.sandbox, self.sizes, self.some_tokens())

    @property
    def protocol(self) -> Protocol | None:
        return self.cache.protocol

    def new_cache(self, model: nn.Module, batch_size: int) -> Cache | None:
        if self.protocol is None:
            return None
        with self.sandbox:
            return self.protocol.new(model, batch_size)

    @functools.cached_property
    def returns(self) -> str:
        """What the model returns as logits: "logits", "log-probabilities" or "probabilities"."""
        model = self.sample()
        with torch.no_grad():
            return standing_for(self.logits(model, self.some_tokens()))

    def sample(self) -> nn.Module:
        """The model on which these are found out: always with the same weights, so that every run finds the same."""
        with torch_seeded(0):
            return self.build(self.sizes)

    def some_tokens(self) -> Tensor:
        return some_tokens(self.sizes, self.device)

    def set_globals_for(self, model: nn.Module) -> None:
        """If the user's functions read sizes from globals, gives those globals the sizes of this model."""
        if self.recipe is not None:
            self.recipe.set_globals_for(model)


def some_tokens(sizes: Mapping[str, Any], device: Any) -> Tensor:
    """The small batch [B, T] on which a model is tried while it is loaded."""
    length = min(LENGTH, sizes["block_size"])
    generator = torch.Generator().manual_seed(6)
    return torch.randint(sizes["vocab_size"], (ROWS, length), generator=generator).to(device)
