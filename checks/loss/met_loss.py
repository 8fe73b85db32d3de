"""How a foreign loss is met: what it takes is found by its parameters' names and by calling it. Nothing here judges.

Whatever it takes, checks call it as `loss(logits [B, T, V], targets [B, T], mask [B, T] or None)`, targets aligned.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ..expect import NotApplicable
from ..subject import Subject
from ..watch.calls import recorded
from .formula import named_reduction
from .reading import EXACT, ROUGH, Loss, NoGradient, Reading, gradient, read, symbols_that_count

VOCABULARY = 17
PLACES = 7  # targets in a row of a reading
SPARE = 2  # room for a shift inside
TRIED = 32  # symbols tried as labels, where the vocabulary is larger

NAMES = {
    "logits": "logits logit input inputs output outputs out pred preds prediction predictions x y_pred y_hat yhat "
    "log_probs logprobs log_prob scores probs source input_batch idx data",
    "targets": "targets target labels label y y_true gold tgt trg tokens token_ids ids target_ids target_batch",
    "model": "model net network",
    "batch": "batch",
    "vocabulary": "vocab_size n_vocab vocab num_classes n_classes",
    "device": "device",
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "[B, T, V]": lambda x: x,
    "[B·T, V]": lambda x: x.flatten(0, 1),
    "[B, V, T]": lambda x: x.transpose(1, 2),
}
DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda x: x,
    "log-probabilities": lambda x: x.log_softmax(-1),
    "probabilities": lambda x: x.softmax(-1),
}
# What does not depend on the input, of a loss that takes it without a softmax of its own: -Σ q x, -Σ q log x
SIGNATURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "log-probabilities": lambda gradient, x: gradient,
    "probabilities": lambda gradient, x: gradient * x,
}
IGNORED = (-100, -1)
KINDS = (torch.bool, torch.float32, torch.int64)  # of a mask argument
MODEL_TARGETS = ("targets", "target", "labels", "label", "y", "tgt", "lm_labels")


@dataclass(frozen=True)
class MetLoss:
    """A loss as checks call it, and what was found out about it."""

    call: Loss
    says: str  # how the subject's own is called
    V: int  # symbols of the logits it can be asked about
    places: int  # targets in the longest row it can be asked about
    domain: str = "logits"
    shift: int = 0  # made up for: its logits at t are trained on its label at t + shift
    dropped: tuple[int, ...] = ()  # targets of a row that carry no loss by themselves
    masks: str = ""  # "argument", "label -100", "label -1"; empty: it cannot be told what to leave out
    reduction: str = ""  # empty: none that is known
    reading: Reading | None = None  # of the loss as it takes labels; None: it is no cross entropy
    symbols: Tensor = field(default_factory=lambda: torch.arange(VOCABULARY))  # that carry loss as targets
    left_out: tuple[int, ...] = ()  # that do not
    weighs_symbols: bool = False  # a target counts more or less by its token id
    also_runs: tuple[str, ...] = ()  # ways of calling it that give something else
    inside_model: bool = False
    changes_logits: bool = False  # the model does, between the logits given and its loss

    def __call__(self, logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None and not self.masks:
            raise NotApplicable("the loss takes no mask, and labels of -100 and -1 are not left out", called=self.says)
        return self.call(logits, targets, mask)

    @property
    def smoothing(self) -> float:
        """Probability that the loss gives to symbols other than the target; 0 where it cannot be told from rounding."""
        reading = self.reading
        return reading.smoothing if reading and reading.error < EXACT and reading.smoothing > 1e-3 else 0.0


def met_loss(subject: Subject) -> MetLoss:
    """The subject's own loss, else the one that its model returns. Raises NotApplicable where there is none."""
    met = _meet(subject)
    if isinstance(met, NotApplicable):
        raise NotApplicable(met.reason, **met.evidence)
    return met


@functools.lru_cache(maxsize=4)
def _meet(subject: Subject) -> MetLoss | NotApplicable:
    own = subject.part("loss")
    try:
        return recognised(forms(own, subject) if own is not None else [model_form(subject)])
    except NotApplicable as reason:
        return reason


@dataclass(frozen=True)
class Form:
    """One way in which a loss may be called: `raw` takes labels and mask as the loss aligns them."""

    raw: Loss
    says: str
    V: int
    longest: int = PLACES + SPARE  # the longest row of labels
    takes_mask: bool = False
    inside_model: bool = False
    changes_logits: bool = False  # the model does, after the module whose output is replaced
    documented: bool = False  # the subject says how it is called: that it cannot be is its own mistake


def recognised(candidates: Any) -> MetLoss:
    """The first form under which the loss is a cross entropy, roughly at least; else the first that runs."""
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
        raise NotApplicable("no way of calling the loss was found", tried=list(dict.fromkeys(errors)))
    if all(dead(trial) for _, trial in fits):
        raise NoGradient("its gradient is 0 whatever the logits and the labels are")
    rough = [trial for error, trial in fits if error < ROUGH]
    best = fits[-1][1] if fits[-1][0] < EXACT else rough[0] if rough else fits[0][1]
    others = [t.form.says for _, t in fits if t.domain == best.domain and t.form.says != best.form.says]
    return replace(described(best), also_runs=tuple(dict.fromkeys(others)) if best.reading.error < EXACT else ())


@dataclass(frozen=True)
class Trial:
    """A form that runs, on logits put into one domain."""

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
    """Whether the loss of given logits has no gradient at all."""
    if trial.form.inside_model or trial.reading.error < torch.inf:
        return False
    labels = trial.symbols[torch.arange(2 * 3).view(2, 3) % len(trial.symbols)]
    logits = torch.randn(2, 3, trial.form.V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return not bool(gradient(trial.call, logits, labels, None).any())


def takes(form: Form, domain: str) -> bool:
    """Whether the loss takes log-probabilities or probabilities as they are: then its own gradient is simple."""
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
    form, call, known = trial.form, trial.call, trial.reading.error < ROUGH
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
        reading=trial.reading if known else None,
        symbols=trial.symbols, left_out=trial.left_out, weighs_symbols=weighs_symbols(trial),
        inside_model=form.inside_model, changes_logits=form.changes_logits,
    )  # fmt: skip


def dropped_targets(trial: Trial, call: Loss, places: int) -> tuple[int, ...]:
    """Targets near the start of every row that carry no loss though nothing masks them: a prompt, say."""
    used = trial.read(call, places).used.any(0)
    dropped = [t for t in range(places) if not used[t]]
    return tuple(dropped) if dropped and max(dropped) < places - 3 else ()


def reduction(trial: Trial, call: Loss, places: int, dropped: tuple[int, ...], masks: bool) -> str:
    """Found under a ragged mask where the loss takes one: without, a mean over rows is a mean."""
    mask = torch.ones(2, places, dtype=torch.bool)
    if masks:
        mask[1, places - 2 :] = False
    try:
        weight = trial.read(call, places, mask if masks else None).weight
    except Exception:
        return ""
    mask[:, list(dropped)] = False
    # Loose: this only names how a loss reduces, also one that smooths or rounds; its value is judged elsewhere.
    return named_reduction(weight, mask, tolerance=0.02)


def weighs_symbols(trial: Trial) -> bool:
    """Whether the weight of a place goes with the symbol there, as class weights make it."""
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
    mask[0, places - 3] = mask[1, places - 2] = False  # late: the first may carry no loss anyway
    try:
        found = trial.read(masking_labels(trial.call, ignored), places, mask)
        return found.error < ROUGH and 0 < int(found.used.sum()) < int(trial.reading.used.sum())
    except Exception:
        return False


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:120]


# A loss made of another


def in_domain(raw: Loss, into: Callable[[Tensor], Tensor]) -> Loss:
    def call(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        result = raw(into(logits).contiguous(), labels.contiguous(), mask)
        if result is None or callable(result) or isinstance(result, ModuleType):
            raise NoGradient(f"it gives {'None' if result is None else f'a {type(result).__name__}'}, not a number")
        if isinstance(result, Tensor) and result.dim() > 1 and result.numel() == logits.numel():
            raise NoGradient(f"it gives a tensor {list(result.shape)}, as many numbers as there are logits")
        return scalar(result)

    return call


def masking_labels(call: Loss, ignored: int) -> Loss:
    return lambda logits, labels, mask: call(
        logits, labels if mask is None else labels.masked_fill(~mask, ignored), None
    )


def unshifted(call: Loss, shift: int) -> Loss:
    """Takes aligned targets: what the shift inside cuts off is put there to be cut off."""
    if not shift:
        return call

    def extended(x: Tensor, extra: Tensor, at_end: bool) -> Tensor:
        return torch.cat((x, extra) if at_end else (extra, x), 1)

    def aligned(logits: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        n = abs(shift)
        rows = logits.detach()[:, :1].expand(-1, n, -1).nan_to_num(0.0)
        labels = extended(targets, targets[:, :1].expand(-1, n), shift < 0)
        if mask is not None:  # the first label is no one's target, yet a token like any other
            mask = extended(mask, torch.ones_like(mask[:, :1]).expand(-1, n), shift < 0)
        return call(extended(logits, rows, shift > 0), labels, mask)

    return aligned


def scalar(result: Any) -> Tensor:
    """The loss in what a call returned: itself or the first tensor of a tuple; several values are added up."""
    if isinstance(result, dict):
        result = (result["loss"],) if "loss" in result else tuple(result.values())
    if isinstance(result, tuple | list):
        result = next(item for item in result if isinstance(item, Tensor) and item.is_floating_point())
    result = result if isinstance(result, Tensor) else torch.as_tensor(result)
    return result.sum() if result.dim() else result


# Forms: how a function's parameters are filled


def forms(function: Any, subject: Subject) -> Iterator[Form]:
    """Every way in which this loss may be called, the likeliest first."""
    roles = parameter_roles(function)
    mask = next((name for name, role in roles.items() if role == "mask"), None)
    drops = mask is not None and any(word in mask.lower() for word in ("pad", "ignore", "drop", "exclude"))
    declared = subject.declared("called") is not None
    layouts = ["[B, T, V]"] if "model" in roles.values() or declared else list(LAYOUTS)
    sizes = dict.fromkeys((VOCABULARY, subject.sizes.vocab_size))
    for V, layout, kind in itertools.product(sizes, layouts, KINDS if mask and not declared else KINDS[:1]):
        says = ", ".join(f"{name} {layout}" if role == "logits" else name for name, role in roles.items())
        raw = filled(function, roles, layout, V, kind, drops)
        yield Form(raw, f"loss({says})", V, takes_mask=mask is not None, documented=declared)


def filled(function: Any, roles: dict[str, str], layout: str, V: int, kind: torch.dtype, drops: bool) -> Loss:
    arrange, flat, needs_mask = LAYOUTS[layout], layout == "[B·T, V]", requires(function, "mask", roles)

    def raw(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Any:
        if mask is None and needs_mask:
            mask = torch.ones_like(labels, dtype=torch.bool)
        if mask is not None:
            mask = (~mask if drops else mask).to(kind).contiguous()
        values = {
            "logits": torch.zeros_like(labels) if "model" in roles.values() else arrange(logits),
            "targets": labels.flatten() if flat else labels,
            "mask": mask.flatten() if mask is not None and flat else mask,
            "ignore": IGNORED[0],
            "vocabulary": V,
            "model": Scripted(logits),
            "batch": (torch.zeros_like(labels), labels),
            "device": logits.device,
        }
        given = {name: values[role] for name, role in roles.items()}
        if mask is None:
            given = {name: value for name, value in given.items() if roles[name] != "mask"}
        positional = [given.pop(name) for name in list(given) if name.isdigit()]
        return function(*positional, **given)

    return raw


def parameter_roles(function: Any) -> dict[str, str]:
    """What each parameter is for, in order. Optional ones are left alone, logits, targets and masks excepted.

    Raises NotApplicable for a required one that is for nothing known here.
    """
    try:
        called = function.forward if isinstance(function, nn.Module) else function
        parameters = list(inspect.signature(called).parameters.values())
    except (TypeError, ValueError):
        return {"0": "logits", "1": "targets"}
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not named:
        return {"0": "logits", "1": "targets"}
    roles: dict[str, str] = {}
    for parameter in named:
        required, taken = parameter.default is parameter.empty, list(roles.values())
        role = role_of(parameter.name.lower(), taken)
        if required and (not role or role in taken):
            role = next((other for other in ("logits", "targets", "mask") if other not in taken), "")
            if not role:
                raise NotApplicable(f"the loss takes {parameter.name!r}, and what that is is not known here")
        if role and role not in taken and (required or role in ("logits", "targets", "mask")):
            roles[parameter.name] = role
    return roles


def requires(function: Any, role: str, roles: dict[str, str]) -> bool:
    called = function.forward if isinstance(function, nn.Module) else function
    name = next((name for name, found in roles.items() if found == role), None)
    return name is not None and inspect.signature(called).parameters[name].default is inspect.Parameter.empty


def role_of(name: str, taken: list[str]) -> str:
    if "mask" in name or name in ("loss_weights", "token_weights", "keep"):
        return "mask"
    if "ignore" in name or ("pad" in name and any(word in name for word in ("id", "index", "token"))):
        return "ignore"
    if name == "tokens" and "model" in taken and "logits" not in taken:
        return "logits"  # loss(model, tokens, targets): what the model reads
    return next((role for role, names in NAMES.items() if name in names.split()), "")


class Scripted(nn.Module):
    """A model whose logits are given, for losses that call a model themselves."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.logits


# The loss that a model returns


def model_form(subject: Subject) -> Form:
    """`model(tokens, targets)`, its head's output replaced by the logits given: so it is a loss of any logits."""
    model = subject.build()
    parameters = inspect.signature(model.forward).parameters
    name = next((name for name in MODEL_TARGETS if name in parameters), None)
    if name is None:
        raise NotApplicable("the subject brings no loss, and its model takes no targets")
    try:
        inspect.signature(model.forward).bind(None, **{name: None})
    except TypeError as error:
        raise NotApplicable(f"the forward does not take tokens and {name} alone: {error}") from None
    head, plain = find_head(subject, model, name)

    def raw(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        with patch.object(head, "forward", lambda *args, **kwargs: logits):  # put back: it may be the only instance
            return returned_loss(model, model(torch.zeros_like(labels), **{name: labels}))

    longest = min(PLACES + SPARE, subject.sizes.block_size)
    V, says = subject.sizes.vocab_size, f"model(tokens, {name}=…)"
    return Form(raw, says, V, longest, inside_model=True, changes_logits=not plain)


def find_head(subject: Subject, model: nn.Module, name: str) -> tuple[nn.Module, bool]:
    """The last module that gives [B, T, V], and whether what it gives are the model's logits as they are.

    What a model does afterwards (a softcap, a log-softmax, something added) stays in place.
    """
    tokens = subject.tokens(2, min(PLACES, subject.sizes.block_size))
    with torch.no_grad(), recorded(model) as calls:
        result = called_with_targets(subject, model, tokens, name)
    wanted = (*tokens.shape, subject.sizes.vocab_size)
    logits = [t.flatten() for t in tensors_of(result) if t.dim() > 1 and t.shape[-1] == wanted[-1]]
    for call in reversed(calls):
        given = next((output for output in call.outputs if output.shape == wanted), None)
        if call.module != type(model).__name__ and given is not None:
            plain = not logits or any(torch.equal(t, given.flatten()) for t in logits)
            return model.get_submodule(call.module), plain
    raise NotApplicable("the loss is inside the model and no module gives its logits, so they cannot be replaced")


def called_with_targets(subject: Subject, model: nn.Module, tokens: Tensor, name: str) -> Any:
    """Raises NotApplicable for a model that takes targets at its full block size only."""
    try:
        return model(tokens, **{name: tokens})
    except Exception:
        whole = subject.tokens(2, subject.sizes.block_size)
        if whole.shape == tokens.shape:
            raise
        try:
            model(whole, **{name: whole})
        except Exception:
            whole = tokens
        if whole is tokens:
            raise
    raise NotApplicable("the model takes targets only for rows as long as its block size")


def returned_loss(model: nn.Module, result: Any) -> Tensor:
    """The scalar among what the model returned, or what it left in `last_loss`."""
    scalars = [t for t in tensors_of(result) if t.dim() == 0 and t.is_floating_point()]
    left = getattr(model, "last_loss", None)
    if not scalars and isinstance(left, Tensor):
        scalars = [left]
    if not scalars:
        raise NotApplicable("the model takes targets but returns no loss")
    return scalars[0]


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if hasattr(value, "loss"):
        return tensors_of([value.loss, getattr(value, "logits", None)])
    items = list(value.values()) if isinstance(value, dict) else value
    return [t for item in items for t in tensors_of(item)] if isinstance(items, tuple | list) else []
