"""`make mutants FILE=model.py[:NAME]`: how many small changes to a model's source file the checks catch.

Each mutant is judged in a process of its own, with a time limit. A mutant is live if it runs and changes anything that
is measured here; a live one is caught by a law, caught only by the declared spec, or survives. The results are one JSON
line per mutant, and a run that was stopped continues where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from power.mutations import Mutant, distinct, mutants, negated
from transformer_checks.checks.check_spec import declared
from transformer_checks.checks.family.fit import FAMILIES, fit_to
from transformer_checks.checks.run.order import check_id, checks_in
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.run.verdict import judge
from transformer_checks.checks.subject import Subject

# Themes in the order they are tried, cheap ones first: judging a mutant stops at the first check that fails.
LAWS = ("contract", "modes", "causality", "positions", "masking", "initialization", "loss", "parts", "gradients",
        "cache", "generation", "sampling", "numerics")  # fmt: skip
BROKEN = ("failed", "error")
RESULTS = {  # the values of "result" in the file, and how the report words them
    "not reached": "in code that never runs",
    "crashes": "crash",
    "too slow": "timed out",
    "nothing changes": "change nothing measured",
    "laws": "caught by a law",
    "spec": "caught only by the spec",
    "survives": "survive",
}
SAME = 1e-6  # relative difference up to which two numbers count as equal
SEED = 11


# -- what a model computes


def behaviour(subject: Subject) -> dict[str, Any]:
    """Everything measured to tell whether a mutant is live: initial weights, outputs, gradients, generated tokens."""
    sizes: dict[str, Any] = {"dropout": 0.3} if subject.can_vary("dropout") else {}
    seen: dict[str, Any] = {}
    for layers in (2, 3) if subject.can_vary("n_layer") else (subject.sizes.n_layer,):
        more = {"n_layer": layers} if subject.can_vary("n_layer") else {}
        model = subject.build(seed=SEED, **more)
        seen |= {f"{layers} layers, {name}": value.clone() for name, value in model.state_dict().items()}
        seen[f"{layers} layers, parameters"] = [name for name, _ in model.named_parameters()]
    model = subject.amplified(seed=SEED, dtype=torch.float32)
    for T in {1, 5, subject.sizes.block_size}:
        seen[f"logits of {T}"] = subject.logits(model, subject.tokens(3, T, seed=T))
    logits = subject.logits(model, subject.tokens(2, 6, seed=2))
    model.zero_grad()
    torch.autograd.backward(logits.square().mean())
    seen |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    noisy = subject.amplified(seed=SEED, dtype=torch.float32, **sizes).train()
    torch.manual_seed(SEED)
    seen["in training"] = subject.logits(noisy, subject.tokens(3, 7, seed=3))
    return seen | _outputs(subject, subject.amplified(seed=SEED, dtype=torch.float32))


def _outputs(subject: Subject, model: Any) -> dict[str, Any]:
    """The results of calling the model directly: with and without targets, and its own generate."""
    tokens, seen = subject.tokens(2, 6, seed=4), {}
    calls: dict[str, Callable[[], Any]] = {
        "alone": lambda: model(tokens),
        "with targets": lambda: model(tokens, subject.tokens(2, 6, seed=5)),
        "text": lambda: model.generate(tokens, 20),
        "text, few": lambda: model.generate(tokens, 5, top_k=3),
        "text, hot": lambda: model.generate(tokens, 5, temperature=2.0),
    }
    for name, call in calls.items():
        torch.manual_seed(SEED)
        try:
            seen[name] = call()
        except Exception as error:  # not every model accepts every call
            seen[name] = type(error).__name__
    return seen


def alike(one: Any, other: Any) -> bool:
    """Whether two results are equal, floats up to a relative difference of SAME."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        one, other = one.detach(), other.detach()
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        if not one.is_floating_point():
            return bool((one == other).all())
        same = (one == other) | (one.isnan() & other.isnan())
        difference = torch.where(same, 0.0, (one.double() - other.double()).abs()).max() if one.numel() else 0.0
        finite = other.double().abs().nan_to_num(posinf=0.0)
        return bool(difference <= SAME * (float(finite.max()) if one.numel() else 0.0))
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(alike(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(alike(value, other[name]) for name, value in one.items())
    return type(one) is type(other) and (isinstance(one, torch.nn.Module) or contents(one) == contents(other))


def contents(value: Any) -> Any:
    """Something comparable: the names and values of an object's fields, or the value itself."""
    return repr(sorted(map(str, vars(value)))) if hasattr(value, "__dict__") else value


# -- judging one file


def outcomes(subject: Subject, themes: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    """Yields check, outcome and message of each verdict, as soon as it is known."""
    earlier: dict[str, Any] = {}
    for theme in themes:
        for check in checks_in(theme):
            if not getattr(check, "slow", None):
                verdict = judge(check, subject, earlier)
                earlier[check_id(check)] = verdict
                yield verdict.check, verdict.outcome, verdict.says


def baseline(what: str, spec: str, laws: tuple[str, ...]) -> dict[str, Any]:
    """What is compared with every mutant: how the unchanged file behaves, its verdicts, and its architecture family."""
    subject = subject_of(what, seed=SEED)
    family = _family(subject) if spec == "auto" else spec
    with _called() as functions:
        seen = behaviour(subject_of(what, seed=SEED))
    subject = subject_of(what, seed=SEED, spec=family or "auto")
    verdicts = {check: outcome for check, outcome, _ in outcomes(subject, laws)}
    if family:
        verdicts |= {check: outcome for check, outcome, _ in outcomes(subject, ("spec",))}
    return {"behaviour": seen, "outcomes": verdicts, "family": family, "functions": functions, "built": built(subject),
            "open": left_open(subject, family)}  # fmt: skip


def built(subject: Subject) -> str:
    """How the constructor was called. A mutant that needs other arguments counts as a crash."""
    return subject.header.split(" · ")[1]


@contextmanager
def _called() -> Iterator[set[tuple[str, int]]]:
    """Collects the functions that run inside the block, by file and first line."""
    found: set[tuple[str, int]] = set()

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            found.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)


def _family(subject: Subject) -> str:
    if declared(subject) in FAMILIES:
        return str(declared(subject))
    return next((family for family in FAMILIES if fit_to(subject, family).agrees), "")


def judged(what: str, before: dict[str, Any], laws: tuple[str, ...]) -> dict[str, Any]:
    """Whether a mutant is live, and the first check that catches it: a law, otherwise a check of the spec."""
    try:
        subject = subject_of(what, seed=SEED)
        if built(subject) != before["built"]:
            return {"result": "crashes", "says": f"can only be built differently: {subject.header}"}
        seen = behaviour(subject)
    except Exception as error:
        return {"result": "crashes", "says": f"{type(error).__name__}: {error}"[:200]}
    new = [n for n, v in seen.items() if isinstance(v, str) and before["behaviour"].get(n) != v]
    if new:
        return {"result": "crashes", "says": f"{new[0]}: {seen[new[0]]}"}
    changed = [n for n in {**before["behaviour"], **seen} if not alike(seen.get(n), before["behaviour"].get(n))]
    if not changed:
        return {"result": "nothing changes"}
    subject = subject_of(what, seed=SEED, spec=before["family"] or "auto")
    for result, themes in (("laws", laws), ("spec", ("spec",) if before["family"] else ())):
        for check, outcome, says in outcomes(subject, themes):
            if outcome in BROKEN and before["outcomes"].get(check) not in BROKEN:
                return {"result": result, "check": check, "says": says[:300], "changed": changed[:3]}
    why = why_it_survives(changed, before["open"], left_open(subject, before["family"]))
    return {"result": "survives", "changed": changed[:6], "why": why}


def left_open(subject: Subject, family: str) -> dict[str, str]:
    """The choices that a family leaves open to a model, and what this model chose."""
    found = fit_to(subject, family) if family else None
    if found is None or not found.agrees or found.plan is None:
        return {}
    plan = found.plan
    vectors = sum(w.trained and w.tensor.dim() == 1 for w in plan.inventory.weights)
    return {
        "output head": "tied" if plan.tied else "untied",
        "number of biases and gains": f"{vectors}",
        "hyperparameters": str(found.variant),
        "layout of queries, keys and values": plan.arrangement,
    }


def why_it_survives(changed: list[str], before: dict[str, str], now: dict[str, str]) -> str:
    """Why no check fails on a live mutant, as far as the measurements show; "" if unknown."""
    different = [f"{name} ({before[name]} → {value})" for name, value in now.items() if before.get(name) != value]
    if before and different:
        return f"the family allows either: {', '.join(different)}"
    if all(name.startswith("text") for name in changed):
        return "only a default value in generate changes"
    if changed == ["with targets"]:
        return "only the output with targets changes: another loss, or other logits"
    if now and not any("layers, " in name for name in changed):
        return "same architecture, the weights are arranged differently"
    return ""


# -- one process per mutant


def bounded(work: Callable[..., dict[str, Any]], *args: Any, seconds: float) -> dict[str, Any]:
    """The result of `work(*args)` in a forked process, which is killed after this many seconds."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, work, args))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(seconds) else {"result": "too slow"}
    except EOFError:
        return {"result": "crashes", "says": "the process ended"}
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def _work(pipe: Connection, work: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    torch.set_num_threads(1)
    try:
        pipe.send(work(*args))
    except BaseException:  # whatever it is, the parent reports it
        pipe.send({"result": "crashes", "says": traceback.format_exc()[-300:]})
    os._exit(0)


def write_mutant(file: Path, source: str, folder: Path) -> Path:
    """Writes the changed file into a folder, with links to the other files beside the original."""
    for sibling in file.resolve().parent.iterdir():
        if sibling.name != file.name and not sibling.name.startswith((".", "__pycache__")):
            (folder / sibling.name).symlink_to(sibling)
    changed = folder / file.name
    changed.write_text(source, encoding="utf-8")
    return changed


# -- a run


def run(what: str, *, spec: str, laws: tuple[str, ...], sample: int, seconds: float, out: Path) -> list[dict[str, Any]]:
    """Judges the mutants that are not in the file `out` yet, and returns all results."""
    path, _, name = what.partition(":")
    file = Path(path)
    found = distinct((*mutants(file.read_text()), *negated(file.read_text())))
    random.Random(SEED).shuffle(found)  # so that a stopped run, or a sample, covers the whole file
    found = found[: sample or None]
    done = {r["id"]: r for r in map(json.loads, out.read_text().splitlines())} if out.exists() else {}
    left = [m for m in found if m.id not in done]
    print(f"{len(found)} mutants of {file}, {len(left)} left to judge; results go to {out}", flush=True)
    before = baseline(what, spec, laws)
    broken = [check for check, outcome in before["outcomes"].items() if outcome in BROKEN]
    family = before["family"] or "no known architecture"
    print(f"unchanged file: {family}; failing checks: {', '.join(broken) or 'none'}", flush=True)
    for number, mutant in enumerate(left, 1):
        start = time.monotonic()
        done[mutant.id] = _judge(mutant, file, name, before, laws, seconds)
        with out.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(done[mutant.id]) + "\n")
        told = ", ".join(done[mutant.id][key] for key in ("result", "check") if key in done[mutant.id])
        print(f"{number}/{len(left)} {time.monotonic() - start:4.1f} s  {mutant}: {told}", flush=True)
    return sorted((done[m.id] for m in found), key=lambda r: r["line"])


def _judge(
    mutant: Mutant, file: Path, name: str, before: dict[str, Any], laws: tuple[str, ...], seconds: float
) -> dict[str, Any]:
    about = {"id": mutant.id, "mutant": str(mutant), "line": mutant.line}
    if mutant.function and not any(
        line == mutant.function and Path(path).name == file.name for path, line in before["functions"]
    ):
        return {**about, "result": "not reached"}
    with tempfile.TemporaryDirectory() as folder:
        changed = write_mutant(file, mutant.source, Path(folder))
        result = bounded(judged, f"{changed}:{name}" if name else str(changed), before, laws, seconds=seconds)
    return {**about, **result}


def report(results: list[dict[str, Any]]) -> str:
    """The counts, the share of live mutants caught, and the survivors grouped by reason."""
    counts = {kind: sum(r["result"] == kind for r in results) for kind in RESULTS}
    live = counts["laws"] + counts["spec"] + counts["survives"]
    lines = [", ".join(f"{counts[kind]} {words}" for kind, words in RESULTS.items())]
    if live:
        both = counts["laws"] + counts["spec"]
        lines.append(f"{live} live mutants: the laws alone catch {counts['laws']} ({counts['laws'] / live:.0%}), "
                     f"with the declared spec {both} ({both / live:.1%})")  # fmt: skip
    survivors = sorted((r for r in results if r["result"] == "survives"), key=lambda r: r.get("why", ""))
    for why, group in groupby(survivors, key=lambda r: r.get("why", "")):
        lines.append(f"survivors, {why or 'reason unknown'}:")
        lines += [f"  {r['mutant']} (changes {', '.join(r['changed'])})" for r in group]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m power.mutants", description=__doc__.split("\n")[0])
    parser.add_argument("file", metavar="FILE.py[:NAME]", help="the source file of a model")
    parser.add_argument("--spec", default="auto", help="gpt2 or llama; by default the one whose logits agree")
    parser.add_argument("--laws", default=",".join(LAWS), help="themes to try, in this order")
    parser.add_argument("--sample", type=int, default=0, help="judge only this many, drawn at random; 0: all")
    parser.add_argument("--seconds", type=float, default=90.0, help="time limit per mutant")
    parser.add_argument("--out", type=Path, default=Path("out/mutants"), help="folder for the results")
    given = parser.parse_args(arguments)
    file = Path(given.file.partition(":")[0])
    if not file.is_file():
        parser.error(f"no such file: {file}")
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    out = given.out / ("-".join(file.resolve().parts[-2:]) + ".jsonl")
    laws = tuple(theme for theme in given.laws.split(",") if theme)
    print(report(run(given.file, spec=given.spec, laws=laws, sample=given.sample, seconds=given.seconds, out=out)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
