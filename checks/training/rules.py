"""The published rules of optimizers, on one parameter: where a list of gradients takes it. Variants are arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """What an optimizer was given, under its usual names."""

    lr: float = 0.05
    betas: tuple[float, float] = (0.8, 0.95)
    eps: float = 1e-2
    weight_decay: float = 0.1
    momentum: float = 0.8
    alpha: float = 0.9  # of RMSprop: how much of the mean of squares is kept
    nesterov: bool = False


Rule = Callable[[Tensor, Sequence[Tensor], Settings], list[Tensor]]  # the parameter after each gradient


def moved(p: Tensor, g: Tensor, h: Settings, decay: str, direction: Callable[[Tensor], Tensor]) -> Tensor:
    """One step of size lr against `direction(g)`; weight decay as part of the gradient, or apart from it."""
    if decay == "in the gradient":
        return p - h.lr * direction(g + h.weight_decay * p)
    step = h.lr * direction(g)
    if decay == "apart":
        return p * (1 - h.lr * h.weight_decay) - step
    if decay == "afterwards":
        return (p - step) * (1 - h.lr * h.weight_decay)
    if decay == "without the rate":
        return p * (1 - h.weight_decay) - step
    if decay == "afterwards, without the rate":
        return (p - step) * (1 - h.weight_decay)
    return p - step  # "none"


def adam(
    decay: str = "apart",
    *,
    eps: str = "outside",
    corrected: tuple[bool, bool] = (True, True),
    counts: bool = True,
    swapped: bool = False,
    power: int = 2,
    root: bool = True,
) -> Rule:
    """Kingma and Ba, 2015, algorithm 1; Loshchilov and Hutter, 2019, for the decay apart from the gradient."""

    def run(p: Tensor, grads: Sequence[Tensor], h: Settings) -> list[Tensor]:
        b1, b2 = reversed(h.betas) if swapped else h.betas
        m, v, path = torch.zeros_like(p), torch.zeros_like(p), []
        for k, g in enumerate(grads):
            t = k + 1 if counts else 1

            def direction(g: Tensor, t: int = t) -> Tensor:
                nonlocal m, v
                m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g.abs() ** power
                first = m / (1 - b1**t) if corrected[0] else m
                c = 1 - b2**t if corrected[1] else 1.0
                return first / denominator(v / c, h.eps * (c**-0.5 if eps == "before the correction" else 1), eps, root)

            p = moved(p, g, h, decay, direction)
            path.append(p)
        return path

    return run


def denominator(squares: Tensor, eps: float, place: str, root: bool = True) -> Tensor:
    if place == "left out":
        eps = 0.0
    if place == "inside" and root:
        return (squares + eps).sqrt()
    return (squares.sqrt() if root else squares) + eps


def rmsprop(decay: str = "in the gradient", *, eps: str = "outside", power: int = 2, root: bool = True) -> Rule:
    """Hinton's lecture 6e, 2012."""

    def run(p: Tensor, grads: Sequence[Tensor], h: Settings) -> list[Tensor]:
        v, path = torch.zeros_like(p), []
        for g in grads:

            def direction(g: Tensor) -> Tensor:
                nonlocal v
                v = h.alpha * v + (1 - h.alpha) * g.abs() ** power
                return g / denominator(v, h.eps, eps, root)

            p = moved(p, g, h, decay, direction)
            path.append(p)
        return path

    return run


def adagrad(decay: str = "in the gradient", *, eps: str = "outside", power: int = 2, root: bool = True) -> Rule:
    """Duchi, Hazan and Singer, 2011."""

    def run(p: Tensor, grads: Sequence[Tensor], h: Settings) -> list[Tensor]:
        v, path = torch.zeros_like(p), []
        for g in grads:

            def direction(g: Tensor) -> Tensor:
                nonlocal v
                v = v + g.abs() ** power
                return g / denominator(v, h.eps, eps, root)

            p = moved(p, g, h, decay, direction)
            path.append(p)
        return path

    return run


def sgd(decay: str = "in the gradient", *, kind: str = "sum", falling: bool = False) -> Rule:
    """With momentum as PyTorch has it, the sum; as a mean, which takes 1 - momentum of each gradient; or dropped.

    `falling` divides the rate by the root of the step, as the first optimizer of a well-known course does.
    """

    def run(p: Tensor, grads: Sequence[Tensor], h: Settings) -> list[Tensor]:
        b, path = torch.zeros_like(p), []
        for k, g in enumerate(grads):

            def direction(g: Tensor, k: int = k) -> Tensor:
                nonlocal b
                share = 1 - h.momentum if kind == "mean" else 1.0
                b = (h.momentum * b if kind != "forgets" else 0) + share * g
                return (g + h.momentum * b if h.nesterov else b) / (math.sqrt(k + 1) if falling else 1)

            p = moved(p, g, h, decay, direction)
            path.append(p)
        return path

    return run


def lion(decay: str = "apart", *, signed: bool = True, swapped: bool = False, late: bool = False) -> Rule:
    """Chen et al., 2023, algorithm 2. `late` takes the sign of the momentum that it has just updated."""

    def run(p: Tensor, grads: Sequence[Tensor], h: Settings) -> list[Tensor]:
        b1, b2 = reversed(h.betas) if swapped else h.betas
        m, path = torch.zeros_like(p), []
        for g in grads:

            def direction(g: Tensor) -> Tensor:
                nonlocal m
                step = b1 * m + (1 - b1) * g
                m = b2 * m + (1 - b2) * g
                step = m if late else step
                return step.sign() if signed else step

            p = moved(p, g, h, decay, direction)
            path.append(p)
        return path

    return run


APART = ("apart", "afterwards")
DECAYS = ("in the gradient", *APART)
WITHOUT_THE_RATE = ("without the rate", "afterwards, without the rate")
EPS = ("outside", "inside", "before the correction")

# What each is, in every form that is published under its name.
RIGHT: dict[str, list[Rule]] = {
    "adamw": [adam(decay, eps=eps) for decay in APART for eps in EPS],
    "adam": [adam(decay, eps=eps) for decay in DECAYS for eps in EPS],
    "rmsprop": [rmsprop(decay, eps=eps) for decay in DECAYS for eps in EPS[:2]],
    "adagrad": [adagrad(decay, eps=eps) for decay in DECAYS for eps in EPS[:2]],
    "sgd": [sgd(decay, kind=kind, falling=f) for decay in DECAYS for kind in ("sum", "mean") for f in (False, True)],
    "lion": [lion(decay) for decay in APART],
}
# As the paper on decay apart from the gradient writes it; few mean it, whose decay is then a hundred times what it was.
UNSCALED: dict[str, list[Rule]] = {
    "adamw": [adam(decay, eps=eps) for decay in WITHOUT_THE_RATE for eps in EPS],
    "adam": [adam(decay, eps=eps) for decay in WITHOUT_THE_RATE for eps in EPS],
    "lion": [lion(decay) for decay in WITHOUT_THE_RATE],
}
Wrong = list[tuple[str, str, list[Rule]]]  # what it does, the known bug, its rules


def _adam_mistakes(decays: Sequence[str]) -> Wrong:
    def each(**how: Any) -> list[Rule]:
        return [adam(decay, eps=eps, **how) for decay in decays for eps in EPS]

    uncorrected = "adam-without-bias-correction"
    return [
        ("there is no bias correction", uncorrected, each(corrected=(False, False))),
        ("only the first moment is corrected for its bias", uncorrected, each(corrected=(True, False))),
        ("only the second moment is corrected for its bias", uncorrected, each(corrected=(False, True))),
        ("the bias correction stays that of step 1: steps are not counted", "adam-does-not-count", each(counts=False)),
        ("beta1 and beta2 have changed places", "adam-swaps-its-betas", each(swapped=True)),
        ("eps is left out", "adam-forgets-eps", [adam(decay, eps="left out") for decay in decays]),
        ("the second moment is that of |g|, not of g²", "adam-second-moment", each(power=1)),
        ("the root of the second moment is not taken", "adam-second-moment", each(root=False)),
        ("weight decay is left out", "decay-is-left-out", [adam("none", eps=eps) for eps in EPS]),
    ]  # fmt: skip


def _square_mistakes(rule: Callable[..., Rule]) -> Wrong:
    return [
        ("eps is left out", "adam-forgets-eps", [rule(decay, eps="left out") for decay in DECAYS]),
        ("it adds |g|, not g²", "adam-second-moment", [rule(decay, power=1) for decay in DECAYS]),
        ("the root of the squares is not taken", "adam-second-moment", [rule(decay, root=False) for decay in DECAYS]),
        ("weight decay is left out", "decay-is-left-out", [rule("none", eps=eps) for eps in EPS[:2]]),
    ]


WRONG: dict[str, Wrong] = {
    "adamw": [
        ("weight decay is part of the gradient (L2, as in Adam), not apart from it", "adamw-couples-its-decay",
         [adam("in the gradient", eps=eps) for eps in EPS]),
        *_adam_mistakes(APART),
    ],
    "adam": _adam_mistakes(DECAYS),
    "rmsprop": _square_mistakes(rmsprop),
    "adagrad": _square_mistakes(adagrad),
    "sgd": [
        ("the momentum is not kept from step to step", "sgd-forgets-its-momentum",
         [sgd(decay, kind="forgets") for decay in DECAYS]),
        ("weight decay is left out", "decay-is-left-out", [sgd("none", kind=kind) for kind in ("sum", "mean")]),
    ],
    "lion": [
        ("it steps by the momentum, not by its sign", "lion-without-its-sign", [lion(d, signed=False) for d in APART]),
        ("beta1 and beta2 have changed places", "adam-swaps-its-betas", [lion(decay, swapped=True) for decay in APART]),
        ("it takes the sign of the momentum after its update: beta1 has no effect", "lion-updates-too-early",
         [lion(decay, late=True) for decay in APART]),
        ("weight decay is part of the gradient, which only its sign hears of", "adamw-couples-its-decay",
         [lion("in the gradient")]),
        ("weight decay is left out", "decay-is-left-out", [lion("none")]),
    ],
}  # fmt: skip
