"""The loss, in forward or a function of its own, and the training step."""

from __future__ import annotations

from ..edit import Edit
from ..wording import cross_entropy

LOSSES = "losses = F.cross_entropy("
MEAN = "return (losses * mask).sum() / mask.sum().clamp(min=1)"
STEP, BACKWARD, RESET = "    optimizer.step()\n", "    loss.backward()\n", "    optimizer.zero_grad()\n"
CLIP = "        nn.utils.clip_grad_norm_(model.parameters(), max_norm)\n"
CLIPPED = f"    if max_norm is not None:\n{CLIP}"
TICK = "    if scheduler is not None:\n        scheduler.step()\n"
OF_STEP = (
    "model(tokens, targets)[1]", "masked_loss(model(tokens), targets)", "compute_loss(model(tokens), targets)",
    "loss_fn(model(tokens), targets)",
)  # fmt: skip
OWN_SHIFT = {"logits[:, :-1].flatten(0, 1)": "labels[:, 1:].flatten()"}  # of the forms that shift the labels themselves


def own(bug: str, line: str) -> Edit:
    """A line at the beginning of a loss function of logits, targets and mask."""
    return Edit(bug, {LOSSES: f"{line}\n    {LOSSES}"})


def mean(bug: str, code: str) -> Edit:
    """Another mean of the losses [B, T] under the mask."""
    return Edit(bug, {MEAN: code})


def shifted(bug: str, logits: str, labels: str) -> Edit:
    """Another shift in forward."""
    return Edit(bug, {"logits[:, :-1].flatten(0, 1)": logits, "labels[:, 1:].flatten()": labels})


def given(bug: str, logits: str, targets: str) -> Edit:
    """Another pairing in the form whose forward takes shifted targets."""
    return Edit(bug, {"logits.view(-1, logits.size(-1))": logits, "targets.view(-1)": targets})


def option(bug: str, text: str) -> list[Edit]:
    """One more option of cross entropy."""
    return [Edit(bug, {old: f"{old[:-1]}, {text})"}) for old in ('reduction="none")', "ignore_index=-100)")]


PAIRING = [
    shifted("label-shift-missing", "logits.flatten(0, 1)", "labels.flatten()"),
    own("label-shifted-twice", "logits, targets = logits[:, :-1], targets[:, 1:]\n    mask = mask if mask is None else mask[:, 1:]"),
    given("label-shifted-twice", "logits[:, :-1].flatten(0, 1)", "targets[:, 1:].flatten()"),
    shifted("label-shifted-twice", "logits[:, :-2].flatten(0, 1)", "labels[:, 2:].flatten()"),
    shifted("flatten-then-shift", "logits.flatten(0, 1)[:-1]", "labels.flatten()[1:]"),
    Edit("logits-labels-reshape-order", {"(logits.flatten(0, 1)": "(logits.transpose(0, 1).flatten(0, 1)"}),
    Edit("logits-labels-reshape-order",
         {"logits.view(-1, logits.size(-1))": "logits.transpose(0, 1).reshape(-1, logits.size(-1))"}),
    Edit("logits-labels-reshape-order", {"logits[:, :-1].flatten": "logits[:, :-1].transpose(0, 1).flatten"}),
    own("last-target-dropped", "logits, targets = logits[:, :-1], targets[:, :-1]\n    mask = mask if mask is None else mask[:, :-1]"),
    given("last-target-dropped", "logits[:, :-1].flatten(0, 1)", "targets[:, :-1].flatten()"),
    shifted("last-target-dropped", "logits[:, :-2].flatten(0, 1)", "labels[:, 1:-1].flatten()"),
    own("loss-of-other-ids", "targets = (targets - 1).clamp(min=0)"),
    given("loss-of-other-ids", "logits.view(-1, logits.size(-1))", "torch.where(targets > 0, targets - 1, targets).view(-1)"),
    shifted("loss-of-other-ids", "logits[:, :-1].flatten(0, 1)", "torch.where(labels > 0, labels - 1, labels)[:, 1:].flatten()"),
    Edit("loss-without-targets", {
        f"{LOSSES}logits.flatten(0, 1), targets.flatten(), reduction=\"none\").view(targets.shape)":
            "losses = -(logits.softmax(dim=-1) * logits.log_softmax(dim=-1)).sum(dim=-1)"
    }),
    *(
        Edit("objective-target-is-input", {f"loss = {call}": f"loss = {call.replace('targets)', 'tokens)')}"})
        for call in OF_STEP
    ),
    *option("pad-id-collides-with-real-token", "ignore_index=0")[:1],
    Edit("pad-id-collides-with-real-token", {"ignore_index=-100": "ignore_index=0"}),
    own("labels-alias-input-ids", "if mask is not None:\n        targets[mask == 0] = 0"),
]  # fmt: skip

MASKS = [
    mean("loss-mask-shifted-by-one", "mask = mask.roll(1, 1)\n    " + MEAN),
    mean("loss-mask-ignored", "return losses.mean()"),
    mean("loss-mask-inverted", "mask = 1 - mask.float()\n    " + MEAN),
    mean("loss-mask-of-row-0", "mask = mask[:1].expand_as(mask)\n    " + MEAN),
    mean("masked-numerator-unmasked", MEAN.replace("(losses * mask)", "losses")),
    Edit("masked-logits-zeroed", {
        LOSSES: f"logits = logits if mask is None else logits * mask[..., None]\n    {LOSSES}", MEAN: "return losses.mean()"
    }),
    mean("masked-mean-over-all-positions", "return (losses * mask).mean()"),
    mean("loss-mean-of-sequence-means", "return ((losses * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()"),
    mean("loss-divided-by-one-less", MEAN.replace("mask.sum().clamp", "(mask.sum() - 1).clamp")),
]  # fmt: skip

VALUES = [
    *cross_entropy("naive-log-of-softmax", "F.nll_loss({}.softmax(-1).log(),"),
    *cross_entropy("log-plus-eps", "F.nll_loss(({}.softmax(-1) + 1e-4).log(),"),
    *cross_entropy("loss-in-bf16", "F.cross_entropy({}.bfloat16(),"),
    *cross_entropy("softmax-twice", "F.cross_entropy({}.softmax(-1),"),
    *cross_entropy("nll-of-raw-logits", "F.nll_loss({},"),
    *cross_entropy("loss-softmax-over-positions", "F.nll_loss({}.log_softmax(0),"),
    *cross_entropy("loss-of-scaled-logits", "F.cross_entropy({} / 2,"),
    *cross_entropy("loss-in-bits", "1 / math.log(2) * F.cross_entropy({},"),
    *cross_entropy("loss-negated", "-F.cross_entropy({},"),
    *cross_entropy("loss-detached", "F.cross_entropy({}.detach(),"),
    *option("labels-smoothed", "label_smoothing=0.1"),
    Edit("normalisation-missing", {"return losses.mean()": "return losses.sum()"}),
    Edit("normalisation-missing", {"ignore_index=-100)": 'ignore_index=-100, reduction="sum")'}, only_in=("nanogpt",)),
    Edit("loss-never-computed", {
        "loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-100)":
            "loss = logits.view(-1, logits.size(-1))"
    }),
    Edit("loss-never-computed", {
        "loss = F.cross_entropy(shifted, labels[:, 1:].flatten(), ignore_index=-100)": "loss = shifted"
    }),
]  # fmt: skip


def step(bug: str, *changes: tuple[str, str]) -> Edit:
    return Edit(bug, dict(changes))


STEPS = [
    step("zero-grad-missing", (RESET, "")),
    step("zero-grad-between-backward-and-step", (BACKWARD, BACKWARD + RESET), (RESET, RESET)),
    step("step-with-stale-gradient", (STEP, ""), (RESET, STEP + RESET)),
    step("step-uphill", (BACKWARD, "    (-loss).backward()\n")),
    step("optimizer-steps-twice", (STEP, STEP + STEP)),
    step("step-by-another-optimizer", (STEP, "    type(optimizer)(model.parameters(), lr=0.05).step()\n")),
    step("step-pairs-other-rows", ("tokens, targets = batch\n", "tokens, targets = batch[0].roll(1, 0), batch[1]\n")),
    step("train-mode-never-set", ("    model.train()\n    tokens", "    tokens")),
    step("clip-missing", (CLIPPED, "")),
    step("step-clips-too-late", (CLIPPED, ""), (STEP, STEP + CLIPPED)),
    step("clip-before-backward", (CLIPPED, ""), (BACKWARD, CLIPPED + BACKWARD)),
    step("clip-per-parameter", (CLIP, "        for p in model.parameters():\n            nn.utils.clip_grad_norm_([p], max_norm)\n")),
    step("clip-by-value", (CLIP, CLIP.replace("norm_(", "value_("))),
    step("clip-by-another-norm", (CLIP, CLIP.replace("max_norm)", 'max_norm, norm_type=float("inf"))'))),
    step("clip-always-normalises", (CLIP,
        "        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])\n"
        "        for p in model.parameters():\n"
        "            p.grad.mul_(max_norm / norm)\n")),
    step("scheduler-never-ticks", (TICK, "")),
    step("scheduler-off-by-one", (RESET, TICK + RESET), (TICK + "    return", "    return")),
    *(
        step("reported-after-the-step", (f"loss = {call}", f"loss = {call}"), ("return loss.item()", f"return {call}.item()"))
        for call in OF_STEP
    ),
]  # fmt: skip

EDITS = [*PAIRING, *MASKS, *VALUES, *STEPS]
