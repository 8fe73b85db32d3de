"""`foreign`: a user's file, module or object as a Subject, the interface that checks use."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from ..garbage import nothing_collected
from ..subject import KeyValueCache, MaskForm, Option, Reading, Sizes, Subject, unwarned
from .header import header_of
from .load import load
from .loaded import Loaded
from .options import reading_of

# Names of models that predict a masked token from both sides, unless they say otherwise.
BOTH_WAYS = re.compile(
    r"MaskedLM|MaskedLanguageModel|MLM(?![a-z])|B(ERT|ert)(?![a-z])|(Ro|ro|Al|al|De|de|il)[Bb]ert(?![a-z])"
)
ONE_WAY = re.compile(r"Causal|Decoder|LMHead|Generat|GPT")


class Foreign(Subject):
    """A subject made from foreign code; `loaded` knows how it is built and called."""

    def __init__(self, name: str, loaded: Loaded, **declared: Any) -> None:
        parts = SimpleNamespace(build_model=lambda **sizes: loaded.build(sizes), **loaded.parts)
        super().__init__(name, parts, **declared)
        self.loaded, self.sizes = loaded, Sizes(**loaded.sizes)
        if not loaded.fresh:  # now: these put the one instance back, which must not happen while a check holds it
            _ = self.header, self.learns, self.parameters

    @property
    @unwarned()
    def header(self) -> str:
        return header_of(self.loaded)

    def leave(self) -> None:
        self.loaded.leave()

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
        return self.loaded.logits(model, tokens, mask, cache, form, more)

    def beside(self, model: nn.Module, tokens: Tensor) -> dict[str, Any]:
        return self.loaded.forward.beside(model, tokens)

    def new_cache(self, model: nn.Module, batch_size: int) -> KeyValueCache | None:
        return self.loaded.new_cache(model, batch_size)

    @property
    def without_cache(self) -> str:
        return ": ".join(filter(None, (super().without_cache, self.loaded.cache.why_not)))

    @property
    def mask_forms(self) -> tuple[MaskForm, ...]:
        return self.loaded.mask_forms

    @property
    def longest(self) -> int | None:
        return self.loaded.longest

    @property
    def returns(self) -> str:
        return self.loaded.returns

    def can_vary(self, name: str) -> bool:
        return name in self.loaded.varies

    @property
    def builds_afresh(self) -> bool:
        return self.loaded.fresh

    @property
    def foreign(self) -> bool:
        return True

    @property
    def padded_up(self) -> bool:
        return self.loaded.forward.call.padded

    @property
    def mask_left_out(self) -> str:
        return self.loaded.forward.mask_left_out

    @property
    def width(self) -> int:
        return self.loaded.forward.vocab_size

    @property
    def given_more(self) -> bool:
        return "," in self.loaded.forward.call.says

    @property
    def options(self) -> tuple[Option, ...]:
        return self.loaded.options

    def reading(self, option: str, run: Callable[[], Any]) -> Reading | None:
        return reading_of(option, self.loaded.sandbox, run)

    def running(self) -> AbstractContextManager[Any]:
        return self.loaded.sandbox

    def code(self) -> Iterator[tuple[str, list[ast.AST]]]:
        sandbox = self.loaded.sandbox
        for name, source in sandbox.sources.items():
            if name not in sandbox.looked_into:
                yield source.filenames[0], source.nodes

    def owns(self, filename: str) -> bool:
        return self.loaded.sandbox.owns(filename)


def foreign(
    what: Any,
    *,
    parts: Mapping[str, Any] | None = None,
    checkpoint: str | None = None,
    device: str = "cpu",
    causal: bool = True,
    **declared: Any,
) -> Foreign:
    """The subject behind `FILE.py[:NAME]`, `NOTEBOOK.ipynb[:NAME]`, `package.module:NAME` or an object.

    An object is a class, a factory, or one model, which is then tested at its own sizes. `parts` are defined elsewhere,
    `{"loss": "train.py:masked_loss"}` or functions; `checkpoint` is a file of weights; `declared` are a seed and so on,
    as for `Subject`. Raises UsageError for whatever cannot be loaded, with how to fix it.
    """
    with unwarned(), nothing_collected():
        loaded = load(what, device=device, causal=causal, checkpoint=checkpoint, parts=parts)
        if causal and (name := BOTH_WAYS.search(loaded.shown)) and not ONE_WAY.search(loaded.shown):
            loaded.assumed.append(f"it looks both ways, as {name[0]} in its name says")
            causal = False
    return Foreign(what if isinstance(what, str) else loaded.shown, loaded, device=device, causal=causal, **declared)
