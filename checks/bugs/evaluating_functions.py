"""Wrong functions that evaluate a model: what they leave behind, and how they average."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..check_evaluation import (
    check_a_function_that_evaluates_leaves_the_model_alone,
    check_an_evaluation_predicts_the_next_token,
    check_every_token_of_a_text_weighs_alike,
    check_perplexity_of_uniform_logits_is_the_vocabulary,
)
from . import bug
from .toolbox import losses_of_windows, mean_of_windows, parts_with_companions, replace


@bug(
    "evaluation puts averaged weights into the model and leaves them there",
    check_a_function_that_evaluates_leaves_the_model_alone,
    of=parts_with_companions,
)
def average_left_in_the_model(parts: SimpleNamespace) -> None:
    @torch.no_grad()
    def evaluate(model: nn.Module, ids: Tensor, block_size: int) -> float:
        for p in model.parameters():
            p.mul_(0.999)
        return mean_of_windows(model, ids, block_size, block_size)

    replace(parts, "evaluation", evaluate)


@bug(
    "evaluation calls backward: its gradients are added to the next step's",
    check_a_function_that_evaluates_leaves_the_model_alone,
    of=parts_with_companions,
)
def evaluation_adds_gradients(parts: SimpleNamespace) -> None:
    def evaluate(model: nn.Module, ids: Tensor) -> float:
        loss = F.cross_entropy(model(ids[None, :8])[0], ids[1:9])
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    replace(parts, "evaluation", evaluate)


@bug(
    "evaluation steps the weights along its own gradient",
    check_a_function_that_evaluates_leaves_the_model_alone,
    of=parts_with_companions,
)
def evaluation_steps(parts: SimpleNamespace) -> None:
    def evaluate(model: nn.Module, ids: Tensor) -> float:
        loss = F.cross_entropy(model(ids[None, :8])[0], ids[1:9])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(loss.detach())

    replace(parts, "evaluation", evaluate)


@bug(
    "evaluation freezes the parameters and does not unfreeze them",
    check_a_function_that_evaluates_leaves_the_model_alone,
    of=parts_with_companions,
)
def evaluation_freezes(parts: SimpleNamespace) -> None:
    def evaluate(model: nn.Module, ids: Tensor, block_size: int) -> float:
        model.requires_grad_(False)
        return mean_of_windows(model, ids, block_size, block_size)

    replace(parts, "evaluation", evaluate)


@bug(
    "evaluation seeds the global generator: training repeats its random numbers after each",
    check_a_function_that_evaluates_leaves_the_model_alone,
    of=parts_with_companions,
)
def evaluation_seeds(parts: SimpleNamespace) -> None:
    @torch.no_grad()
    def evaluate(model: nn.Module, ids: Tensor, block_size: int) -> float:
        torch.manual_seed(1337)
        return mean_of_windows(model, ids, block_size, block_size)

    replace(parts, "evaluation", evaluate)


@bug(
    "perplexity averages the means of windows that count different numbers of targets",
    check_every_token_of_a_text_weighs_alike,
    of=parts_with_companions,
)
def perplexity_mean_of_means(parts: SimpleNamespace) -> None:
    @torch.no_grad()
    def perplexity(model: nn.Module, ids: Tensor, block_size: int, stride: int = 4) -> float:
        means = [float(losses.mean()) for losses in losses_of_windows(model, ids, block_size, stride)]
        return math.exp(sum(means) / len(means))

    replace(parts, "evaluation", perplexity)


@bug(
    "perplexity counts the targets of overlapping windows once for each window",
    check_every_token_of_a_text_weighs_alike,
    of=parts_with_companions,
)
def perplexity_counts_overlaps(parts: SimpleNamespace) -> None:
    @torch.no_grad()
    def perplexity(model: nn.Module, ids: Tensor, block_size: int, stride: int = 4) -> float:
        total, count = 0.0, 0
        for start in range(0, len(ids) - 1, stride):
            end = min(start + block_size, len(ids) - 1)
            total += float(F.cross_entropy(model(ids[None, start:end])[0], ids[start + 1 : end + 1], reduction="sum"))
            count += end - start
        return math.exp(total / count)

    replace(parts, "evaluation", perplexity)


@bug(
    "perplexity divides by the windows' tokens, those that earlier windows counted too",
    check_perplexity_of_uniform_logits_is_the_vocabulary,
    of=parts_with_companions,
)
def perplexity_divides_by_all_tokens(parts: SimpleNamespace) -> None:
    @torch.no_grad()
    def perplexity(model: nn.Module, ids: Tensor, block_size: int, stride: int = 4) -> float:
        windows = losses_of_windows(model, ids, block_size, stride)
        return math.exp(sum(float(losses.sum()) for losses in windows) / (len(windows) * block_size))

    replace(parts, "evaluation", perplexity)


@bug(
    "perplexity compares the logits with the token just read",
    check_an_evaluation_predicts_the_next_token,
    of=parts_with_companions,
)
def perplexity_of_the_token_read(parts: SimpleNamespace) -> None:
    @torch.no_grad()
    def perplexity(model: nn.Module, ids: Tensor, block_size: int) -> float:
        pieces = torch.split(ids, block_size)
        total = sum(float(F.cross_entropy(model(piece[None])[0], piece, reduction="sum")) for piece in pieces)
        return math.exp(total / len(ids))

    replace(parts, "evaluation", perplexity)
