"""The benchmarks at tiny sizes: when they run, what they measure, and what they say."""

from __future__ import annotations

import json
import re
import time

import pytest
import torch
import torch._dynamo  # cannot be imported twice, and each run here forgets what it imported
from torch import nn

from transformer_checks.checks import plugin
from transformer_checks.checks.probes import loads, timing
from transformer_checks.checks.run.options import Options
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.watch.memory import Held, peak_bytes

pytest_plugins = ("pytester",)

BENCHMARKS = str(plugin.BENCHMARKS)
STUDENT = """
import torch
from torch import nn

class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_embd=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, tokens):
        PERHAPS
        return self.head(self.embedding(tokens).cumsum(1))
"""


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(loads, "LOADS", (loads.TINY,))
    monkeypatch.setattr(loads, "SMALL", loads.TINY)
    for axis, (letter, grown) in list(loads.AXES.items()):
        monkeypatch.setitem(loads.AXES, axis, (letter, grown[:2]))


@pytest.fixture
def bench(pytester, tiny, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # within which nothing is measured

    def run(*options: str):
        return pytester.runpytest_inprocess(BENCHMARKS, "-p", "no:cacheprovider", "--benchmark-json=b.json", *options)

    return run


def measured(pytester) -> dict[str, dict]:
    found = json.loads((pytester.path / "b.json").read_text())["benchmarks"]
    return {benchmark["name"]: benchmark["extra_info"] for benchmark in found}


def test_every_benchmark_measures_the_subject_beside_the_reference_and_products(bench, pytester):
    result = bench()
    assert result.ret == 0
    found = measured(pytester)
    assert set(found) == {
        "bench_training_step[transformer-0.1M-eager]",
        *(f"bench_growth[transformer-{axis}]" for axis in ("length", "batch", "width", "depth")),
        "bench_decoding[transformer-cached]",
        "bench_decoding[transformer-uncached]",
    }
    step = found["bench_training_step[transformer-0.1M-eager]"]
    assert step["parameters"] == 65 * 64 + 64 * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64
    assert step["tokens_a_second"] > 100
    assert set(step["parts"]["subject"]) == {"forward", "backward", "optimizer"}
    assert step["peak_bytes"]["subject"] == step["peak_bytes"]["reference"] > 4 * step["parameters"]
    assert 0.3 < step["of_the_reference"]["median"] < 3  # of itself, on whatever machine
    assert 0 < step["share_of_the_products"]["median"]
    growth = found["bench_growth[transformer-batch]"]
    assert growth["sizes"] == [2, 4] and set(growth["exponents"]) == {"subject", "reference", "products"}
    decoding = found["bench_decoding[transformer-cached]"]
    assert len(decoding["seconds_a_token"]["subject"]) == 64
    text = result.stdout.str()
    for words in (
        "token/s",
        "× the reference's time",
        "a step takes T^",
        "the time per token changes by",
        "only with --slow",
    ):
        assert words in text


def test_a_student_is_measured_at_the_sizes_it_takes_and_without_a_cache(bench, pytester):
    (pytester.path / "student.py").write_text(STUDENT.replace("PERHAPS", ""))
    result = bench("--model", "student.py")
    assert result.ret == 0
    found = measured(pytester)
    assert "bench_training_step[student.py-like 0.1M-eager]" in found
    assert "bench_decoding[student.py-uncached]" in found and "bench_decoding[student.py-cached]" not in found


def test_what_a_subject_raises_is_said_with_its_own_line_and_no_traceback(bench, pytester):
    raising = "if self.training and torch.is_grad_enabled() and len(tokens) == 8: raise RuntimeError('eight rows')"
    (pytester.path / "student.py").write_text(STUDENT.replace("PERHAPS", raising))
    result = bench("--model", "student.py", "-k", "step")
    text = result.stdout.str()
    assert result.ret == 1
    assert "student.py:12: RuntimeError: eight rows" in text
    assert not re.search(r"bench_training.py:\d|During handling", text)


@pytest.mark.parametrize("options", [(), ("--model", "transformer"), ("--slow",)])
def test_no_other_run_collects_benchmarks(pytester, options):
    result = pytester.runpytest_inprocess(str(plugin.CHECKS), "--collect-only", "-q", *options)
    assert result.ret == 0 and "check_" in result.stdout.str()
    assert "bench_" not in result.stdout.str()


def test_gpu_collects_them(pytester, monkeypatch):
    """As on a machine with CUDA."""
    monkeypatch.setattr(Options, "device", lambda self: "cpu")
    found = pytester.runpytest_inprocess("--gpu", "--collect-only", "-q").stdout.str()
    assert "bench_training_step[transformer-124M-compiled]" in found and "check_training.py" in found


def test_the_parts_of_a_run_are_timed_between_its_marks():
    marks = timing.Marks(torch.device("cpu"))
    time.sleep(0.02)
    marks.mark("short")
    time.sleep(0.06)
    marks.mark("long")
    seconds = marks.seconds()
    assert list(seconds) == ["short", "long"]
    assert 0.02 <= seconds["short"] < seconds["long"]


def test_growth_is_the_exponent_and_its_interval():
    sizes = [1, 2, 4, 8]
    power = timing.growth(sizes, [[k * n**1.5 for n in sizes] for k in (1, 2, 3)])
    assert power.low == pytest.approx(1.5) == power.high
    mixed = timing.growth(sizes, [[n**p for n in sizes] for p in (1.0, 1.5, 2.0)])
    assert mixed.low == pytest.approx(1.0) and mixed.median == pytest.approx(1.5) and mixed.high == pytest.approx(2.0)


def test_what_a_step_holds_is_counted_exactly():
    layer = nn.Linear(100, 50, bias=False)
    x = torch.ones(1000, 100)
    assert peak_bytes(lambda: layer(x), x.device) == 4 * 1000 * 50
    kept = []
    with Held() as held:
        for _ in range(3):
            kept.append(layer(x).relu())  # 3 results, each with the input that relu needs for its gradient: its result
        assert held.now == 3 * 4 * 1000 * 50
        kept.clear()
        assert held.now == 0
    assert held.peak == 4 * 4 * 1000 * 50


def test_a_load_that_does_not_fit_is_said_with_what_it_takes(monkeypatch):
    monkeypatch.setattr(loads, "free_bytes", lambda device: 2**30)
    cpu = torch.device("cpu")
    assert loads.too_large(loads.TINY, cpu) is None
    largest = loads.LOADS[-1]
    assert "GiB, 1.0 GiB are free" in loads.too_large(largest, cpu)
    assert 4 * 2**30 < largest.bytes < 12 * 2**30  # two models of 124 million parameters with Adam are 4 GiB


def test_the_bound_of_decoding_is_the_faster_layout_of_the_weights(monkeypatch):
    """Whichever it is here: a layout that is made slow is never chosen."""
    for slow in loads.LAYOUTS:
        made = {}

        def products(sizes, lay, device, dtype, made=made, slow=slow):
            name = next(name for name, known in loads.LAYOUTS.items() if known is lay)
            made[name] = lambda: time.sleep(0.003 if name == slow else 0)
            return made[name]

        monkeypatch.setattr(loads, "vector_products", products)
        chosen = loads.decoding_products(loads.TINY.sizes)
        assert chosen is next(run for name, run in made.items() if name != slow)
    assert len(loads.LAYOUTS) == 2


def test_every_layout_holds_the_same_matrix():
    matrix = torch.arange(6.0).view(2, 3)
    laid = {name: lay(matrix) for name, lay in loads.LAYOUTS.items()}
    assert all(torch.equal(other, matrix) for other in laid.values())
    assert laid["row by row"].stride() == (3, 1) and laid["column by column"].stride() == (1, 2)


def test_a_model_of_fixed_sizes_is_measured_at_them():
    fixed = subject_of(nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9)))
    (load,) = loads.loads_of(fixed)
    assert load.name == "own sizes" and load.sizes.vocab_size == 9
    assert len(loads.loads_of(subject_of())) == len(loads.LOADS)
