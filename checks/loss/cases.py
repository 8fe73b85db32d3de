"""Cases for the checks of a loss: random logits under ragged masks, what the loss gives, and what it should give."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..expect import Bound, NotApplicable, advise, fail
from ..subject import Subject
from .explained import explained
from .formula import REDUCTIONS, USUAL, cross_entropy
from .met_loss import MetLoss, met_loss
from .reading import EXACT, gradient, read

FLOAT64 = Bound(1e-9, "float64, relative to the largest")
FLOAT32 = Bound(2e-6, "the loss computes in float32; relative to the largest")
SENTENCE = "I love machine learning"
UNREADABLE = "the gradient is not that of a cross entropy, so it does not show which target each position is trained on"

Case = tuple[list[list[bool]], int, int]  # rows of a mask, how many positions of them are used, and a seed


def readable(subject: Subject, *, mask: bool = False) -> MetLoss:
    """The loss. Raises NotApplicable if its gradient does not show its targets or, with `mask`, it cannot be masked."""
    loss = met_loss(subject)
    if loss.reading is None:
        raise NotApplicable(UNREADABLE, called=loss.says)
    if mask and not loss.masks:
        raise NotApplicable("the loss takes no mask and ignores neither label -100 nor -1", called=loss.says)
    return loss


def closed_form(subject: Subject) -> None:
    """Raises NotApplicable where the loss has no known closed form, and says which legitimate term prevents it."""
    loss = met_loss(subject)
    declared = subject.declared("reduction")
    if declared is not None and declared not in REDUCTIONS:
        raise NotApplicable(f"the declared reduction {declared!r} has no formula here")
    if loss.changes_logits or (loss.inside_model and loss.reading is None):
        raise NotApplicable(
            "the model changes its logits after the head, so its loss cannot be computed for chosen logits"
        )
    expected = subject.declared("smoothing")
    if loss.smoothing and expected is not None and abs(loss.smoothing - expected) > 1e-2:
        fail(
            f"label smoothing gives {loss.smoothing:.3g} of the probability to tokens other than the target, "
            f"declared {expected:g}",
            likely=("labels-smoothed",),
            advice="pass the declared label_smoothing to F.cross_entropy, and 0 in an evaluation",
        )
    if subject.declared("called") is None:
        undeclared(loss)
        usual(subject, loss)


def undeclared(loss: MetLoss) -> None:
    """Raises NotApplicable for label smoothing of another form, class weights and added terms, and says so."""
    if loss.smoothing > 0.5:
        fail(
            f"label smoothing gives {loss.smoothing:.3g} of the probability to tokens other than the target, which "
            f"keeps {1 - loss.smoothing:.3g}: the confidence may have been passed as the smoothing",
            likely=("labels-smoothed",),
            advice="pass the smoothing itself: label_smoothing=0.1 leaves 0.9 to the target",
        )
    if loss.smoothing:
        advise(f"label smoothing gives {loss.smoothing:.3g} of the probability to tokens other than the target")
    if loss.smoothing and loss.reading is not None and not loss.reading.even:
        raise NotApplicable("the loss smooths its targets unevenly, so it has no known closed form")
    if loss.weighs_symbols:
        advise("the loss weights targets by their token id (class weights)")
        raise NotApplicable("targets are weighted by their token id")
    extra = addition(loss)
    if extra:
        advise(f"the loss adds {extra} to the cross entropy")
        raise NotApplicable(f"the loss is the cross entropy plus {extra}")


def usual(subject: Subject, loss: MetLoss) -> None:
    """Raises NotApplicable for a loss that is neither a cross entropy nor a known mistake in one: it may be meant."""
    if loss.reading is not None and loss.reading.error < EXACT:
        return
    if not cause(subject, loss)[0]:
        advise(
            "the loss is not a cross entropy (perhaps a focal loss); the checks cannot tell whether that is intended"
        )
        raise NotApplicable("the loss is not a cross entropy, nor a known mistake in one", called=loss.says)


def addition(loss: MetLoss) -> str:
    """The usual term that the loss adds to its cross entropy; empty if there is none."""
    logits, targets = sample(loss, rows=2, places=loss.places)
    mask = all_kept(loss, masks(loss.places)[1])
    for name in (loss.reduction,) if loss.reduction in USUAL else USUAL[:2]:
        weights, everywhere = (REDUCTIONS[name](m) for m in (mask, torch.ones_like(mask)))
        extras, squares = [], []
        for x in (logits, 2 * logits.flip(-1), 0.5 * logits + 1):
            want = (weights * cross_entropy(x, targets, loss.smoothing)).sum()
            extras.append(float(loss(x, targets, mask_for(loss, mask)).detach() - want))
            squares.append([float((w * x.logsumexp(-1).square()).sum()) for w in (weights, everywhere)])
        size = max(map(abs, extras))
        if size > 1e-6 and constant_of_masked(loss, logits, targets, name, extras[0]):
            return ""
        if size > 1e-6 and max(extras) - min(extras) < 1e-5 * size:
            return f"{extras[0]:.3g} for any logits (an auxiliary loss)"
        for column in (0, 1):
            factors = [extra / square[column] for extra, square in zip(extras, squares, strict=True)]
            if size > 1e-6 and max(factors) - min(factors) < 1e-3 * abs(factors[0]):
                return f"{factors[0]:.3g} × (log Σ exp)² (a z-loss)"
    return ""


def constant_of_masked(loss: MetLoss, logits: Tensor, targets: Tensor, name: str, extra: float) -> bool:
    """Whether the addition vanishes without masked targets, as ln V of logits set to 0 does: then it is a mistake."""
    whole = all_kept(loss, torch.ones_like(targets, dtype=torch.bool))
    want = (REDUCTIONS[name](whole) * cross_entropy(logits, targets, loss.smoothing)).sum()
    left = abs(float(loss(logits, targets, mask_for(loss, whole)).detach() - want))
    return bool(loss.masks) and left < 1e-3 * abs(extra)


def cause(subject: Subject, loss: MetLoss) -> tuple[str, tuple[str, ...]]:
    """What the loss of a ragged batch equals instead, and the bugs that cause it; else the weights that it uses."""
    logits, targets = sample(loss, rows=2, places=loss.places, seed=1)
    mask = all_kept(loss, masks(loss.places)[1])
    got = float(loss(logits, targets, mask_for(loss, mask)).detach())
    rounded = loss.reading is not None and loss.reading.error > EXACT and not smooth(loss, logits, targets)
    says, likely = explained(got, logits, targets, mask, reduction(subject, loss), rounded=rounded)
    return (says, likely) if says else (weighed(subject, loss, mask), ())


def smooth(loss: MetLoss, logits: Tensor, targets: Tensor) -> bool:
    """Whether a small change of the logits changes the loss as its gradient says; in 16 bits it changes in steps."""
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    slope = float((gradient(loss, logits, targets, None) * direction).sum())
    up, down = (float(loss(logits + h * direction, targets, None).detach()) for h in (1e-4, -1e-4))
    return abs((up - down) / 2e-4 - slope) < 0.05 * abs(slope) + 1e-6


def weighed(subject: Subject, loss: MetLoss, mask: Tensor) -> str:
    """The weights of targets, relative to the right ones, in a loss that is a cross entropy at each position."""
    if loss.reading is None or loss.reading.error > EXACT:
        return ""
    found = read(loss, loss.symbols, loss.V, places=loss.places, mask=mask_for(loss, mask)).weight
    right = weights_of(subject, loss, mask)
    rows = [(found[row][kept] / right[row][kept]).tolist() for row, kept in enumerate(mask)]
    if all(max(row) < (1 + EXACT) * min(row) for row in rows):
        each = ", ".join(f"× {all_[0]:.4g} in row {row} ({len(all_)} targets)" for row, all_ in enumerate(rows))
        return f"on a ragged batch the weight of each target is wrong: {each}"
    uneven = next(row for row, all_ in enumerate(rows) if max(all_) > (1 + EXACT) * min(all_))
    each = ", ".join(f"{value:.3g}" for value in rows[uneven])
    return f"the targets of row {uneven} have {each} times the right weight"


def reduction(subject: Subject, loss: MetLoss) -> str:
    """The declared reduction, else the measured one, else the mean."""
    declared = subject.declared("reduction")
    if declared is None and loss.reduction in USUAL:
        return loss.reduction
    return declared if declared in REDUCTIONS else USUAL[0]


def remark_on_rows(subject: Subject, loss: MetLoss) -> None:
    """Says where the mean is first over each row: a usual choice, but not what F.cross_entropy does."""
    if subject.declared("reduction") is None and loss.masks and "each row's mean" in loss.reduction:
        advise(
            f"the loss is {loss.reduction}: a target in a row with 2 unmasked targets counts 4 times as much as one "
            "in a row with 8, where F.cross_entropy counts all targets alike"
        )


def weights_of(subject: Subject, loss: MetLoss, mask: Tensor) -> Tensor:
    return REDUCTIONS[reduction(subject, loss)](all_kept(loss, mask))


def precision(loss: MetLoss) -> Bound:
    return FLOAT64 if loss.reading is None or loss.reading.error < 1e-11 or loss.reading.error > EXACT else FLOAT32


def sample(loss: MetLoss, *, rows: int, places: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, places, loss.V, generator=generator, dtype=torch.float64)
    return logits, loss.symbols[torch.randint(len(loss.symbols), (rows, places), generator=generator)]


def problem(loss: MetLoss, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets and mask of a drawn case."""
    rows, places, seed = case
    mask = torch.tensor(rows)[:, :places]
    needy = mask[:1] if loss.reduction in USUAL[:2] else mask  # a mean needs at least one target
    needy[~needy[:, len(loss.dropped) :].any(1), -1] = True
    return *sample(loss, rows=len(mask), places=places, seed=seed), mask


def mask_for(loss: MetLoss, mask: Tensor) -> Tensor | None:
    """The mask, for a loss that takes one."""
    return mask if loss.masks else None


def all_kept(loss: MetLoss, mask: Tensor) -> Tensor:
    """The targets that should count: those of the mask, or all if the loss takes none, except those that it drops."""
    kept = mask.clone() if loss.masks else torch.ones_like(mask)
    kept[:, list(loss.dropped)] = False
    return kept


def masks(T: int) -> list[Tensor]:
    """[2, T] each: a prompt, padding at the end, padding at the start, holes; the second row always keeps more."""
    positions = torch.arange(T)
    prompt = torch.stack((positions >= 3, positions >= 1))
    right = torch.stack((positions < T - 3, positions < T - 1))
    left = torch.stack((positions >= 2, positions >= 0))
    holes = torch.stack((positions % 3 != 1, positions % 4 != 2))
    return [prompt, right, left, holes]


def draw(subject: Subject) -> st.SearchStrategy[Case]:
    """A mask of any shape that keeps at least one target of its first row."""
    loss = met_loss(subject)
    places, least = loss.places, max(loss.dropped, default=-1) + 2
    row = st.lists(st.booleans(), min_size=places, max_size=places)
    return st.tuples(
        st.lists(row, min_size=1, max_size=3).filter(lambda rows: any(rows[0])),
        st.integers(least, places),
        st.integers(0, 999),
    )


# -- the loss of logits whose loss is known


def shown_apart(one: float, other: float) -> tuple[str, str]:
    """Two numbers with four digits, or with as many as tell them apart."""
    digits = next((n for n in range(4, 17) if f"{one:.{n}g}" != f"{other:.{n}g}"), 4)
    return f"{one:.{digits}g}", f"{other:.{digits}g}"


def needs_own_softmax(loss: MetLoss) -> None:
    if loss.domain != "logits":
        raise NotApplicable(f"the loss takes {loss.domain}: the softmax is not its own", takes=loss.domain)


def padded(loss: MetLoss) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a ragged batch, of the same with two more columns of padding, and with other content there."""
    logits, targets = sample(loss, rows=2, places=loss.places)
    long = loss.places - 2
    mask = torch.arange(loss.places) < torch.tensor([[long], [long - 2]])
    short = loss(logits[:, :long], targets[:, :long], mask[:, :long])
    whole = loss(logits, targets, mask)
    other = loss(logits.masked_fill(~mask[..., None], 3.0), targets.masked_fill(~mask, int(loss.symbols[0])), mask)
    return short.detach(), whole.detach(), other.detach()


def known(subject: Subject, loss: MetLoss) -> tuple[float, float, float]:
    """The mean loss of logits certain of the target, certain of the target before it, and all equal."""
    targets = loss.symbols[torch.arange(2 * loss.places).view(2, -1) * 3 % len(loss.symbols)]
    one_hot = torch.nn.functional.one_hot(targets, loss.V).double()
    mask = torch.ones_like(targets, dtype=torch.bool) if loss.masks else None
    share = 1.0 / float(weights_of(subject, loss, torch.ones_like(targets).bool()).sum())
    sure, copied, equal = (
        float(loss(logits, targets, mask)) * share for logits in (60 * one_hot, 60 * one_hot.roll(1, 1), 0 * one_hot)
    )
    return sure, copied, equal


def extreme(subject: Subject, loss: MetLoss, size: float, dtype: torch.dtype) -> tuple[float, float, Tensor]:
    """The loss of logits up to a size, what it should be, and its gradient."""
    logits, targets = sample(loss, rows=2, places=loss.places)
    logits = (logits / logits.abs().max() * size).to(dtype)
    weights = weights_of(subject, loss, torch.ones_like(targets).bool())
    want = float((weights * cross_entropy(logits, targets, loss.smoothing)).sum())
    return float(loss(logits, targets, None)), want, gradient(loss, logits, targets, None)


def in_bfloat16(subject: Subject, loss: MetLoss) -> tuple[float, float, float]:
    """The loss of bfloat16 logits, what it should be, and the relative error of PyTorch's own cross entropy."""
    logits, targets = sample(loss, rows=96, places=loss.places)
    logits = (3 * logits).bfloat16()
    everything = torch.ones_like(targets).bool()
    weights = weights_of(subject, loss, everything)
    want = float((weights * cross_entropy(logits, targets, loss.smoothing)).sum())
    try:
        got = float(loss(logits, targets, everything if loss.masks == "argument" else None))
    except RuntimeError as error:
        raise NotApplicable("the loss takes no bfloat16 logits", error=str(error).splitlines()[0]) from None
    plain = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    return got, want, abs(plain / float(cross_entropy(logits, targets).mean()) - 1)


def sentence_ids(subject: Subject) -> set[int]:
    """The ids of the homework's sentence by the subject's own tokenizer; empty if it has none that can be asked."""
    encode = getattr(subject.part("tokenizer"), "encode", None)
    try:
        return {int(i) for i in encode(SENTENCE)} if encode else set()
    except Exception:
        return set()
