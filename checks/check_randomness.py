"""Random parts other than dropout of single entries: whole branches left out, row by row (stochastic depth)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .expect import READABLE, REPEATS, NotApplicable, fail, farthest, needs, note
from .probes.branches import Left, rows_left_out
from .probes.expectation import Averaged
from .probes.influence import block_of_tokens
from .probes.module_state import mode_by_design
from .probes.precision import precise
from .subject import EXISTENCE, Subject
from .watch.draws import seeded
from .watch.dropout import NOT_A_SITE, is_dropout, reads_mode, set_rates
from .watch.location import locate

RATE = 0.3  # of the branches left out: large enough that some are, in each of a few runs
ROWS = 8


@needs(*READABLE, REPEATS)
def check_random_branches_keep_their_mean(subject: Subject) -> None:
    """A branch that training leaves out for some rows must be rescaled for the others, or scaled down in evaluation."""
    model, tokens = with_rates(subject), block_of_tokens(subject, ROWS)
    without_dropout = Averaged()

    def run(seed: int) -> torch.Tensor:
        with torch.no_grad(), seeded(subject.seed + seed), without_dropout:
            return subject.logits(model, tokens)

    model.train()
    if not farthest(run(1), run(2)) > 0:
        raise NotApplicable("nothing is random in training but dropout, if there is any")
    if odd := mode_by_design(model):
        raise NotApplicable(f"{odd} may legitimately compute something else in training mode")
    model.eval()
    judged: dict[str, float] = {}
    for name, module in model.named_modules():
        if reads_mode(module) and not is_dropout(module):
            left = rows_left_out(model, module, name or type(model).__name__, run)
            if left is not None:
                judged[left.module] = left.share
                if left.kept_as_evaluated:
                    fail_unscaled(model, left)
    if not judged:
        raise NotApplicable("training is random, but no module was seen to leave out branches for some rows only")
    note(left_out=judged)


def with_rates(subject: Subject) -> nn.Module:
    """A model that leaves out RATE of its branches, as far as that can be asked for."""
    silent = [option.name for option in subject.options if NOT_A_SITE.search(option.name) and option.value == 0]
    asked: dict[str, Any] = {"options": dict.fromkeys(silent, RATE)} if silent else {}
    model = precise(subject, EXISTENCE[1], **asked)
    set_rates(model, RATE)
    return model


def fail_unscaled(model: nn.Module, left: Left) -> None:
    fail(
        f"in training {left.module} leaves out a branch for {left.share:.0%} of the rows and gives the other rows "
        "exactly what evaluation gives all of them: on average the branch is smaller in training than in evaluation",
        where=locate(model, left.module),
        likely=("stochastic-depth-not-rescaled",),
        advice="Divide what is kept by 1 - p in training: x * kept / (1 - p); or multiply by 1 - p in evaluation.",
        share=left.share,
    )
