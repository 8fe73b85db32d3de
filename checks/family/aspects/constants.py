"""Constants of a declared architecture, measured in the model: formula and epsilon of a norm, attention scale.

Also what is unusual but correct in a model that agrees: the order of its fused weights, missing biases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..closeness import STAGES, disagreement, scaled, silenced
from ..reference import norms_of
from ..specimen import Fit, Specimen
from ..weights.inventory import Weight
from ..weights.planning import called
from ..weights.roles import Plan
from ..weights.table import SPELLED

SAME = 1e-7  # relative, in float64: between the direction of a norm's output and of its input, and between averages
NO_EPS = 1e-15  # a smaller epsilon counts as none
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PLAUSIBLE_EPS = (*(float(f"1e-{n}") for n in range(3, 13)), *(torch.finfo(dtype).eps for dtype in DTYPES))
FACTORS = (1e-2, 1e-3, 1e-4, 1e-6)  # deviation of the first norm's input: around √1e-5, √1e-6, √1e-8, √1e-12
# The norm that shows in a stage when the residual stream is tiny: what it is, and its name in the reference.
NORMS = {
    "embedding, positions, final norm and head": ("the final norm", "norm"),
    "feed-forward and its norm": ("the norm before the feed-forward", "feed_forward_norm"),
    "attention and its norm": ("the norm before attention", "attention_norm"),
}
FITS = 1e-9  # share of the scores' variance that a factor alone may leave unexplained
PLURAL = {"q": "queries", "k": "keys", "v": "values"}


# -- the form of a norm


@dataclass(frozen=True)
class NormForm:
    """The formula that a norm computes."""

    kind: str  # "layer" or "rms"
    over: str  # what the sum of squares is divided by: "C", "C - 1" or "1"
    eps: float
    inside: bool  # epsilon is added to the variance under the root, not to the root
    gain: str = "gain"  # what the result is multiplied by: "gain", "1 + gain" or "nothing"

    def __str__(self) -> str:
        root = f"√(… + {self.eps:.3g})" if self.inside else f"√… + {self.eps:.3g}"
        kind = dict(layer="LayerNorm", rms="RMSNorm")[self.kind]
        return f"{kind}, squares divided by {self.over}, {root}, times {self.gain}"


def norm_form(specimen: Specimen, plan: Plan, name: str) -> NormForm | None:
    """The form of the first layer's norm of this name, or of the final norm; None if it cannot be measured."""
    norm = norms_of(plan)[name]
    if norm is None:
        return None
    layer = specimen.inventory.layers[0]
    gain, bias = (w if w is None or isinstance(w, Weight) else layer[w] for w in (norm.gain, norm.bias))
    if gain is None:
        return None
    values = gain.tensor.detach() + (1.0 if norm.minus_one else 0.0)
    try:
        with torch.no_grad(), specimen.running():
            return measure(gain.owner, values, None if bias is None else bias.tensor.detach(), values)
    except Exception:  # the owner of the gain is no norm that can be called alone
        return None


def measure(
    norm: Callable[[Tensor], Tensor], gain: Tensor | None, bias: Tensor | None, like: Tensor
) -> NormForm | None:
    """The form of `norm`, called on vectors as wide as `like`; None where it is neither kind of norm.

    It is read off the factor between centred input and output: for large inputs the factor tells what the sum of
    squares is divided by, for tiny inputs epsilon.
    """
    gains = {"gain": gain, "nothing": None, "1 + gain": None if gain is None else 1 + gain}
    for name, value in gains.items():
        form = _measure(norm, 1.0 if value is None else value, 0.0 if bias is None else bias, like)
        if form is not None:
            return replace(form, gain=name if gain is not None else "gain")
    return None


def _measure(
    norm: Callable[[Tensor], Tensor], gain: Tensor | float, bias: Tensor | float, like: Tensor
) -> NormForm | None:
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
    """The epsilon that the author wrote: 0, a usual one, else the measured one to three digits."""
    if measured <= NO_EPS:
        return 0.0
    near = next((usual for usual in PLAUSIBLE_EPS if abs(measured / usual - 1) < 1e-3), None)
    return near if near is not None else float(f"{measured:.3g}")


def _close(values: Tensor, number: float) -> bool:
    return bool(((values / number - 1).abs() < 1e-4).all())


def _eps(factor: Tensor, variance: Tensor, inside: bool) -> float:
    eps = factor**-2 - variance if inside else 1 / factor - variance.sqrt()
    return float(eps.median())


# -- epsilon


@dataclass(frozen=True)
class ScaleThatDiffers:
    """A factor of the embeddings at which the logits differ, and the norm that differs there."""

    factor: float
    norm: str
    module: str  # the subject's name of the norm
    error: float


def scale_that_differs(fit: Fit) -> ScaleThatDiffers | None:
    """The largest factor of the embeddings at which the subject and the reference differ; None if they never do."""
    plan, variant, specimen = fit.plan, fit.variant, fit.specimen
    assert plan is not None and variant is not None
    tables = [w.tensor for w in (plan.embedding, plan.positions) if w is not None]  # a tied head is scaled too
    for factor in FACTORS:
        for stage, which in STAGES.items():
            with scaled(tables, factor), silenced(plan, which):
                error = disagreement(specimen, plan, variant, specimen.logits())
            if error > specimen.bound.size:
                norm, name = NORMS[stage]
                return ScaleThatDiffers(factor, norm, _module(plan, name), error)
    return None


def unusual_epsilon(fit: Fit) -> tuple[str, str, float] | None:
    """The first norm with an unusual epsilon: the norm, the subject's name of it, and its epsilon.

    Usual are a power of ten, zero, and the machine epsilon of a floating-point type: a family leaves these open.
    """
    plan = fit.plan
    assert plan is not None
    for norm, name in NORMS.values():
        form = norm_form(fit.specimen, plan, name)
        if form is not None and form.inside and form.eps not in (0.0, *PLAUSIBLE_EPS):
            return norm, _module(plan, name), form.eps
    return None


def _module(plan: Plan, name: str) -> str:
    norm = norms_of(plan)[name]
    if norm is None:
        return ""
    gain = norm.gain if isinstance(norm.gain, Weight) else plan.inventory.layers[0][norm.gain]
    return gain.name.rpartition(".")[0]


# -- unusual but correct


def remarks(fit: Fit) -> list[str]:
    """Sentences on what is unusual but correct: published weights would not load into this model as they are."""
    plan = fit.plan
    assert plan is not None
    said = [*_order(plan, fit.family), *_stored(plan)]
    return said + (_unlike_gpt2(plan) if fit.family == "gpt2" else [])


def _order(plan: Plan, family: str) -> list[str]:
    """Queries, keys and values in another place than their names or the published weights say."""
    layer = plan.inventory.layers[0]
    letters, _, layout = plan.arrangement.partition("|")
    if plan.form == "fused" and family == "gpt2" and (letters, layout) != ("qkv", "3hd"):
        order = ", ".join(PLURAL[letter] for letter in letters)
        way = "" if layout == "3hd" else " head by head" if layout.startswith("h") else f" interleaved ({layout})"
        return [f"{layer[plan.attention[0].at].name} holds {order}{way}; the published GPT-2 weights hold queries, "
                "keys, values and would load without an error but give wrong logits"]  # fmt: skip
    if plan.form != "split":
        return []
    said = []
    for letter, matrix in zip(letters, plan.attention, strict=True):
        name = layer[matrix.at].name
        meant = [role for role in "qkv" if called(name, role)]
        if len(meant) == 1 and meant != [letter]:
            said.append(f"{name} computes the {PLURAL[letter]}, although its name says {SPELLED[meant[0]]}")
    return said


def _stored(plan: Plan) -> list[str]:
    gains = [name for name, norm in norms_of(plan).items() if norm is not None and norm.minus_one]
    return [f"the norms' gains are stored minus one ({', '.join(gains)})"] if gains else []


def _unlike_gpt2(plan: Plan) -> list[str]:
    parts = {
        "attention's queries, keys and values": [m.bias for m in plan.attention],
        "attention's output": [plan.output.bias],
        "the feed-forward": [*(m.bias for m in plan.feed_forward), plan.feed_forward_output.bias],
        "the norms": [norm.bias for norm in norms_of(plan).values() if norm is not None],
    }
    bare = [part for part, biases in parts.items() if None in biases]
    said = [f"no biases in {', '.join(bare)}; GPT-2 has them"] if bare else []
    if plan.positions is not None and not (plan.positions.trained and plan.positions.tensor.requires_grad):
        said.append(f"position embeddings are a fixed table ({plan.positions.name}); GPT-2 learns them")
    return said
