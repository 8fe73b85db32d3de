"""`make bench`: the reference beside other implementations, in turn in one process; prints ratios with intervals.

python -m benchmarks.compare [--nanogpt FOLDER] [--threads N] [--rounds N] [--cpu-time] [training | decoding]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks import peers
from benchmarks.peers import Peer
from checks.probes.matrix_products import decoding_products, training_products
from checks.probes.timing import Runs, in_turn, ratio
from checks.subject import Sizes

SIZES = Sizes(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384)  # 10.7 million parameters
B, T = 8, 256
NEW_TOKENS = 255
Clock = Callable[[], float]


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(f"torch {torch.__version__}, threads: {options.threads}, clock: {clock.__name__}, rounds: {options.rounds}")
    if options.nanogpt is None:
        print("nanoGPT skipped: no folder given (make bench NANOGPT=folder)")
    if options.what != "decoding":
        training(options, clock)
    if options.what != "training":
        decoding(options, clock)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("training", "decoding"), help="by default both")
    parser.add_argument("--nanogpt", metavar="FOLDER", help="a clone of nanoGPT; without it that peer is skipped")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for a machine that others load too")
    return parser.parse_args()


def training(options: argparse.Namespace, clock: Clock) -> None:
    tokens, targets = torch.randint(SIZES.vocab_size, (2, B, T))

    def step(peer: Peer, **how: bool) -> Callable[[], object]:
        return lambda: peer.step(tokens, targets, **how)

    others = dict(
        with_nanogpt(options, {"HF GPT-2": peers.hf_gpt2(SIZES), "x-transformers": peers.x_transformers(SIZES)})
    )
    ours = peers.ours(SIZES)
    runs = {"ours": step(ours)} | {name: step(peer) for name, peer in others.items()}
    runs["matrix products"] = training_products(SIZES, B, T)
    runs["ours, bfloat16"] = step(ours, bfloat16=True)
    if "nanoGPT" in others:
        runs["nanoGPT, bfloat16"] = step(others["nanoGPT"], bfloat16=True)
    report("training step", "token/s", runs, B * T, options.rounds, clock)


def decoding(options: argparse.Namespace, clock: Clock) -> None:
    prompt = torch.zeros(1, 1, dtype=torch.long)

    def decode(peer: Peer) -> Callable[[], object]:
        return lambda: peer.decode(prompt, NEW_TOKENS)

    products = decoding_products(SIZES)
    runs = {
        "ours": decode(peers.ours(SIZES)),
        "HF GPT-2": decode(peers.hf_gpt2(SIZES)),
        "x-transformers": decode(peers.x_transformers(SIZES)),
        "matrix-vector products": lambda: [products() for _ in range(NEW_TOKENS)],
    }
    report("decoding, cached", "token/s", runs, NEW_TOKENS, options.rounds, clock)
    slow = {"ours": runs["ours"], "ours, no cache": decode(peers.ours_without_cache(SIZES))}
    for name, peer in with_nanogpt(options, {}):
        slow[f"{name}, no cache"] = decode(peer)
    report("decoding, without a cache", "token/s", slow, NEW_TOKENS, max(3, options.rounds // 5), clock)


def with_nanogpt(options: argparse.Namespace, others: dict[str, Peer]) -> Iterator[tuple[str, Peer]]:
    if options.nanogpt is not None:
        yield "nanoGPT", peers.nanogpt(options.nanogpt, SIZES)
    yield from others.items()


def report(title: str, unit: str, runs: Runs, amount: int, rounds: int, clock: Clock) -> None:
    """Of each run the median time and speed, and its time as a multiple of ours with the 95 % interval."""
    seconds = in_turn(runs, rounds, clock=clock)
    print(f"\n{title}\n{'':24} {'ms':>9} {unit:>9}   its time / ours [95 %]     ours / its time")
    for name, times in seconds.items():
        median = statistics.median(times)
        theirs, inverse = ratio(times, seconds["ours"]), ratio(seconds["ours"], times)
        print(f"{name:24} {median * 1e3:9.1f} {amount / median:9.1f}   {theirs!s:24}  {inverse}")


if __name__ == "__main__":
    main()
