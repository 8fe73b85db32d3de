"""Correct losses and training steps as people write them: they must not fail any check.

`LOSSES` maps a name to a loss and its declarations, `STEPS` a name to a train_step.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformer_checks.checks.reference import reference_parts
from transformer_checks.checks.subject import Subject
from transformer_checks.transformer.loss import next_token_loss

LOSSES: dict[str, tuple[Any, dict[str, Any]]] = {}
STEPS: dict[str, Callable] = {}


def loss_subject(name: str, *, seed: int = 0) -> Subject:
    """The reference's model with this loss and only its own declarations."""
    loss, declares = LOSSES[name]
    build = log_probability_model if name.startswith("nll") else reference_parts().build_model
    return Subject(name, SimpleNamespace(build_model=build, loss=loss, declares=declares), seed=seed)


def step_subject(name: str, *, seed: int = 0) -> Subject:
    parts = SimpleNamespace(build_model=reference_parts().build_model, train_step=STEPS[name])
    return Subject(name, parts, seed=seed)


def log_probability_model(**sizes: Any) -> nn.Module:
    model = reference_parts().build_model(**sizes)
    logits = model.forward
    model.forward = lambda *args, **kwargs: logits(*args, **kwargs).log_softmax(-1)
    return model


def loss(name: str, **declares: Any) -> Callable:
    def keep(function: Any) -> Any:
        LOSSES[name] = (function, declares)
        return function

    return keep


def step(function: Callable) -> Callable:
    STEPS[function.__name__] = function
    return function


# -- PyTorch's own

loss("the reference's, undeclared")(next_token_loss)
loss("F.cross_entropy")(F.cross_entropy)
loss("CrossEntropyLoss()")(nn.CrossEntropyLoss())
loss("CrossEntropyLoss(sum)")(nn.CrossEntropyLoss(reduction="sum"))
loss("CrossEntropyLoss(sum), declared", reduction="sum")(nn.CrossEntropyLoss(reduction="sum"))
loss("CrossEntropyLoss(none)")(nn.CrossEntropyLoss(reduction="none"))
loss("CrossEntropyLoss(ignore_index=-1)")(nn.CrossEntropyLoss(ignore_index=-1))
loss("CrossEntropyLoss(ignore_index=0)")(nn.CrossEntropyLoss(ignore_index=0))
loss("CrossEntropyLoss(label_smoothing)")(nn.CrossEntropyLoss(label_smoothing=0.1))
loss("CrossEntropyLoss(label_smoothing), declared", smoothing=0.1 * 16 / 17)(nn.CrossEntropyLoss(label_smoothing=0.1))
loss("CrossEntropyLoss(weight)")(nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, 17).double()))
loss("nll_loss of log-probabilities")(F.nll_loss)


# -- as tutorials write it


@loss("flattened by view")
def flattened(logits, targets):
    B, T, V = logits.shape
    return F.cross_entropy(logits.view(B * T, V), targets.view(B * T))


@loss("transposed to [B, V, T]")
def transposed(logits, targets):
    return F.cross_entropy(logits.transpose(1, 2), targets)


@loss("shift inside")
def shift_inside(logits, labels):
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.size(-1)), labels[:, 1:].reshape(-1), ignore_index=-100)


@loss("mask times losses")
def mask_times_losses(logits, targets, mask):
    losses = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), reduction="none")
    return (losses * mask.view(-1)).sum() / mask.sum()


@loss("1 - pad_mask")
def pad_mask_inverted(logits, targets, pad_mask):
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return (losses * (1 - pad_mask)).sum() / (1 - pad_mask).sum()


@loss("mean of each row")
def row_means(logits, targets, mask):
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none") * mask
    return (losses.sum(1) / mask.sum(1)).mean()


@loss("selected by the mask")
def selected(logits, targets, mask):
    return F.cross_entropy(logits[mask], targets[mask])


@loss("shift and mask inside")
def shift_and_mask_inside(logits, tokens, loss_mask):
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), tokens[:, 1:], reduction="none")
    kept = loss_mask[:, 1:].float()
    return (losses * kept).sum() / kept.sum().clamp(min=1)


@loss("first three targets skipped")
def first_three_skipped(logits, targets):
    return F.cross_entropy(logits[:, 3:].reshape(-1, logits.size(-1)), targets[:, 3:].reshape(-1))


@loss("first three targets skipped, declared", skip=3)
def first_three_skipped_as_declared(logits, targets):
    return first_three_skipped(logits, targets)


@loss("prompt of targets 1-3 skipped")
def targets_one_to_three_skipped(logits, targets):
    labels = targets.clone()
    labels[:, 1:4] = -100
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@loss("log_softmax twice")
def log_softmax_twice(logits, targets):
    return F.cross_entropy(logits.log_softmax(-1).flatten(0, 1), targets.flatten())


@loss("with a z-loss")
def with_z_loss(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) + 1e-4 * logits.logsumexp(-1).square().mean()


@loss("from scratch")
def from_scratch(inputs, targets):
    shifted = inputs - inputs.amax(-1, keepdim=True)
    log_p = shifted - shifted.exp().sum(-1, keepdim=True).log()
    return -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1).mean()


@loss("smoothed from scratch, by the sum")
def smoothed_from_scratch(pred, gold, trg_pad_idx):
    pred, gold = pred.view(-1, pred.size(-1)), gold.view(-1)
    hot = torch.zeros_like(pred).scatter(1, gold.clamp(min=0)[:, None], 1)
    q = hot * 0.9 + (1 - hot) * 0.1 / (pred.size(-1) - 1)
    return -(q * pred.log_softmax(-1)).sum(1)[gold != trg_pad_idx].sum()


@loss("calls the model")
def calls_the_model(input_batch, target_batch, model, device):
    logits = model(input_batch.to(device))
    return F.cross_entropy(logits.flatten(0, 1), target_batch.to(device).flatten())


@loss("labels first, a tuple back")
def labels_first(y_true, y_pred):
    return F.cross_entropy(y_pred.flatten(0, 1), y_true.flatten()), y_pred.argmax(-1)


def of_transformers() -> Callable:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss


# -- steps


def next_token(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1), **options)


@step
def two_lines(model, optimizer, batch):
    x, y = batch
    loss = next_token(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@step
def resets_at_the_end(model, batch, optimizer):
    model.train()
    x, y = batch
    next_token(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


@step
def clips(model, optimizer, tokens, targets):
    model.train()
    loss = next_token(model(tokens), targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss


@step
def clips_by_value(model, optimizer, tokens, targets):
    optimizer.zero_grad()
    next_token(model(tokens), targets).backward()
    nn.utils.clip_grad_value_(model.parameters(), 0.05)
    optimizer.step()


@step
def clips_each(model, optimizer, tokens, targets):
    optimizer.zero_grad()
    next_token(model(tokens), targets).backward()
    for parameter in model.parameters():
        nn.utils.clip_grad_norm_(parameter, 0.05)
    optimizer.step()


@step
def criterion_given(model, x, y, optimizer, criterion):
    logits = model(x)
    loss = criterion(logits.view(-1, logits.size(-1)), y.view(-1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"loss": loss.item()}


@step
def shifts_inside(model, optimizer, batch):
    logits = model(batch["input_ids"])
    loss = next_token(logits[:, :-1], batch["labels"][:, 1:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


@step
def takes_tokens_alone(model, optimizer, tokens):
    loss = next_token(model(tokens[:, :-1]), tokens[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


@step
def scales(model, optimizer, batch, scheduler, scaler, device, max_norm=1.0):
    x, y = (tensor.to(device) for tensor in batch)
    loss = next_token(model(x), y)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()
    optimizer.zero_grad()
    return loss


@step
def by_the_sum(model, optimizer, batch):
    loss = next_token(model(batch[0]), batch[1], reduction="sum")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


@step
def smooths(model, optimizer, batch):
    loss = next_token(model(batch[0]), batch[1], label_smoothing=0.1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


@step
def leaves_out_padding(model, optimizer, batch):
    loss = next_token(model(batch[0]), batch[1], ignore_index=0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


@step
def skips_a_prompt(model, optimizer, batch):
    loss = next_token(model(batch[0])[:, 3:], batch[1][:, 3:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


@step
def with_a_penalty(model, optimizer, batch):
    loss = next_token(model(batch[0]), batch[1]) + 0.01 * sum(p.square().sum() for p in model.parameters())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


@step
def accumulates(model, optimizer, batch, accumulation=2):
    """Micro-batches weighted by their share of the targets."""
    x, y = batch
    optimizer.zero_grad()
    total = 0.0
    for tokens, targets in zip(x.chunk(accumulation), y.chunk(accumulation), strict=True):
        loss = next_token(model(tokens), targets, reduction="sum") / (y != -100).sum()
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(model.parameters(), 1e3)
    optimizer.step()
    return total


@step
def accumulates_over_calls(model, optimizer, batch, step, accumulation_steps=4):
    """The optimizer is stepped on every fourth call."""
    loss = next_token(model(batch[0]), batch[1])
    (loss / accumulation_steps).backward()
    if (step + 1) % accumulation_steps == 0:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@step
def insists_on_even_micro_batches(model, optimizer, batch):
    x, y = batch
    x, y = x.view(4, len(x) // 4, -1), y.view(4, len(y) // 4, -1)
    optimizer.zero_grad()
    losses = []
    for tokens, targets in zip(x, y, strict=True):
        losses.append(next_token(model(tokens), targets) / 4)
        losses[-1].backward()
    optimizer.step()
    return sum(losses).item()


@step
def scales_by_itself(model, optimizer, batch, scaler=None, max_norm=None, scheduler=None):
    model.train()
    optimizer.zero_grad()
    loss = next_token(model(batch[0]), batch[1])
    if scaler is not None:
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
    else:
        loss.backward()
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    if scheduler is not None:
        scheduler.step()
    return loss.item()


@step
def sets_its_own_rate(model, optimizer, x, y, it):
    for group in optimizer.param_groups:
        group["lr"] = 3e-3 * min(1.0, (it + 1) / 100)
    loss = next_token(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


@step
def decays_by_hand(model, optimizer, batch):
    loss = next_token(model(batch[0]), batch[1])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.999)
    return loss.item()


@step
def mean_of_each_row(model, optimizer, batch):
    x, y = batch
    losses = F.cross_entropy(model(x).transpose(1, 2), y, reduction="none")
    loss = (losses.sum(1) / (y != -100).sum(1)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@step
def every_micro_batch_a_step(model, optimizer, batch):
    total = 0.0
    for x, y in zip(batch[0].split(2), batch[1].split(2), strict=True):
        loss = next_token(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(x)
    return total / len(batch[0])


@step
def by_the_sum_reports_the_mean(model, optimizer, batch):
    loss = next_token(model(batch[0]), batch[1], reduction="sum")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item() / batch[1].numel()


@step
def with_a_closure(model, optimizer, batch):
    def closure():
        optimizer.zero_grad()
        loss = next_token(model(batch[0]), batch[1])
        loss.backward()
        return loss

    return optimizer.step(closure)
