"""Foreign code as a subject: a file, a module or an object, behind the interface that the checks know."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from ..subject import UNDECLARED, KeyValueCache, MaskForm, Sizes, Spec, Subject, unwarned
from .header import header_of
from .met import Met, meet


class Foreign(Subject):
    """A subject whose constructor and call were found out; `met` says how."""

    def __init__(
        self,
        name: str,
        met: Met,
        *,
        seed: int = 0,
        device: str = "cpu",
        causal: bool = True,
        spec: Spec = UNDECLARED,
    ) -> None:
        parts = SimpleNamespace(build_model=lambda **sizes: met.build(sizes), **met.parts)
        super().__init__(name, parts, seed=seed, device=device, causal=causal, spec=spec)
        self.met, self.sizes = met, Sizes(**met.sizes)
        if not met.fresh:  # to learn these the one instance is put back, which must not happen while a check holds it
            _ = self.header, self.learns

    @property
    @unwarned()
    def header(self) -> str:
        return header_of(self.met)

    def leave(self) -> None:
        self.met.leave()

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
        return self.met.logits(model, tokens, mask, cache, form, more)

    def new_cache(self, model: nn.Module, batch_size: int) -> KeyValueCache | None:
        return self.met.new_cache(model, batch_size)

    @property
    def mask_forms(self) -> tuple[MaskForm, ...]:
        return self.met.mask_forms

    @property
    def longest(self) -> int | None:
        return self.met.longest

    @property
    def returns(self) -> str:
        return self.met.returns

    def can_vary(self, name: str) -> bool:
        return name in self.met.varies

    @property
    def builds_afresh(self) -> bool:
        return self.met.fresh

    @property
    def foreign(self) -> bool:
        return True

    @property
    def width(self) -> int:
        return self.met.forward.vocab_size

    @property
    def given_more(self) -> bool:
        return "," in self.met.forward.way.says

    def running(self) -> AbstractContextManager[Any]:
        return self.met.sandbox

    def code(self) -> Iterator[tuple[str, list[ast.AST]]]:
        sandbox = self.met.sandbox
        for name, source in sandbox.sources.items():
            if name not in sandbox.looked_into:
                yield source.filenames[0], source.nodes

    def owns(self, filename: str) -> bool:
        return self.met.sandbox.owns(filename)


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

    An object is a class, a factory, or one model, which is then tested at its own sizes. `parts` are what lives
    elsewhere, `{"loss": "train.py:masked_loss"}` or functions; `checkpoint` is a file of weights; `declared` are a seed
    and so on, as of `Subject`. Raises UsageError for whatever cannot be loaded, with what would settle it.
    """
    with unwarned():
        met = meet(what, device=device, causal=causal, checkpoint=checkpoint, parts=parts)
    return Foreign(what if isinstance(what, str) else met.shown, met, device=device, causal=causal, **declared)
