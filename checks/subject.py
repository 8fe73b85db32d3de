"""The implementation under test, behind one interface: build, logits, loss, generate, train step, tokenizer.

How foreign code is met (files, constructors, return forms) is in conventions/; nothing here judges.
"""

from __future__ import annotations

import difflib
import functools
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .expect import NotApplicable
from .run.verdict import unwarned

if TYPE_CHECKING:
    from .meet.met import Met
    from .meet.padding_mask import MaskForm


@dataclass(frozen=True)
class Sizes:
    """What a check may ask a model to be. All differ, so that no axis can be mistaken for another."""

    vocab_size: int = 17
    block_size: int = 13
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 32
    dropout: float = 0.0


# Gain of the projections and deviation of the embeddings (for `Subject.amplified`). Default initialization hides bugs.
ABSENCE = (1.5, 1.0)  # laws that something must not show: leaks, batch, length
EXISTENCE = (None, (1.0, 0.5), (1.5, 1.0))  # laws that something must show: the best of these; None: as initialized


class Subject:
    """A model under test and what comes with it.

    `parts` is any object with `build_model(**sizes) -> nn.Module`, and optionally `loss(logits, targets, mask)`,
    `generate(model, prompt, max_new_tokens, …)`, `train_step(model, optimizer, batch)`, `trainer`, `tokenizer`.
    """

    spec = "auto"  # the architecture that it is declared to be: gpt2 or llama; auto: none
    spec_file = ""  # where the user's table of weights for it came from
    spec_table: ClassVar[dict[str, str]] = {}  # theirs to ours, a layer's number written *

    def __init__(
        self,
        name: str,
        parts: Any,
        *,
        seed: int = 0,
        device: str = "cpu",
        causal: bool = True,
        met: Met | None = None,
    ) -> None:
        self.name, self.parts, self.seed, self.causal = name, parts, seed, causal
        self.device = torch.device(device)
        self.met = met  # how foreign code is built and called; None for the reference's own interface
        self.sizes = Sizes() if met is None else Sizes(**met.sizes)

    @classmethod
    def meet(
        cls,
        what: Any = "transformer",
        *,
        parts: dict[str, Any] | None = None,
        seed: int = 0,
        device: str = "cpu",
        causal: bool = True,
        checkpoint: str | None = None,
    ) -> Subject:
        """The subject behind `FILE.py[:NAME]`, `NOTEBOOK.ipynb[:NAME]`, `package.module:NAME`, `bug:ID` or an object.

        An object is a class, a factory, or one model, which is then tested at its own sizes. `parts` are what lives
        elsewhere, `{"loss": "train.py:masked_loss"}` or functions; `checkpoint` is a file of weights.
        Raises UsageError for whatever cannot be met, with what would settle it.
        """
        declared: dict[str, Any] = dict(seed=seed, device=device, causal=causal)
        if isinstance(what, str) and (what == "transformer" or what.startswith("bug:")):
            return _own(what, parts, checkpoint, declared)
        from .meet.met import meet

        with unwarned():
            met = meet(what, device=device, causal=causal, checkpoint=checkpoint, parts=parts)
        brought = SimpleNamespace(build_model=lambda **sizes: met.build(sizes), **met.parts)
        subject = cls(what if isinstance(what, str) else met.shown, brought, met=met, **declared)
        if not met.fresh:  # to learn these the one instance is put back, which must not happen while a check holds it
            _ = subject.header, subject.learns
        return subject

    @property
    @unwarned()
    def header(self) -> str:
        """One line of facts: what was met, how it is built and called, what it brings, what was assumed."""
        if self.met is None:
            return self.name
        from .meet.header import header_of

        return header_of(self.met)

    @unwarned()
    def build(self, *, seed: int = 0, **sizes: Any) -> nn.Module:
        """A fresh model in eval mode, its weights drawn from the seed; sizes not given are those of `self.sizes`.

        Of a subject that is one instance (`builds_afresh` is False), that instance as it was. Raises NotApplicable for
        a size that the subject cannot take.
        """
        for name, value in sizes.items():
            if value != getattr(self.sizes, name) and not self.can_vary(name):
                raise NotApplicable(f"the model's {name} is fixed at {getattr(self.sizes, name)}", asked=value)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.parts.build_model(**vars(replace(self.sizes, **sizes))).to(self.device).eval()

    def leave(self) -> None:
        """Puts a subject that is one instance back to what it was, its training mode included."""
        if self.met is not None:
            self.met.leave()

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
        if scheme is not None:
            amplify(model, *scheme, seed=seed)
        return model

    def logits(
        self,
        model: nn.Module,
        tokens: Tensor,
        mask: Tensor | None = None,
        cache: Any = None,
        *,
        form: MaskForm | None = None,
        **more: Any,
    ) -> Tensor:
        """[B, T] token ids to [B, T, V], whatever the model returns; mask [B, T] is True for real tokens.

        `form`, one of `mask_forms`, is how the mask is written for the model; the first of them by default. `more`
        goes to the model as it is: document ids, say. Over a cache, some models answer for the last token only.
        """
        if self.met is not None:
            return self.met.logits(model, tokens, mask, cache, form, more)
        if mask is not None and form is not None:
            mask = form.encode(mask)
        given = {name: value for name, value in (("mask", mask), ("cache", cache)) if value is not None}
        return model(tokens, **given, **more)

    def new_cache(self, model: nn.Module, batch_size: int) -> Any:
        """An empty key-value cache for `logits`, which fills it; None if the subject has no cache known here.

        Its `inside_the_model` is True where the model keeps its one cache itself: one text at a time.
        """
        if self.met is not None:
            return self.met.new_cache(model, batch_size)
        create: Any = getattr(model, "new_cache", None)
        return create(batch_size, self.sizes.block_size) if create else None

    @property
    def takes_mask(self) -> bool:
        """Whether `logits` takes a padding mask."""
        return bool(self.mask_forms)

    @property
    def mask_forms(self) -> tuple[MaskForm, ...]:
        """The ways to write a padding mask that the model does not refuse: its own first, then other dtypes of it."""
        if self.met is not None:
            return self.met.mask_forms
        from .meet.padding_mask import MaskForm

        return tuple(MaskForm("mask", dtype) for dtype in (torch.bool, torch.int64, torch.float32))

    @property
    def longest(self) -> int | None:
        """How many tokens the model reads at most; None if it has no such limit. `sizes.block_size` may be less."""
        return self.sizes.block_size if self.met is None else self.met.longest

    @property
    def returns(self) -> str:
        """What stands for logits in what the model returns: "logits", "log-probabilities" or "probabilities"."""
        return "logits" if self.met is None else self.met.returns

    def tokens(self, B: int, T: int, *, seed: int = 0, vocab_size: int | None = None) -> Tensor:
        """Random token ids [B, T], every id as likely."""
        generator = torch.Generator().manual_seed(seed)
        V = vocab_size or self.sizes.vocab_size
        return torch.randint(V, (B, T), generator=generator).to(self.device)

    def brings(self, part: str) -> bool:
        """Whether the subject has its own `loss`, `generate`, `train_step`, `trainer` or `tokenizer`."""
        return getattr(self.parts, part, None) is not None

    def can_vary(self, name: str) -> bool:
        """Whether `build` can be asked for another size of this name (`n_layer`, …)."""
        return self.met is None or name in self.met.varies

    @functools.cached_property
    def learns(self) -> bool:
        """Whether the model has parameters to train: one in NumPy has none."""
        return any(parameter.requires_grad for parameter in self.build().parameters())

    @property
    def builds_afresh(self) -> bool:
        """Whether each `build` is a new model; else it is always the same one, put back to what it was."""
        return self.met is None or self.met.fresh

    def declared(self, what: str) -> Any:
        """What the subject says of itself in its part `declares`, a dict; None where it says nothing of this."""
        return (getattr(self.parts, "declares", None) or {}).get(what)

    def owns(self, filename: str) -> bool:
        """Whether a source file is the subject's own."""
        return self.met is not None and self.met.home.owns(filename)

    def reproduce(self, check: Callable) -> str:
        """The command that runs this check alone, with this seed."""
        module, name = check.__module__.rpartition(".")[2], check.__name__
        spec = f"{self.spec}:{shlex.quote(self.spec_file)}" if self.spec_file else self.spec
        declared = f" --spec {spec}" if spec != "auto" else ""
        declared += "" if self.causal else " --not-causal"
        return f"pytest --model {shlex.quote(self.name)} --seed {self.seed}{declared} -k '{module} and {name}'"


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in another floating-point type; `model.to(dtype)` would make complex numbers (rotary angles) real."""
    return model._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)


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
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
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


def reference(**declared: Any) -> Subject:
    """The reference of this project as a subject."""
    return Subject("transformer", reference_parts(), **declared)


def _own(what: str, parts: dict[str, Any] | None, checkpoint: str | None, declared: dict[str, Any]) -> Subject:
    """The reference, or one of its known bugs, with other parts if such are given."""
    if checkpoint is not None:
        from .meet import UsageError

        raise UsageError(f"--checkpoint goes with a model of yours, not with {what}")
    subject = reference(**declared) if what == "transformer" else _bug(what.removeprefix("bug:")).subject(**declared)
    if parts:
        from .meet.met import given_parts  # which is all that meets foreign code: a tenth of a second

        subject.parts.declares = {}  # what the reference says of its own parts holds for no others
        vars(subject.parts).update(given_parts(parts))
    return subject


def _bug(id: str) -> Any:
    from .bugs import all_bugs
    from .meet import UsageError

    known = all_bugs()
    if id not in known:
        near = difflib.get_close_matches(id, known, n=5) or sorted(known)[:5]
        raise UsageError(f"no bug is called {id!r}; among the {len(known)} known ones: {', '.join(near)}")
    return known[id]


def reference_parts(*, spec: str | None = None, **config: Any) -> SimpleNamespace:
    """The parts of the reference, to be replaced one at a time; `config` fixes fields of its ModelConfig.

    `spec` is the architecture that they declare to be, "gpt2" or "llama"; by default they declare none.
    """
    from ..transformer import checkpoint, data, generation, loss, trainer
    from ..transformer.model import ModelConfig, Transformer

    def build_model(**sizes: Any) -> nn.Module:
        return Transformer(ModelConfig(**{**sizes, **config}))

    return SimpleNamespace(
        build_model=build_model,
        loss=loss.next_token_loss,
        generate=generation.generate,
        objective=trainer.next_token_objective,
        trainer=trainer.Trainer,
        pad_batch=data.pad_batch,
        save=checkpoint.save,
        load=checkpoint.load,
        load_weights=checkpoint.load_weights,
        declares=dict(
            spec=spec,
            called="loss(logits, targets, mask)", shift=0, skip=0, reduction="mean", empty=0.0, smoothing=0.0,
            pad=None, float32=True,  # so far the loss
            clip="norm", decay="matrices", order="every example once an epoch",  # the training
        ),
    )  # fmt: skip
