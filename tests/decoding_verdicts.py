"""What the tests of generation and sampling share: verdicts on a bug or on a generate, and the loops to start from."""

from __future__ import annotations

import inspect

import torch
from torch.nn import functional as F

from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.reference import reference_parts
from transformer_checks.checks.run.order import check_id, checks_in
from transformer_checks.checks.run.verdict import Verdict, judge
from transformer_checks.checks.subject import Subject

CHECKS = {check.__name__: check for theme in ("generation", "sampling", "decoding") for check in checks_in(theme)}
SEED = 3


def verdict(bug: str, check: str) -> Verdict:
    found = judge(CHECKS[check], all_bugs()[bug].subject(seed=SEED), {})
    assert found.outcome == "failed", f"{found.outcome}: {found.says}"
    return found


def verdicts(subject: Subject) -> dict[str, Verdict]:
    earlier: dict[str, Verdict] = {}
    for check in CHECKS.values():
        earlier[check_id(check)] = judge(check, subject, earlier)
    return {name.partition(".")[2]: found for name, found in earlier.items()}


def findings(subject: Subject) -> dict[str, str]:
    return {
        name: f"{found.outcome}: {found.says}"
        for name, found in verdicts(subject).items()
        if found.outcome not in ("passed", "not_applicable", "blocked")
    }


def with_generate(function, **declared) -> Subject:
    parts = reference_parts()
    parts.generate = function
    return Subject("own generate", parts, **declared)


def nanogpt(model, idx, max_new_tokens, temperature=1.0, top_k=None):
    """Crops, divides, filters, draws: the loop of most tutorials."""
    for _ in range(max_new_tokens):
        logits = model(idx[:, -model.config.block_size :])[:, -1, :] / temperature
        if top_k is not None:
            values, _ = torch.topk(logits, min(top_k, logits.size(-1)))
            logits[logits < values[:, [-1]]] = -float("inf")
        idx = torch.cat((idx, torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)), dim=1)
    return idx


@torch.no_grad()
def greedy_only(model, idx, max_new_tokens, context_size):
    for _ in range(max_new_tokens):
        idx = torch.cat((idx, model(idx[:, -context_size:])[:, -1].argmax(-1, keepdim=True)), dim=1)
    return idx


def changed(line: str, by: str):
    """nanoGPT's loop with one line of it changed."""
    source = inspect.getsource(nanogpt)
    assert line in source
    scope = {"torch": torch, "F": F}
    exec(source.replace(line, by), scope)
    return torch.no_grad()(scope["nanogpt"])
