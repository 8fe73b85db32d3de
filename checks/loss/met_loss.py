"""Finds out how to call the subject's loss and what it does, from its parameters' names and its gradient.

Checks then call any loss as `loss(logits [B, T, V], targets [B, T], mask [B, T] or None)`: targets[b, t] belongs to
logits[b, t], and True in the mask keeps a target. Nothing here judges.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..expect import NotApplicable
from ..subject import Subject
from .forms import IGNORED, PLACES, VOCABULARY, Form, forms, model_form
from .formula import named_reduction
from .reading import EXACT, ROUGH, Loss, NoGradient, Reading, gradient, read, symbols_that_count

SOFT = 0.3  # of the probability of what is trained on, outside its largest: more than any smoothing
TRIED = 32  # token ids tried as labels, where the vocabulary is larger
DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda x: x,
    "log-probabilities": lambda x: x.log_softmax(-1),
    "probabilities": lambda x: x.softmax(-1),
}
# What is constant in the gradient of a loss that applies no softmax of its own: of -Σ q x, the gradient; of -Σ q log x,
# the gradient times x.
SIGNATURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "log-probabilities": lambda gradient, x: gradient,
    "probabilities": lambda gradient, x: gradient * x,
}


@dataclass(frozen=True)
class MetLoss:
    """A loss in the form in which checks call it, with what was found out about it."""

    call: Loss
    says: str  # how the subject's own function is called
    V: int  # vocabulary size of the logits that it can be given
    places: int  # targets in the longest row that it can be given
    domain: str = "logits"
    shift: int = 0  # of the subject's own, undone here: its logits at t are trained on its label at t + shift
    dropped: tuple[int, ...] = ()  # positions whose targets carry no loss though nothing masks them
    masks: str = ""  # how targets are masked: "argument", "label -100", "label -1"; empty: they cannot be
    reduction: str = ""  # empty: unknown
    reading: Reading | None = None  # of the subject's own function; None: it is not a cross entropy
    symbols: Tensor = field(default_factory=lambda: torch.arange(VOCABULARY))  # token ids that carry loss as targets
    left_out: tuple[int, ...] = ()  # token ids that do not
    weighs_symbols: bool = False  # the weight of a target depends on its token id
    also_runs: tuple[str, ...] = ()  # other ways to call it that give something else
    inside_model: bool = False
    changes_logits: bool = False  # the model does so between the logits that it is given and its loss
    gives: str = ""  # what a loss inside the model is given there: "logits", "log-probabilities" or "probabilities"

    def __call__(self, logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None and not self.masks:
            raise NotApplicable("the loss takes no mask and ignores neither label -100 nor -1", called=self.says)
        return self.call(logits, targets, mask)

    @property
    def smoothing(self) -> float:
        """The label smoothing: probability of tokens other than the target. 0 where it cannot be told from rounding."""
        reading = self.reading
        return reading.smoothing if reading and reading.error < EXACT and reading.smoothing > 1e-3 else 0.0


def met_loss(subject: Subject) -> MetLoss:
    """The subject's own loss, else the one that its model returns. Raises NotApplicable where there is none."""
    return subject.once(_recognised_loss)


def _recognised_loss(subject: Subject) -> MetLoss:
    own = subject.part("loss")
    return recognised(forms(own, subject) if own is not None else [model_form(subject)])


def recognised(candidates: Iterable[Form]) -> MetLoss:
    """The loss in the first form in which it is a cross entropy, at least roughly; otherwise in the first that runs."""
    fits: list[tuple[float, Trial]] = []
    errors: list[str] = []
    for form, (domain, into) in itertools.product(candidates, DOMAINS.items()):
        try:
            if domain in SIGNATURES and not takes(form, domain):
                continue
            trial = tried(form, domain, in_domain(form.raw, into))
        except NotApplicable:
            raise
        except Exception as error:
            errors.append(f"{form.says}: {type(error).__name__}: {first_line(error)}")
            if isinstance(error, NoGradient) or form.documented:
                raise
            continue
        fits.append((trial.reading.error, trial))
        if trial.reading.error < EXACT:
            break
    if not fits:
        raise NotApplicable("no way to call the loss was found", tried=list(dict.fromkeys(errors)))
    if all(dead(trial) for _, trial in fits):
        raise NoGradient("its gradient is 0 for any logits and labels")
    rough = [trial for error, trial in fits if error < ROUGH]
    best = fits[-1][1] if fits[-1][0] < EXACT else rough[0] if rough else fits[0][1]
    others = [t.form.says for _, t in fits if t.domain == best.domain and t.form.says != best.form.says]
    return replace(described(best), also_runs=tuple(dict.fromkeys(others)) if best.reading.error < EXACT else ())


@dataclass(frozen=True)
class Trial:
    """A form that runs, given logits converted to one domain."""

    form: Form
    domain: str
    call: Loss
    symbols: Tensor
    left_out: tuple[int, ...]
    reading: Reading

    def read(self, call: Loss, places: int, mask: Tensor | None = None) -> Reading:
        return read(call, self.symbols, self.form.V, places=places, mask=mask)


def tried(form: Form, domain: str, call: Loss) -> Trial:
    places = min(PLACES, form.longest)
    candidates = torch.arange(form.V)[:TRIED]
    symbols = symbols_that_count(call, form.V, places, candidates)
    left_out = tuple(set(candidates.tolist()) - set(symbols.tolist())) if len(symbols) > 1 else ()
    symbols = symbols if len(symbols) > 1 else candidates
    return Trial(form, domain, call, symbols, left_out, read(call, symbols, form.V, places=places))


def dead(trial: Trial) -> bool:
    """Whether the gradient of the loss is 0 everywhere."""
    if trial.form.inside_model or trial.reading.error < torch.inf:
        return False
    labels = trial.symbols[torch.arange(2 * 3).view(2, 3) % len(trial.symbols)]
    logits = torch.randn(2, 3, trial.form.V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return not bool(gradient(trial.call, logits, labels, None).any())


def takes(form: Form, domain: str) -> bool:
    """Whether the loss applies no softmax of its own to this domain, which its gradient shows."""
    places = min(PLACES, form.longest)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2 * places).view(2, places) % form.V
    found = []
    for x in torch.randn(2, 2, places, form.V, generator=generator, dtype=torch.float64):
        x = DOMAINS[domain](x)
        found.append(SIGNATURES[domain](gradient(in_domain(form.raw, DOMAINS["logits"]), x, labels, None), x))
    one, two = found
    return bool(one.any()) and torch.allclose(one, two, rtol=1e-4, atol=1e-6 * float(one.abs().max()))


def described(trial: Trial) -> MetLoss:
    form, call, reading = trial.form, trial.call, trial.reading
    soft = reading.smoothing > SOFT and not reading.even  # a teacher's answer, say, beside the targets
    known = reading.error < ROUGH and not soft
    shift = int(trial.reading.offsets.mode().values) if known and trial.reading.used.any() else 0
    labels = (*IGNORED, *trial.left_out)
    masks = "argument" if form.takes_mask else next((f"label {i}" for i in labels if leaves_out(trial, i)), "")
    if masks.startswith("label"):
        call = masking_labels(call, int(masks.split()[1]))
    call, places = unshifted(call, shift), form.longest - abs(shift)
    dropped = dropped_targets(trial, call, places) if known else ()
    return MetLoss(
        call, form.says, form.V, places, trial.domain, shift, dropped, masks,
        reduction=reduction(trial, call, places, dropped, bool(masks)),
        reading=reading if known else None,
        symbols=trial.symbols, left_out=trial.left_out, weighs_symbols=weighs_symbols(trial),
        inside_model=form.inside_model, changes_logits=form.changes_logits, gives=form.gives,
    )  # fmt: skip


def dropped_targets(trial: Trial, call: Loss, places: int) -> tuple[int, ...]:
    """Positions near the start of every row that carry no loss though nothing masks them: a prompt, say."""
    used = trial.read(call, places).used.any(0)
    dropped = [t for t in range(places) if not used[t]]
    return tuple(dropped) if dropped and max(dropped) < places - 3 else ()


def reduction(trial: Trial, call: Loss, places: int, dropped: tuple[int, ...], masks: bool) -> str:
    """The name of the reduction, read under a ragged mask where possible: only then do all means differ."""
    mask = torch.ones(2, places, dtype=torch.bool)
    if masks:
        mask[1, places - 2 :] = False
    try:
        weight = trial.read(call, places, mask if masks else None).weight
    except Exception:
        return ""
    mask[:, list(dropped)] = False
    # A loose tolerance: this names the reduction also of a loss that smooths or rounds; its value is judged elsewhere.
    return named_reduction(weight, mask, tolerance=0.02)


def weighs_symbols(trial: Trial) -> bool:
    """Whether the weight of a target depends on its token id, as with class weights."""
    if len(trial.symbols) < trial.reading.weight.numel():
        return False
    backwards = read(trial.call, trial.symbols.flip(0), trial.form.V, places=trial.reading.weight.shape[1])
    one, two = by_symbol(trial.reading, trial.symbols), by_symbol(backwards, trial.symbols.flip(0))
    shared = [one[s] / two[s] for s in one if s in two]
    return len(shared) > 1 and spread(shared) < 1e-3 and spread(list(one.values())) > 1e-2


def by_symbol(reading: Reading, symbols: Tensor) -> dict[int, float]:
    places = zip(symbols.tolist(), reading.weight.flatten().tolist(), reading.used.flatten().tolist(), strict=False)
    return {symbol: weight for symbol, weight, used in places if used}


def spread(values: list[float]) -> float:
    return max(values) / min(values) - 1


def leaves_out(trial: Trial, ignored: int) -> bool:
    """Whether labels of this value carry no loss while others still do."""
    places = min(PLACES, trial.form.longest)
    mask = torch.ones(2, places, dtype=torch.bool)
    mask[0, places - 3] = mask[1, places - 2] = False  # near the end: the first targets may carry no loss anyway
    try:
        found = trial.read(masking_labels(trial.call, ignored), places, mask)
        return found.error < ROUGH and 0 < int(found.used.sum()) < int(trial.reading.used.sum())
    except Exception:
        return False


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:120]


# -- a loss made of another


def in_domain(raw: Loss, into: Callable[[Tensor], Tensor]) -> Loss:
    def call(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        result = raw(into(logits).contiguous(), labels.contiguous(), mask)
        if result is None or callable(result) or isinstance(result, ModuleType):
            raise NoGradient(f"it returns {'None' if result is None else f'a {type(result).__name__}'}, not a number")
        if isinstance(result, Tensor) and result.dim() > 1 and result.numel() == logits.numel():
            raise NoGradient(f"it returns a tensor {list(result.shape)}, as many numbers as there are logits")
        return scalar(result)

    return call


def masking_labels(call: Loss, ignored: int) -> Loss:
    return lambda logits, labels, mask: call(
        logits, labels if mask is None else labels.masked_fill(~mask, ignored), None
    )


def unshifted(call: Loss, shift: int) -> Loss:
    """Takes aligned targets: rows are extended by what the subject's own shift cuts off."""
    if not shift:
        return call

    def extended(x: Tensor, extra: Tensor, at_end: bool) -> Tensor:
        return torch.cat((x, extra) if at_end else (extra, x), 1)

    def aligned(logits: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        n = abs(shift)
        rows = logits.detach()[:, :1].expand(-1, n, -1).nan_to_num(0.0)
        labels = extended(targets, targets[:, :1].expand(-1, n), shift < 0)
        if mask is not None:  # the first label is nobody's target, but it is not masked
            mask = extended(mask, torch.ones_like(mask[:, :1]).expand(-1, n), shift < 0)
        return call(extended(logits, rows, shift > 0), labels, mask)

    return aligned


def scalar(result: Any) -> Tensor:
    """The loss in what a call returned: the tensor itself, or the first one in a tuple; several values are summed."""
    if isinstance(result, dict):
        result = (result["loss"],) if "loss" in result else tuple(result.values())
    if isinstance(result, tuple | list):
        result = next(item for item in result if isinstance(item, Tensor) and item.is_floating_point())
    value = result if isinstance(result, Tensor) else torch.as_tensor(result)
    return value.sum() if value.dim() else value
