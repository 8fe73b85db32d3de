"""What files have beside a model, written right: generation, evaluation, losses, schedule, average, tokenizer, ….

Bugs replace one of them; `parts_with_companions` is the reference's model with all of them.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..expect import Where, shown
from ..reference import reference_parts
from ..subject import Companion


def companion(kind: str, value: Any) -> Companion:
    code = inspect.getsourcefile(value) or ""
    return Companion(
        kind, value.__name__, value, Where(value.__name__, kind, shown(code), inspect.getsourcelines(value)[1])
    )


def parts_with_companions(**config: Any) -> SimpleNamespace:
    """The reference's model with one companion of each kind."""
    found = (companion(kind, value) for kind, value in KINDS.items())
    return SimpleNamespace(build_model=reference_parts(**config).build_model, companions=tuple(found))


def replace(parts: SimpleNamespace, kind: str, value: Any) -> None:
    """Puts another companion of a kind into the place of the right one."""
    parts.companions = tuple(companion(kind, value) if one.kind == kind else one for one in parts.companions)


# -- generation


@torch.no_grad()
def sample_text(model: nn.Module, idx: Tensor, max_new_tokens: int, temperature: float = 1.0) -> Tensor:
    """The prompts [B, T], continued."""
    return continued(model, idx, max_new_tokens, temperature, read=-1)


def continued(model: nn.Module, idx: Tensor, n: int, temperature: float, *, read: int) -> Tensor:
    for _ in range(n):
        logits = model(idx[:, -model.config.block_size :])[:, read] / temperature  # type: ignore[union-attr,operator]
        idx = torch.cat((idx, torch.multinomial(logits.softmax(-1), 1)), dim=1)
    return idx


# -- evaluation


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor, block_size: int, stride: int = 4) -> float:
    """Of one text [N], by overlapping windows; each target counts once."""
    return math.exp(mean_of_windows(model, ids, block_size, stride))


def mean_of_windows(model: nn.Module, ids: Tensor, block_size: int, stride: int) -> float:
    total, count = 0.0, 0
    for losses in losses_of_windows(model, ids, block_size, stride):
        total, count = total + float(losses.sum()), count + losses.numel()
    return total / count


def losses_of_windows(model: nn.Module, ids: Tensor, block_size: int, stride: int) -> list[Tensor]:
    """The losses of the targets of each window that no window before it has."""
    found, done = [], 1
    for start in range(0, len(ids) - 1, stride):
        end = min(start + block_size, len(ids) - 1)
        losses = F.cross_entropy(model(ids[None, start:end])[0], ids[start + 1 : end + 1], reduction="none")
        if end + 1 > done:
            found.append(losses[-(end + 1 - max(done, start + 1)) :])
        done = max(done, end + 1)
    return found


# -- losses of answers


def sum_of_log_probabilities(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """[B]; the mask [B, T] is 1 for tokens of the answer."""
    found: Tensor = model(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return (found * mask[:, 1:]).sum(-1)


def dpo_loss(
    policy: nn.Module,
    reference: nn.Module,
    chosen: Tensor,
    rejected: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    beta: float = 0.1,
) -> Tensor:
    margin = sum_of_log_probabilities(policy, chosen, chosen_mask) - sum_of_log_probabilities(
        policy, rejected, rejected_mask
    )
    with torch.no_grad():
        base = sum_of_log_probabilities(reference, chosen, chosen_mask)
        base = base - sum_of_log_probabilities(reference, rejected, rejected_mask)
    return -F.logsigmoid(beta * (margin - base)).mean()


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, temperature: float = 2.0) -> Tensor:
    """The divergence of the student from the teacher, a mean over the places [B, T] that the mask keeps."""
    student = (student_logits / temperature).log_softmax(-1)
    teacher = (teacher_logits.detach() / temperature).log_softmax(-1)
    apart = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return temperature**2 * (apart * mask).sum() / mask.sum()


# -- schedule


def cosine_schedule(step: int, warmup_steps: int, max_steps: int, max_lr: float, min_lr: float) -> float:
    """The learning rate of a step: a linear warm-up, then half a cosine down to the minimum."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / (max_steps - warmup_steps))
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (max_lr - min_lr)


# -- average


class Average:
    """The moving average of a model's weights."""

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        self.decay, self.backup = decay, dict[str, Tensor]()
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            self.shadow[name].mul_(self.decay).add_(p, alpha=1 - self.decay)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        self.backup = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            p.copy_(self.shadow[name])

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            p.copy_(self.backup[name])


# -- optimizer


class AdamW(torch.optim.Optimizer):
    """Adam with weight decay apart from the gradient. What its methods give is what bugs replace."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def kept(self, p: Tensor) -> dict[str, Any]:
        """The state of a parameter: the step, the first and the second moment."""
        state: dict[str, Any] = self.state[p]
        if not state:
            state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
        return state

    def direction(self, g: Tensor, state: dict[str, Any], betas: tuple[float, float], eps: float) -> Tensor:
        b1, b2 = betas
        state["t"] += 1
        state["m"].lerp_(g, 1 - b1)
        state["v"].lerp_(g * g, 1 - b2)
        first, second = state["m"] / (1 - b1 ** state["t"]), state["v"] / (1 - b2 ** state["t"])
        found: Tensor = first / (second.sqrt() + eps)
        return found

    def move(self, p: Tensor, group: dict[str, Any]) -> None:
        p.mul_(1 - group["lr"] * group["weight_decay"])
        assert p.grad is not None
        p.sub_(group["lr"] * self.direction(p.grad, self.kept(p), group["betas"], group["eps"]))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, group)


class Lion(AdamW):
    """The sign of a mean of momentum and gradient; the second moment stays 0."""

    def direction(self, g: Tensor, state: dict[str, Any], betas: tuple[float, float], eps: float) -> Tensor:
        step = torch.lerp(state["m"], g, 1 - betas[0]).sign()
        state["m"].lerp_(g, 1 - betas[1])
        return step


# -- tokenizer


class Tokenizer:
    """Byte pairs: bytes, and merges of the most frequent pair of neighbours. What its methods give, bugs replace."""

    def __init__(self) -> None:
        self.merges: dict[tuple[int, int], int] = {}
        self.vocab = {i: bytes([i]) for i in range(256)}

    @property
    def vocab_size(self) -> int:
        return len(self.vocab)

    def train(self, text: str, vocab_size: int) -> None:
        words = [list(word.encode()) for word in text.split()]
        while len(self.vocab) < vocab_size:
            counts = Counter(pair for word in words for pair in pairwise(word))
            pair, new = max(counts, key=lambda pair: (counts[pair], pair)), len(self.vocab)
            self.merges[pair], self.vocab[new] = new, self.vocab[pair[0]] + self.vocab[pair[1]]
            words = [self.merge(word, pair) for word in words]

    def merge(self, ids: list[int], pair: tuple[int, int]) -> list[int]:
        found: list[int] = []
        for i in ids:
            found.append(i)
            if tuple(found[-2:]) == pair:
                found[-2:] = [self.merges[pair]]
        return found

    def merge_all(self, ids: list[int]) -> list[int]:
        for pair in self.merges:
            ids = self.merge(ids, pair)
        return ids

    def encode(self, text: str) -> list[int]:
        return [i for part in re.findall(r"\s+|\S+", text) for i in self.merge_all(list(part.encode()))]

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.vocab[i] for i in ids).decode("utf-8", errors="replace")


KINDS: dict[str, Any] = {
    "generation": sample_text,
    "evaluation": perplexity,
    "preference loss": dpo_loss,
    "distillation loss": distillation_loss,
    "schedule": cosine_schedule,
    "average": Average,
    "optimizer": AdamW,
    "tokenizer": Tokenizer,
}
