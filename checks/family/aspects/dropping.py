"""What a model drops, and where: every dropout found by what goes into it, among the numbers of the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...expect import NotApplicable, Where
from ...probes.rounding import in_float64
from ...subject import cast
from ...watch.draws import seeded
from ...watch.dropout import set_rates
from ...watch.location import line_now
from ..agreement import apart
from ..closeness import explicit
from ..specimen import Settled
from ..trace import alike, checkpoints, sums

RATE = 0.3
DROPOUTS = {"dropout", "dropout_", "alpha_dropout", "feature_dropout", "native_dropout"}
# Which numbers of the reference GPT-2 drops, by the names that trace.py gives them.
SITES = {
    "embedded tokens and positions": "the embedding", "token embedding": "the embedding",
    "attention weights": "attention weights", "attention output": "attention's output",
    "feed-forward output": "the feed-forward's output",
}  # fmt: skip


@dataclass(frozen=True)
class Dropped:
    """One call of a dropout: what it drops, of which block, at which rate and line."""

    part: str | None  # a name of trace.py; None where the reference has no such numbers
    block: int | None
    rate: float
    where: Where | None


class Calm(TorchFunctionMode):
    """Dropouts hand on what they are given, and leave a note."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor | None, float, Where | None]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in DROPOUTS:
            x = args[0] if args else kwargs["input"]
            rate = float(kwargs.get("p", args[1] if len(args) > 1 else 0.5))
            if kwargs.get("training", args[2] if len(args) > 2 else True):
                self.seen.append((sums(x), rate, line_now()))
            return x
        if name == "scaled_dot_product_attention":
            rate = float(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
            self.seen += [(None, rate, line_now())] if rate else []
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs.pop("dropout_p", None)
        if name == "multi_head_attention_forward":
            with self:
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def dropped(found: Settled) -> list[Dropped]:
    """Every dropout of a training forward, in order. Raises NotApplicable where some are not seen."""
    seen = found.specimen
    model, tokens = _dropping(found), seen.tokens
    with torch.no_grad(), seen.running(), seeded(seen.subject.seed), Calm() as calm:
        first = seen.subject.logits(model, tokens).double()
    with torch.no_grad(), seen.running(), seeded(seen.subject.seed + 1), Calm():
        again = seen.subject.logits(model, tokens).double()
    if apart(first, again) > 0 or apart(first, found.theirs) > seen.bound.size:
        raise NotApplicable("the model drops by means of its own, which are not seen", difference=apart(first, again))
    wanted = checkpoints(explicit(found.plan, found.variant), tokens)  # type: ignore[arg-type]
    done, kernels = [], 0
    for given, rate, where in calm.seen:
        if given is None:
            done.append(Dropped("attention weights", kernels, rate, where))
            kernels += 1
            continue
        same = [c for c in wanted if alike(given, c.sums)]
        best = next((c for c in same if c.part in SITES), same[0] if same else None)
        done.append(Dropped(best.part if best else None, best.block if best else None, rate, where))
    return done


def _dropping(found: Settled) -> nn.Module:
    """A model with the specimen's weights and every declared rate at RATE, in training mode."""
    seen = found.specimen
    subject, shape = seen.subject, seen.shape
    if not subject.can_vary("dropout"):
        raise NotApplicable("the model takes no dropout rate")
    sizes: dict[str, Any] = dict(vocab_size=shape.vocab_size, block_size=shape.block_size, n_head=shape.n_head,
                                 n_embd=shape.n_embd, n_layer=len(seen.inventory.layers), dropout=RATE)  # fmt: skip
    sizes = {name: value for name, value in sizes.items() if subject.can_vary(name)}
    if seen.dtype == torch.float64:
        with in_float64():
            model = cast(subject.build(seed=subject.seed, **sizes), seen.dtype)
    else:
        model = cast(subject.build(seed=subject.seed, **sizes), seen.dtype)
    model.load_state_dict(seen.model.state_dict())
    set_rates(model, RATE)
    return model.train()
