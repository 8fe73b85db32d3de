"""Which family, plan and variant a subject is: built at telling sizes, mapped, and compared with the reference."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..expect import Bound, NotApplicable, note
from ..subject import ABSENCE, amplify, cast
from .agreement import BOUNDS, apart
from .norms import NormForm, measure
from .promotion import promoted
from .reference import USUAL_BASES, USUAL_EPS, USUAL_STRETCHES, Stretch, Variant, build, norms_of, variants
from .weights.inventory import Inventory, Weight, take
from .weights.planning import plans, unsettled
from .weights.roles import NoPlan, Plan, Shape
from .weights.table import shown, tabled

FAMILIES = ("gpt2", "llama")
# Sizes that differ from one another and from what follows from them; the first that the subject takes.
TELLING: tuple[dict[str, int], ...] = (
    {"n_layer": 3, "n_head": 6, "n_embd": 60},
    {"n_layer": 3, "n_head": 4, "n_embd": 40},
    {"n_layer": 3},
    {"n_head": 6, "n_embd": 60},
    {},
)
LARGEST = 20_000_000  # weights: beyond this, float64 and many forward passes take minutes
LARGEST_EPS = 1e-4  # a norm's epsilon beyond this is no longer left open
FACTORS = ("factor", "rope_factor", "scale_factor", "rope_scale_factor", "scaling_factor")  # of stretched frequencies
ORIGINALS = ("original_max_position_embeddings", "original_context_length", "old_context_len", "original_max_seq_len")
FIRST = 16  # candidates that are tried before the choices are settled one by one
SECONDS = 1.5  # for mapping and agreement


@dataclass
class Specimen:
    """The subject as the spec looks at it: one model with amplified weights, in float64 where it runs so."""

    subject: Any
    model: nn.Module
    shape: Shape
    inventory: Inventory
    tokens: Tensor
    dtype: torch.dtype

    @property
    def bound(self) -> Bound:
        return BOUNDS[self.dtype]

    def logits(self, tokens: Tensor | None = None) -> Tensor:
        """What the subject gives with its weights as they are now, in float64."""
        with torch.no_grad(), self.running():
            return self.subject.logits(self.model, self.tokens if tokens is None else tokens).double()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(one_thread())
            if self.dtype == torch.float64:
                stack.enter_context(promoted())
            yield


@dataclass
class Settled:
    """How the subject compares with one family. `error` is that of the best plan and variant; None without a plan."""

    family: str
    specimen: Specimen
    theirs: Tensor
    plan: Plan | None = None
    variant: Variant | None = None
    error: float | None = None
    why_not: str = ""  # why there is no plan
    tried: int = 0
    seconds: float = 0.0
    candidates: list[tuple[Plan, Variant]] = field(default_factory=list)
    near: list[tuple[Plan, Variant, dict[str, float]]] | None = None  # see nearest

    @property
    def agrees(self) -> bool:
        return self.error is not None and self.error <= self.specimen.bound.size


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads and lose much where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_specimens: WeakKeyDictionary[Any, Specimen] = WeakKeyDictionary()
_settled: WeakKeyDictionary[Any, dict[str, Settled]] = WeakKeyDictionary()


def specimen(subject: Any) -> Specimen:
    """Built once a subject. Raises NotApplicable where it cannot be built, run or kept in float64."""
    if subject not in _specimens:
        _specimens[subject] = _take(subject)
    return _specimens[subject]


def _take(subject: Any) -> Specimen:
    refused: list[str] = []
    for dtype in (torch.float64, torch.float32):
        for sizes in TELLING:
            try:
                return _specimen(subject, sizes, dtype)
            except NotApplicable as reason:
                refused.append(reason.reason)
            except NoPlan:
                raise
            except Exception as error:  # whatever a foreign model raises at sizes or types that it does not take
                refused.append(f"{type(error).__name__}: {error}")
            if not sizes:
                break
    raise NotApplicable("the model does not run at the sizes and types of the spec", tried=refused)


def _specimen(subject: Any, sizes: dict[str, int], dtype: torch.dtype) -> Specimen:
    for name in sizes:
        if not subject.can_vary(name):
            raise NotApplicable(f"{name} is fixed")
    asked = {**vars(subject.sizes), **sizes, "dropout": 0.0 if subject.can_vary("dropout") else subject.sizes.dropout}
    running = promoted() if dtype == torch.float64 else contextlib.nullcontext()
    with one_thread(), running:
        model = subject.build(seed=subject.seed, **{k: v for k, v in asked.items() if subject.can_vary(k)})
        if sum(p.numel() for p in model.parameters()) > LARGEST:
            raise NotApplicable(f"more than {LARGEST:,} weights: declare the architecture on a smaller model")
        cast(model, dtype)
        tokens = subject.tokens(3, asked["block_size"], seed=subject.seed)
        short = tokens[:2, : min(5, tokens.shape[1])].contiguous()
        inventory = take(model, lambda: subject.logits(model, short), asked["n_layer"])
        amplify(model, *ABSENCE, seed=subject.seed)
    shape = Shape(asked["vocab_size"], asked["block_size"], asked["n_head"], asked["n_embd"])
    return Specimen(subject, model, shape, inventory, tokens, dtype)


def settled(subject: Any, family: str) -> Settled:
    """How the subject compares with this family; found once."""
    known = _settled.setdefault(subject, {})
    if family not in known:
        known[family] = settle(specimen(subject), family)
    found = known[family]
    if found.plan is not None:
        note(weights=shown(found.plan))
        if not found.agrees and (open_ := unsettled(found.plan)):
            note(unsettled=open_)
    return found


def settle(seen: Specimen, family: str) -> Settled:
    """The plan and variant of the family that give the subject's logits; else those that come nearest by rank."""
    start = time.process_time()
    found = Settled(family, seen, seen.logits())
    table = seen.subject.spec_table
    try:
        candidates = list(tabled(seen.inventory, seen.shape, table) if table else plans(seen.inventory, seen.shape))
    except NoPlan as reason:
        found.why_not = str(reason)
        return found
    found.why_not = unlike(candidates[0], family)
    if found.why_not:
        return found
    with one_thread():
        grouped = candidates[0].n_kv_head != seen.shape.n_head
        ways = variants(family, _eps(seen, candidates[0]), _bases(seen), grouped, _stretches(seen))
        if bool((found.theirs.logsumexp(-1).abs() < 1e-9).all()):
            ways = [replace(way, log_probabilities=True) for way in ways]
        found.candidates = [(plan, way) for plan in candidates for way in ways]
        _try(found, found.candidates[:FIRST])
        if not found.agrees:
            _try(found, [(plan, variant) for plan, variant, _ in nearest(found)])
        if not found.agrees:
            _try(found, found.candidates[FIRST:], until=start + SECONDS)
    found.seconds = time.process_time() - start
    return found


def _try(found: Settled, candidates: list[tuple[Plan, Variant]], until: float = float("inf")) -> None:
    """Up to the first that agrees; the best is kept."""
    for plan, variant in candidates:
        if found.agrees or time.process_time() > until:
            return
        error = disagreement(found.specimen, plan, variant, found.theirs)
        found.tried += 1
        if found.error is None or error < found.error:
            found.plan, found.variant, found.error = plan, variant, error


def nearest(found: Settled) -> list[tuple[Plan, Variant, dict[str, float]]]:
    """The candidates that come nearest, with their disagreement in stages; found once."""
    from .closeness import promising  # which is made of what is here

    if found.near is None:
        found.near = promising(found)
    return found.near


def unlike(plan: Plan, family: str) -> str:
    """What of the weights cannot be this family's; "" if they can."""
    if family == "gpt2" and plan.positions is None and not plan.gated:
        T, C = plan.shape.block_size, plan.shape.n_embd
        return f"no position embedding is found: no weight outside the layers is a table [{T}, {C}], and no buffer"
    if family == "gpt2" and plan.gated:
        return "its feed-forward has a gate (three matrices), and GPT-2's has none"
    if family == "llama" and not plan.gated:
        return "its feed-forward has no gate, and Llama's has (SwiGLU, three matrices)"
    return ""


def disagreement(seen: Specimen, plan: Plan, variant: Variant, theirs: Tensor) -> float:
    """The largest difference of the logits, of the largest logit."""
    with torch.no_grad():
        ours = build(plan, variant)(seen.tokens)[..., : theirs.shape[-1]]
    return apart(theirs, ours.double())


def _eps(seen: Specimen, plan: Plan) -> list[tuple[float, ...]]:
    """The epsilons to try: those measured, else the usual ones."""
    forms = [norm_form(seen, plan, name) for name in norms_of(plan)]
    if all(form is not None for form in forms):
        eps = [form.eps if form.eps <= LARGEST_EPS else 1e-5 for form in forms if form is not None]
        return [tuple(eps)]
    return [(eps,) for eps in USUAL_EPS]


def norm_form(seen: Specimen, plan: Plan, name: str) -> NormForm | None:
    """The form of the first layer's norm of this name, or of the final one; None if it cannot be told."""
    norm = norms_of(plan)[name]
    if norm is None:
        return None
    layer = seen.inventory.layers[0]
    gain, bias = (w if w is None or isinstance(w, Weight) else layer[w] for w in (norm.gain, norm.bias))
    if gain is None:
        return None
    values = gain.tensor.detach() + (1.0 if norm.minus_one else 0.0)
    try:
        with torch.no_grad(), seen.running():
            return measure(gain.owner, values, None if bias is None else bias.tensor.detach(), values)
    except Exception:  # the owner of the gain is no norm that can be called alone
        return None


def _numbers(seen: Specimen) -> Iterator[tuple[str, float]]:
    """The numbers that the model and its configurations name, those inside a configuration's dicts included."""
    for module in seen.model.modules():
        for holder in (module, getattr(module, "config", None), getattr(module, "args", None)):
            values = holder if isinstance(holder, dict) else _attributes(holder)
            inside = [value for value in values.values() if isinstance(value, dict)]
            for each in (values, *inside):
                for name, value in each.items():
                    if isinstance(name, str) and isinstance(value, int | float) and not isinstance(value, bool):
                        yield name, float(value)


def _attributes(holder: Any) -> dict[str, Any]:
    """Of an object; of a configuration those of its class too, where some keep their values."""
    kinds = () if holder is None or isinstance(holder, nn.Module) else type(holder).__mro__[-2::-1]
    return {name: value for each in (*kinds, holder) for name, value in getattr(each, "__dict__", {}).items()}


def _bases(seen: Specimen) -> tuple[float, ...]:
    """Rotary bases to try: what the model or its configuration says, then the usual ones."""
    said = [value for name, value in _numbers(seen) if ("theta" in name or "base" in name) and value > 1]
    return tuple(dict.fromkeys((*said, *USUAL_BASES)))


def _stretches(seen: Specimen) -> tuple[Stretch, ...]:
    """Stretched rotary frequencies to try: what a configuration says, and Llama 3.1's."""
    said = dict(_numbers(seen))
    factor = next((value for name, value in said.items() if name in FACTORS and value > 1), None)
    original = next((value for name, value in said.items() if name in ORIGINALS), 8192.0)
    if factor is None:
        return USUAL_STRETCHES
    low, high = said.get("low_freq_factor", 1.0), said.get("high_freq_factor", 4.0)
    return tuple(dict.fromkeys((Stretch(factor, low, high, original), Stretch(factor), *USUAL_STRETCHES)))
