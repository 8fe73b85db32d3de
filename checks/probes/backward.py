"""One backward pass of a model without randomness: its loss, its gradient, and how far two gradients are apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..expect import NotApplicable
from ..loss.formula import cross_entropy
from ..subject import Subject
from ..training.runs import refuse_chance
from ..watch.draws import seeded
from ..watch.dropout import set_rates

KEPT = ("backward through the graph a second time", "modified by an inplace operation")  # in autograd's messages
SAYS = "the model keeps results of earlier calls with their graph, so it cannot be trained for several steps"
ROWS = 3  # of a batch
NUMBERS = 2**22  # of a gradient
SCALES = 24  # halvings of a gradient scaler: from 65536 to 1/256


def needs_no_cache_inside(model: nn.Module) -> None:
    """Raises NotApplicable where a module holds a tensor with its graph: a cache that every call writes to."""
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                raise NotApplicable(SAYS)


def backward(loss: Tensor) -> None:
    """Raises NotApplicable where the graph reaches into an earlier call, as through a cache that decoding fills."""
    try:
        torch.autograd.backward(loss)
    except RuntimeError as error:
        if not any(words in str(error) for words in KEPT):
            raise
        raise NotApplicable(SAYS, error=str(error).splitlines()[0][:200]) from None


def needs_numbers(subject: Subject) -> None:
    if subject.device.type == "meta":
        raise NotApplicable("the meta device computes nothing")


def without_chance(
    subject: Subject, scheme: tuple[float, float] | None = None, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A model in train mode without dropout. Raises NotApplicable if it is still random."""
    model = subject.amplified(scheme, seed=subject.seed, dtype=dtype).train()
    set_rates(model, 0.0)
    refuse_chance(subject, model)
    return model


def tokens_of(subject: Subject, B: int = ROWS, T: int | None = None) -> Tensor:
    return subject.tokens(B, T or subject.sizes.block_size, seed=subject.seed)


def loss_of(subject: Subject, model: nn.Module, tokens: Tensor) -> Tensor:
    """The mean next-token loss of a batch."""
    return cross_entropy(subject.logits(model, tokens[:, :-1]).float(), tokens[:, 1:]).mean()


def gradient_of(model: nn.Module) -> Tensor:
    """All gradients in one vector; of a large model's, numbers at even distances."""
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in trained]
    step = _between(gradients)
    return torch.cat([gradient.flatten()[::step].double() for gradient in gradients])


def gradients_in(model: nn.Module, gradient: Tensor) -> dict[str, Tensor]:
    """The part of each parameter in what `gradient_of` gave."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    step = _between([p for _, p in named])
    parts = torch.split(gradient, [len(range(0, p.numel(), step)) for _, p in named])
    return {name: part for (name, _), part in zip(named, parts, strict=True)}


def _between(tensors: Sequence[Tensor]) -> int:
    """Every how manyeth number stands for a large gradient, so that several fit into memory in float64."""
    return max(sum(tensor.numel() for tensor in tensors) // NUMBERS, 1)


def apart(a: Tensor, b: Tensor) -> float:
    """The norm of the difference, relative to that of `b`."""
    return float((a - b).norm() / b.norm()) if b.any() else float(a.norm())


def needs_finite(gradient: Tensor) -> None:
    if not bool(gradient.isfinite().all()):
        raise NotApplicable("the gradient is not finite to begin with")


def scaled_gradient(subject: Subject, model: nn.Module, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The unscaled gradient under autocast, and the scale of the loss: 1, or for float16 the first without overflow."""
    kind = subject.device.type
    scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(SCALES if scaler.is_enabled() else 1):
        scale = scaler.get_scale()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(kind, dtype), seeded(subject.seed):
            loss = loss_of(subject, model, tokens)
        backward(scaler.scale(loss))
        scaler.unscale_(optimizer)
        gradient = gradient_of(model)
        if bool(gradient.isfinite().all()):
            break
        scaler.step(optimizer)  # skips an overflow
        scaler.update()
    return gradient, scale
