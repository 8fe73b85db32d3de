"""The files of the sanity checks: per check its weights, config, metrics, samples and loss curves, and one report.

Written from the results alone; figures and report once, at the end of the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .libraries import import_for_good

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..training.sentence import Learned
    from .verdict import Verdict

FOLDERS = {
    "check_sanity.check_memorizes_the_sentence": "sanity_check_1",
    "check_sanity.check_learns_only_unmasked_targets": "sanity_check_2",
}
TITLES = {
    "sanity_check_1": "Sanity check 1 (all targets in the loss)",
    "sanity_check_2": "Sanity check 2 (first three targets masked)",
}
THRESHOLDS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
COLOURS = {"training": "#1f5fa8", "validation": "#d9822b", "all targets": "#8a8a8a"}


def save_run(out: Path, verdict: Verdict) -> None:
    """Writes the folder of one sanity check, as soon as it has run. Raises OSError or CheckpointError if it cannot."""
    learned: Learned = verdict.kept["learned"]
    folder = out / FOLDERS[verdict.check]
    folder.mkdir(parents=True, exist_ok=True)
    learned.trainer.save(folder / "checkpoint.pt")
    write(folder / "config.json", json.dumps(configuration(learned), indent=2, ensure_ascii=False, default=str) + "\n")
    write(folder / "metrics.jsonl", "".join(json.dumps(finite(record)) + "\n" for record in learned.curve))
    write(folder / "samples.txt", samples(learned))


def configuration(learned: Learned) -> dict[str, Any]:
    config: Any = getattr(learned.trainer.model, "config", None)
    return {
        "task": {"sentence": learned.task.sentence, "skip": learned.task.skip},
        "model": asdict(config) if hasattr(config, "__dataclass_fields__") else learned.sizes,
        "recipe": learned.recipe,
        "training": asdict(learned.trainer.config),
    }


def finite(record: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in record.items() if math.isfinite(value)}


def samples(learned: Learned) -> str:
    """One generated text per line: how it was decoded, the prompt and its completion."""
    lines = [("decoding", "prompt → completion")]
    lines += [(how, f"{prompt!r} → {completion!r}") for how, prompt, completion in learned.samples]
    return "".join(f"{how:<22}{text}\n" for how, text in lines)


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def finish(out: Path, subject: str, verdicts: Iterable[Verdict]) -> list[Path]:
    """Writes the figures and the report of the sanity checks that ran. Returns the files written."""
    runs = {FOLDERS[v.check]: v for v in verdicts if v.check in FOLDERS and "learned" in v.kept}
    if not runs:
        return []
    import_for_good("matplotlib.figure")
    written = []
    for name, verdict in runs.items():
        written.append(save_figure(loss_figure(TITLES[name], verdict.kept["learned"]), out / name / "loss.png"))
    if len(runs) == 2:
        written.append(save_figure(comparison_figure(runs), out / "comparison.png"))
    report = out / "report.md"
    write(report, report_text(subject, runs))
    return [*written, report]


# Figures


def save_figure(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    return path


def new_figure(says: str, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """Everything has a fixed place, and there are no minor ticks: matplotlib lays out longer than it draws."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    width = 6.4 if panels == 1 else 10.5
    figure = Figure(figsize=(width, 4.2))
    figure.subplots_adjust(left=0.85 / width, right=1 - 0.15 / width, bottom=0.13, top=0.91, wspace=0.05)
    figure.text(0.07 / width, 0.52, says, rotation="vertical", verticalalignment="center")
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for ax in axes:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("optimizer step")
        ax.xaxis.set_label_coords(0.5, -0.09)
        ax.grid(visible=True, which="major", alpha=0.3)
    return figure, list(axes)


def draw(ax: Axes, learned: Learned, key: str, label: str, **style: Any) -> None:
    """One curve; a single record is drawn as a point, because a line through it would be invisible."""
    records = [record for record in learned.curve if key in record]
    style.setdefault("marker", "o" if len(records) == 1 else None)
    ax.plot([r["step"] for r in records], [r[key] for r in records], label=label, **style)


def loss_figure(title: str, learned: Learned) -> Figure:
    figure, (ax,) = new_figure("loss (nats per target)")
    draw(ax, learned, "loss", "training", color=COLOURS["training"])
    draw(ax, learned, "validation_loss", "validation", color=COLOURS["validation"], linestyle="--")
    finish_axes(ax, title)
    return figure


def finish_axes(ax: Axes, title: str) -> None:
    ax.axhline(THRESHOLDS[-1], color="black", linewidth=0.8, linestyle=":", label="goal: 1e-5")
    ax.set_title(title, y=1.0)
    ax.legend(frameon=False, loc="center right")


def comparison_figure(runs: dict[str, Verdict]) -> Figure:
    """Both checks side by side: unmasked targets are learned, and masked ones keep the mean of all targets high."""
    figure, axes = new_figure("validation loss (nats per target)", len(runs))
    for ax, (name, verdict) in zip(axes, sorted(runs.items()), strict=True):
        learned = verdict.kept["learned"]
        draw(ax, learned, "validation_loss", "unmasked targets", color=COLOURS["training"])
        draw(ax, learned, "all_targets_loss", "all targets", color=COLOURS["all targets"], linestyle="--")
        finish_axes(ax, TITLES[name])
    return figure


# Report


def report_text(subject: str, runs: dict[str, Verdict]) -> str:
    parts = [f"# Sanity checks of {subject}\n"]
    for name, verdict in sorted(runs.items()):
        parts.append(section(name, verdict))
    if len(runs) == 2:
        parts.append("## Comparison\n\n![validation loss with and without masked targets](comparison.png)\n")
    return "\n".join(parts)


def section(name: str, verdict: Verdict) -> str:
    learned: Learned = verdict.kept["learned"]
    return "\n".join(
        [
            f"## {TITLES[name]}: {verdict.outcome}\n",
            f"{verdict.rule}\n",
            *([f"{verdict.says}\n"] if verdict.says else []),
            *([f"What to try: {verdict.advice}\n"] if verdict.advice else []),
            setup(learned) + "\n",
            losses_table(learned),
            thresholds_table(learned),
            f"![loss curves]({name}/loss.png)\n",
            f"Generated text:\n\n```\n{samples(learned)}```\n",
        ]
    )


def setup(learned: Learned) -> str:
    task, training = learned.task, learned.trainer.config
    parameters = sum(p.numel() for p in learned.trainer.model.parameters())
    sizes = ", ".join(f"{name} {value}" for name, value in learned.sizes.items())
    n = len(task.sentence)
    kept = f"the first {task.skip} of {n} targets are masked" if task.skip else f"all {n} targets are in the loss"
    return (
        f"Sentence “{task.sentence}”: {kept}; {len(task.train)} copies for training, {len(task.validation)} for "
        f"validation, {len(task.test)} for testing. Model: {parameters:,} parameters ({sizes}). "
        f"{learned.recipe.capitalize()} recipe: {training.optimizer}, learning rate {training.learning_rate:g}, "
        f"betas {training.beta1:g} and {training.beta2:g}, batch size {training.batch_size}, "
        f"{training.warmup_steps} warm-up steps, seed {training.seed}; trained for {learned.trainer.steps_done} steps."
    )


def losses_table(learned: Learned) -> str:
    rows = ["| mean loss of unmasked targets (nats) | before training | after |", "|---|---|---|"]
    rows += [
        f"| {split} | {learned.before[split]:.4g} | {learned.after[split]:.3g} |"
        for split in ("train", "validation", "test")
    ]
    if learned.task.skip:
        rows.append(f"| masked targets (not trained) | | {learned.masked:.4g} |")
    return "\n".join(rows) + "\n"


def thresholds_table(learned: Learned) -> str:
    steps = [learned.crossed(threshold) for threshold in THRESHOLDS]
    return "\n".join(
        [
            "| training loss at most | " + " | ".join(f"{t:g}" for t in THRESHOLDS) + " |",
            "|---" * (len(THRESHOLDS) + 1) + "|",
            "| first reached at step | " + " | ".join("never" if s is None else str(s) for s in steps) + " |\n",
        ]
    )
