"""`make bench`: the reference beside other implementations in one process; prints time ratios with intervals.

python -m benchmarks.compare [--nanogpt FOLDER] [--threads N] [--rounds N] [--cpu-time]
    [--batch ROWS TOKENS] [training | decoding]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks import peers
from benchmarks.peers import Peer
from transformer_checks.checks.probes.loads import decoding_products, training_products
from transformer_checks.checks.probes.timing import Ratio, Runs, in_turn, ratio
from transformer_checks.checks.subject import Sizes

SIZES = Sizes(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384)  # 10.7 million parameters
B, T = 8, 256
NEW_TOKENS = 255
PATIENCE = 70.0  # seconds, for each of the three parts
Clock = Callable[[], float]


@dataclass
class Figures:
    """The figures that the README states, each with its budget."""

    lines: list[str] = field(default_factory=list)

    def add(self, what: str, found: Ratio, budget: str) -> None:
        self.lines.append(f"{what:52} {found!s:24} budget {budget}")


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(f"torch {torch.__version__}, threads: {options.threads}, clock: {clock.__name__}, rounds: {options.rounds}")
    others = available(options.nanogpt)
    figures = Figures()
    if options.what != "decoding":
        training(others, options.batch, options.rounds, clock, figures)
    if options.what != "training":
        decoding(others, options.rounds, clock, figures)
    print("\nsummary: median of paired rounds with its 95 % interval", *figures.lines, sep="\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("training", "decoding"), help="default: both")
    parser.add_argument("--nanogpt", metavar="FOLDER", help="a clone of nanoGPT, which is skipped without it")
    parser.add_argument(
        "--batch", nargs=2, type=int, default=(B, T), metavar=("ROWS", "TOKENS"), help="of a training step"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="at most; at least three, however long they take")
    parser.add_argument(
        "--cpu-time", action="store_true", help="measure processor time, for a machine that others use too"
    )
    options = parser.parse_args()
    for name in ("threads", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if min(options.batch) < 1 or options.batch[1] > SIZES.block_size:
        parser.error(f"--batch must be at least 1 row of 1 to {SIZES.block_size} tokens, got {options.batch}")
    return options


def available(nanogpt: str | None) -> dict[str, Callable[[Sizes], Peer]]:
    """The other implementations that are installed, by name; prints which are skipped."""
    builders: dict[str, Callable[[Sizes], Peer]] = {
        "HF GPT-2": peers.hf_gpt2,
        "x-transformers": peers.x_transformers,
    }
    if nanogpt is None:
        print("nanoGPT skipped: no folder given (make bench NANOGPT=folder)")
    else:
        builders = {"nanoGPT": lambda sizes: peers.nanogpt(nanogpt, sizes), **builders}
    found = {}
    for name, build in builders.items():
        try:
            build(Sizes())
            found[name] = build
        except (ImportError, FileNotFoundError) as error:
            print(f"{name} skipped: {error}")
    return found


def training(
    others: dict[str, Callable[[Sizes], Peer]], batch: tuple[int, int], rounds: int, clock: Clock, figures: Figures
) -> None:
    tokens, targets = torch.randint(SIZES.vocab_size, (2, *batch))

    def step(peer: Peer, **how: bool) -> Callable[[], object]:
        return lambda: peer.step(tokens, targets, **how)

    ours = peers.ours(SIZES)
    runs = {"ours": step(ours), **{name: step(build(SIZES)) for name, build in others.items()}}
    runs["matrix products"] = training_products(SIZES, *batch)
    runs["ours, bfloat16"] = step(peers.ours(SIZES, attention="explicit"), bfloat16=True)
    runs["ours, bfloat16, fused"] = step(ours, bfloat16=True)
    if "nanoGPT" in others:
        runs["nanoGPT, bfloat16"] = step(others["nanoGPT"](SIZES), bfloat16=True)
    seconds = report("training step", runs, tokens.numel(), rounds, clock)
    figures.add("step, float32 / matrix products", ratio(seconds["ours"], seconds["matrix products"]), "≤ 1.05")
    if "nanoGPT" in seconds:
        figures.add("step, float32 / nanoGPT", ratio(seconds["ours"], seconds["nanoGPT"]), "≤ 1.00")
        for name, theirs, budget in (
            ("step, bfloat16 / nanoGPT in float32", "nanoGPT", "≤ 0.55 where the CPU has bfloat16"),
            ("step, bfloat16 / nanoGPT in bfloat16", "nanoGPT, bfloat16", "≤ 1.00"),
        ):
            figures.add(name, ratio(seconds["ours, bfloat16"], seconds[theirs]), budget)
        fused = ratio(seconds["ours, bfloat16, fused"], seconds["nanoGPT, bfloat16"])
        figures.add("  the same with PyTorch's fused attention", fused, "none")


def decoding(others: dict[str, Callable[[Sizes], Peer]], rounds: int, clock: Clock, figures: Figures) -> None:
    prompt = torch.zeros(1, 1, dtype=torch.long)

    def decode(peer: Peer) -> Callable[[], object]:
        return lambda: peer.decode(prompt, NEW_TOKENS)

    products = decoding_products(SIZES)
    runs = {"ours": decode(peers.ours(SIZES))}
    runs |= {name: decode(build(SIZES)) for name, build in others.items() if name != "nanoGPT"}
    runs["matrix-vector products"] = lambda: [products() for _ in range(NEW_TOKENS)]
    seconds = report("decoding, cached", runs, NEW_TOKENS, rounds, clock)
    share = ratio(seconds["matrix-vector products"], seconds["ours"])
    figures.add("decoding, share of the matrix-vector bound", share, "≥ 0.85")
    if "HF GPT-2" in seconds:
        figures.add(
            "decoding, times as fast as HF with its cache", ratio(seconds["HF GPT-2"], seconds["ours"]), "≥ 1.3"
        )
        bound = ratio(seconds["HF GPT-2"], seconds["matrix-vector products"])
        figures.add("  and no float32 decoding could be faster than", bound, "none: the bound / HF")
    uncached = {"ours": runs["ours"], "ours, no cache": decode(peers.ours_without_cache(SIZES))}
    if "nanoGPT" in others:
        uncached["nanoGPT, no cache"] = decode(others["nanoGPT"](SIZES))
    uncached["matrix-vector products"] = runs["matrix-vector products"]
    seconds = report("decoding, without a cache", uncached, NEW_TOKENS, rounds, clock)
    if "nanoGPT, no cache" in seconds:
        figures.add("decoding, times as fast as nanoGPT", ratio(seconds["nanoGPT, no cache"], seconds["ours"]), "≥ 20")
        bound = ratio(seconds["nanoGPT, no cache"], seconds["matrix-vector products"])
        figures.add("  and no float32 decoding could be faster than", bound, "none: the bound / nanoGPT")


def report(title: str, runs: Runs, tokens: int, rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Prints the median time and speed of each run, and its time relative to ours with the 95 % interval."""
    seconds = in_turn(runs, rounds, clock=clock, patience=PATIENCE)
    made = len(seconds["ours"])
    print(f"\n{title}, {made} rounds\n{'':24} {'ms':>9} {'token/s':>9}   its time / ours [95 %]     ours / its time")
    for name, times in seconds.items():
        median = statistics.median(times)
        theirs, inverse = ratio(times, seconds["ours"]), ratio(seconds["ours"], times)
        print(f"{name:24} {median * 1e3:9.1f} {tokens / median:9.1f}   {theirs!s:24}  {inverse}", flush=True)
    return seconds


if __name__ == "__main__":
    main()
