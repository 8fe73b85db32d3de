"""The files of the sanity checks are complete, readable and show the measured results."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from transformer_checks.checks.check_sanity import check_learns_only_unmasked_targets, check_memorizes_the_sentence
from transformer_checks.checks.reference import reference
from transformer_checks.checks.run import sanity_artifacts as artifacts
from transformer_checks.checks.run.verdict import judge
from transformer_checks.transformer.checkpoint import load_model
from transformer_checks.transformer.generation import generate


@pytest.fixture(scope="module")
def verdicts():
    subject = reference(seed=11)
    return [judge(c, subject, {}) for c in (check_memorizes_the_sentence, check_learns_only_unmasked_targets)]


@pytest.fixture
def out(tmp_path, verdicts):
    for verdict in verdicts:
        assert verdict.outcome == "passed", verdict.says
        artifacts.save_run(tmp_path, verdict)
    artifacts.finish(tmp_path, "transformer", verdicts)
    return tmp_path


def test_every_file_is_written(out):
    for check in ("sanity_check_1", "sanity_check_2"):
        for name in ("checkpoint.pt", "config.json", "metrics.jsonl", "samples.txt", "loss.png"):
            assert (out / check / name).stat().st_size > 0
    assert (out / "report.md").stat().st_size > 0


@pytest.mark.parametrize("picture", ["sanity_check_1/loss.png", "sanity_check_2/loss.png", "comparison.png"])
def test_a_figure_is_an_image_that_is_not_empty(out, picture):
    image = Image.open(out / picture).convert("RGB")
    assert min(image.size) > 300
    assert len(image.getcolors(maxcolors=10**6)) > 10


def test_the_saved_model_generates_the_sentence(out):
    import torch

    model, tokenizer = load_model(out / "sanity_check_1" / "checkpoint.pt")
    text = generate(model, torch.tensor([[tokenizer.begin, *tokenizer.encode("I l")]]), 20)
    assert tokenizer.decode(text[0]) == "I love machine learning"


def test_the_metrics_file_holds_the_learning_curve(out, verdicts):
    records = [json.loads(line) for line in (out / "sanity_check_2" / "metrics.jsonl").read_text().splitlines()]
    learned = verdicts[1].kept["learned"]
    assert [r["step"] for r in records] == list(range(1, learned.trainer.steps_done + 1))
    assert records[-1]["loss"] <= 1e-5
    assert records[-1]["masked_loss"] > 1
    assert records[0]["all_targets_loss"] > records[-1]["all_targets_loss"]


def test_the_report_has_the_measured_numbers(out, verdicts):
    report = (out / "report.md").read_text()
    for verdict in verdicts:
        learned = verdict.kept["learned"]
        assert f"{learned.after['test']:.3g}" in report
        assert f"{learned.trainer.steps_done} steps" in report
    assert report.count(": passed") == 2
    assert "'I l' → 'ove machine learning'" in report and "nats" in report
    for picture in ("sanity_check_1/loss.png", "sanity_check_2/loss.png", "comparison.png"):
        assert picture in report


def test_without_a_sanity_check_nothing_is_written(tmp_path):
    assert artifacts.finish(tmp_path, "x", []) == []
    assert not list(tmp_path.iterdir())


def test_no_text_of_a_figure_overlaps_another_or_leaves_it(verdicts):
    """Their places are fixed; nothing measures the texts when a figure is drawn."""
    runs = dict(zip(artifacts.TITLES, verdicts, strict=True))
    figures = [artifacts.loss_figure(artifacts.TITLES[name], v.kept["learned"]) for name, v in runs.items()]
    for figure in (*figures, artifacts.comparison_figure(runs)):
        figure.draw_without_rendering()
        boxes = {text.get_text(): text.get_window_extent() for text in texts(figure)}
        assert {"optimizer step", "1e−05", "goal: 1e-5"} < boxes.keys()
        assert all(figure.bbox.contains(*corner) for box in boxes.values() for corner in box.corners())
        assert not [(a, b) for a, b in itertools.combinations(boxes, 2) if boxes[a].overlaps(boxes[b])]


def texts(figure: Figure) -> Iterator[Text]:
    """Those that are drawn: beyond the ends of an axis there are ticks too. Of two panels, the first."""
    ax = figure.axes[0]
    yield from (*figure.texts, ax.title, ax.xaxis.label, *ax.get_legend().get_texts())
    for axis in (ax.xaxis, ax.yaxis):
        low, high = axis.get_view_interval()
        yield from (tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high)
