"""Adam and AdamW over the parameters that are trained, and which of these decay."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .train_config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    kind = {"adam": Adam, "adamw": AdamW}[config.optimizer]
    groups = decay_groups(model, config.weight_decay)
    fused = torch.device(config.device).type in ("cpu", "cuda")  # one kernel for all parameters
    betas = (config.beta1, config.beta2)
    optimizer: torch.optim.Optimizer = kind(groups, lr=config.learning_rate, betas=betas, eps=config.eps, fused=fused)
    return optimizer


class Uncompiled(torch.optim.Optimizer):
    """These methods without torch's decorators, which keep torch.compile out of them and import it to do so (0.7 s).

    Nothing of torch is changed: its own optimizers, and what is compiled in the same process, are as ever.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class Adam(Uncompiled, torch.optim.Adam):
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))  # the decorator sets no_grad too


class AdamW(Uncompiled, torch.optim.AdamW):
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; vectors (norms, biases) do not, nor embeddings, whose rare rows would fade between their uses.

    A head tied to the token embedding is that embedding. Frozen parameters are in no group.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("the model has no parameter to train")
    decaying = [p for p in trained if p.dim() >= 2 and id(p) not in embeddings]
    lasting = [p for p in trained if p.dim() < 2 or id(p) in embeddings]
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": lasting, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
