"""What a norm computes, read off the module itself: its kind, what it averages over, its epsilon and where that is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

SAME = 1e-7  # relative: the directions of a norm's output and of its input, and its averages, in float64
NO_EPS = 1e-15  # below this an epsilon is none
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
USUAL_EPS = (*(float(f"1e-{n}") for n in range(3, 13)), *(torch.finfo(dtype).eps for dtype in DTYPES))


@dataclass(frozen=True)
class NormForm:
    """`kind` is "layer" or "rms"; `over` what the squares are divided by: "C", "C - 1" or "1"."""

    kind: str
    over: str
    eps: float
    inside: bool  # epsilon is added to the variance under the root, not to the root
    gain: str = "gain"  # what multiplies: "gain", "1 + gain" or "nothing"

    @property
    def usual(self) -> bool:
        return self.over == "C" and self.inside and self.gain == "gain"

    def __str__(self) -> str:
        root = f"√(… + {self.eps:.3g})" if self.inside else f"√… + {self.eps:.3g}"
        kind = dict(layer="layer norm", rms="RMS norm")[self.kind]
        return f"{kind} over {self.over}, {root}, times {self.gain}"


def measure(
    norm: Callable[[Tensor], Tensor], gain: Tensor | None, bias: Tensor | None, like: Tensor
) -> NormForm | None:
    """The form of `norm`, called on vectors of the width of `like`; None where it is neither kind of norm.

    The factor between a centred input and what comes out tells the rest: for large inputs what the squares are
    averaged over, for tiny ones epsilon.
    """
    gains = {"gain": gain, "nothing": None, "1 + gain": None if gain is None else 1 + gain}
    for name, value in gains.items():
        form = _measure(norm, 1.0 if value is None else value, 0.0 if bias is None else bias, like)
        if form is not None:
            return replace(form, gain=name if gain is not None else "gain")
    return None


def _measure(norm: Callable[[Tensor], Tensor], gain: Any, bias: Any, like: Tensor) -> NormForm | None:
    generator = torch.Generator().manual_seed(3)
    unit = torch.randn(1, 4, like.shape[-1], generator=generator, dtype=torch.float64).to(like)

    def factor(scale: float) -> tuple[str, Tensor, Tensor] | None:
        x = unit * scale
        out = (norm(x) - bias) / gain
        for kind, z in (("rms", x), ("layer", x - x.mean(-1, keepdim=True))):
            f = (out * z).sum(-1) / z.square().sum(-1)
            if float((out - f[..., None] * z).abs().max()) <= SAME * float(out.abs().max()):
                return kind, f, z.square().sum(-1)
        return None

    large, small, tiny = factor(1e3), factor(1e-2), factor(1e-4)
    if large is None or small is None or tiny is None or len({large[0], small[0], tiny[0]}) > 1:
        return None
    C = like.shape[-1]
    averaged = large[1] ** 2 * large[2]
    over = next((name for name, n in (("C", C), ("C - 1", C - 1), ("1", 1)) if _close(averaged, n)), None)
    if over is None:
        return None
    n = {"C": C, "C - 1": C - 1, "1": 1}[over]
    for inside in (True, False):
        eps = [_eps(f, squares / n, inside) for _, f, squares in (small, tiny)]
        if abs(eps[0] - eps[1]) <= 1e-3 * max(abs(eps[1]), 1e-12):
            return NormForm(large[0], over, _meant(eps[1]), inside)
    return None


def _meant(measured: float) -> float:
    """The epsilon that someone wrote: 0, a usual one, else one of three digits."""
    if measured <= NO_EPS:
        return 0.0
    near = next((usual for usual in USUAL_EPS if abs(measured / usual - 1) < 1e-3), None)
    return near if near is not None else float(f"{measured:.3g}")


def _close(values: Tensor, number: float) -> bool:
    return bool(((values / number - 1).abs() < 1e-4).all())


def _eps(factor: Tensor, variance: Tensor, inside: bool) -> float:
    eps = factor**-2 - variance if inside else 1 / factor - variance.sqrt()
    return float(eps.median())
