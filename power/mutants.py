"""`make mutants FILE=model.py[:NAME]`: how many one-place mistakes in a public model's file the checks catch.

Each mutant is judged in a process of its own, with a time limit. Those that are not reached, crash or change nothing
that is looked at are set aside; the rest are live: caught by the laws, by the laws and a declared spec, or survivors.
Every result is a line of a file, and a run that was stopped goes on where it was.
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

# Cheap ones first: a mutant is done with at the first check that fails.
LAWS = ("contract", "modes", "causality", "positions", "masking", "initialization", "loss", "parts", "gradients",
        "cache", "generation", "sampling", "numerics")  # fmt: skip
BROKEN = ("failed", "error")
RESULTS = ("not reached", "crashes", "too slow", "nothing changes", "laws", "spec", "survives")
SAME = 1e-6  # relative: numbers closer than this are the same behaviour
SEED = 11


# -- what a model does


def behaviour(subject: Subject) -> dict[str, Any]:
    """All that is looked at to tell whether a mutant is live: weights as drawn, outputs, gradients, texts."""
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
    logits.square().mean().backward()
    seen |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    noisy = subject.amplified(seed=SEED, dtype=torch.float32, **sizes).train()
    torch.manual_seed(SEED)
    seen["in training"] = subject.logits(noisy, subject.tokens(3, 7, seed=3))
    return seen | _outputs(subject, subject.amplified(seed=SEED, dtype=torch.float32))


def _outputs(subject: Subject, model: Any) -> dict[str, Any]:
    """What the model gives when called as its authors do: with and without targets, and texts."""
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
        except Exception as error:  # not every model has it
            seen[name] = type(error).__name__
    return seen


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        one, other = one.detach(), other.detach()
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        if not one.is_floating_point():
            return bool((one == other).all())
        same = (one == other) | (one.isnan() & other.isnan())
        apart = torch.where(same, 0.0, (one.double() - other.double()).abs()).max() if one.numel() else 0.0
        finite = other.double().abs().nan_to_num(posinf=0.0)
        return bool(apart <= SAME * (float(finite.max()) if one.numel() else 0.0))
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(alike(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(alike(value, other[name]) for name, value in one.items())
    return type(one) is type(other) and (isinstance(one, torch.nn.Module) or vars_or(one) == vars_or(other))


def vars_or(value: Any) -> Any:
    return repr(sorted(map(str, vars(value)))) if hasattr(value, "__dict__") else value


# -- one file judged


def outcomes(subject: Subject, themes: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    """(check, outcome, what it says), as they come."""
    earlier: dict[str, Any] = {}
    for theme in themes:
        for check in checks_in(theme):
            if not getattr(check, "slow", None):
                verdict = judge(check, subject, earlier)
                earlier[check_id(check)] = verdict
                yield verdict.check, verdict.outcome, verdict.says


def baseline(what: str, spec: str, laws: tuple[str, ...]) -> dict[str, Any]:
    """How the file behaves as it is, what each check says of it, and its family."""
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
    """How its constructor was called: a mutant that can only be built in another way crashes for its users."""
    return subject.header.split(" · ")[1]


@contextmanager
def _called() -> Iterator[set[tuple[str, int]]]:
    """The functions that ran inside, by file and first line."""
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
    """Whether a mutant is live, and which check catches it first: a law, else one of the spec."""
    try:
        subject = subject_of(what, seed=SEED)
        if built(subject) != before["built"]:
            return {"result": "crashes", "says": f"is built otherwise: {subject.header}"}
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
    """What a family leaves to each of its models, as it was found in this one."""
    found = fit_to(subject, family) if family else None
    if found is None or not found.agrees or found.plan is None:
        return {}
    plan = found.plan
    vectors = sum(w.trained and w.tensor.dim() == 1 for w in plan.inventory.weights)
    return {
        "the head": "tied" if plan.tied else "untied",
        "biases and gains": f"{vectors}",
        "the numbers": str(found.variant),
        "queries, keys and values": plan.arrangement,
    }


def why_it_survives(changed: list[str], before: dict[str, str], now: dict[str, str]) -> str:
    """What can be told of it mechanically; "" if nothing."""
    different = [f"{name} ({before[name]} → {value})" for name, value in now.items() if before.get(name) != value]
    if before and different:
        return f"left open by the family: {', '.join(different)}"
    if all(name.startswith("text") for name in changed):
        return "a default of generate"
    if changed == ["with targets"]:
        return "the loss that the model returns counts other targets, or its logits differ there"
    if now and not any("layers, " in name for name in changed):
        return "the same function of weights that lie otherwise"
    return ""


# -- a process each


def bounded(work: Callable[..., dict[str, Any]], *args: Any, seconds: float) -> dict[str, Any]:
    """The result of `work(*args)` in a forked process, which is killed when its time is over."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(there, work, args))
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(seconds) else {"result": "too slow"}
    except EOFError:
        return {"result": "crashes", "says": "the process ended"}
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def _work(pipe: Any, work: Callable[..., dict[str, Any]], args: tuple) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    torch.set_num_threads(1)
    try:
        pipe.send(work(*args))
    except BaseException:  # the parent must hear of it whatever it is
        pipe.send({"result": "crashes", "says": traceback.format_exc()[-300:]})
    os._exit(0)


def beside(file: Path, source: str, folder: Path) -> Path:
    """The changed file in a folder of its own, with links to what lay beside the original."""
    for sibling in file.resolve().parent.iterdir():
        if sibling.name != file.name and not sibling.name.startswith((".", "__pycache__")):
            (folder / sibling.name).symlink_to(sibling)
    changed = folder / file.name
    changed.write_text(source, encoding="utf-8")
    return changed


# -- a run


def run(what: str, *, spec: str, laws: tuple[str, ...], sample: int, seconds: float, out: Path) -> list[dict[str, Any]]:
    """Judges the mutants that `out` does not have yet; all results."""
    path, _, name = what.partition(":")
    file = Path(path)
    found = distinct((*mutants(file.read_text()), *negated(file.read_text())))
    random.Random(SEED).shuffle(found)  # a run that is stopped has seen all of the file; a larger one goes on from it
    found = found[: sample or None]
    done = {r["id"]: r for r in map(json.loads, out.read_text().splitlines())} if out.exists() else {}
    left = [m for m in found if m.id not in done]
    print(f"{len(found)} mutants of {file}, {len(left)} left to judge; results in {out}", flush=True)
    before = baseline(what, spec, laws)
    broken = [check for check, outcome in before["outcomes"].items() if outcome in BROKEN]
    print(f"as it is: {before['family'] or 'no known family'}; failed: {', '.join(broken) or 'none'}", flush=True)
    for number, mutant in enumerate(left, 1):
        start = time.monotonic()
        done[mutant.id] = _one(mutant, file, name, before, laws, seconds)
        with out.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(done[mutant.id]) + "\n")
        says = {k: v for k, v in done[mutant.id].items() if k in ("result", "check")}
        print(f"{number}/{len(left)} {time.monotonic() - start:4.1f} s  {mutant}: {says}", flush=True)
    return sorted((done[m.id] for m in found), key=lambda r: r["line"])


def _one(mutant: Mutant, file: Path, name: str, before: dict[str, Any], laws: tuple[str, ...], seconds: float):
    about = {"id": mutant.id, "mutant": str(mutant), "line": mutant.line}
    if mutant.function and not any(
        line == mutant.function and Path(path).name == file.name for path, line in before["functions"]
    ):
        return {**about, "result": "not reached"}
    with tempfile.TemporaryDirectory() as folder:
        changed = beside(file, mutant.source, Path(folder))
        result = bounded(judged, f"{changed}:{name}" if name else str(changed), before, laws, seconds=seconds)
    return {**about, **result}


def report(results: list[dict[str, Any]]) -> str:
    """Counts, shares, and the survivors by why they survive."""
    counts = {kind: sum(r["result"] == kind for r in results) for kind in RESULTS}
    live = counts["laws"] + counts["spec"] + counts["survives"]
    lines = [", ".join(f"{count} {kind}" for kind, count in counts.items())]
    if live:
        both = counts["laws"] + counts["spec"]
        lines.append(f"of {live} live ones the laws alone catch {counts['laws']} ({counts['laws'] / live:.0%}), "
                     f"with a declared spec {both} ({both / live:.1%})")  # fmt: skip
    survivors = sorted((r for r in results if r["result"] == "survives"), key=lambda r: r.get("why", ""))
    for why, group in groupby(survivors, key=lambda r: r.get("why", "")):
        lines.append(f"survive, {why or 'for no reason that is known'}:")
        lines += [f"  {r['mutant']} (changes {', '.join(r['changed'])})" for r in group]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m power.mutants", description=__doc__.split("\n")[0])
    parser.add_argument("file", help="FILE.py[:NAME] of a GPT-2 or Llama")
    parser.add_argument("--spec", default="auto", help="gpt2 or llama; by default the family that it agrees with")
    parser.add_argument("--laws", default=",".join(LAWS), help="themes, in the order to try them")
    parser.add_argument("--sample", type=int, default=0, help="judge so many, drawn at random; 0: all")
    parser.add_argument("--seconds", type=float, default=90.0, help="limit for one mutant")
    parser.add_argument("--out", type=Path, default=Path("out/mutants"), help="folder of the results")
    given = parser.parse_args(arguments)
    file = Path(given.file.partition(":")[0])
    if not file.is_file():
        parser.error(f"{file} is no file")
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    out = given.out / ("-".join(file.resolve().parts[-2:]) + ".jsonl")
    laws = tuple(theme for theme in given.laws.split(",") if theme)
    print(report(run(given.file, spec=given.spec, laws=laws, sample=given.sample, seconds=given.seconds, out=out)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
