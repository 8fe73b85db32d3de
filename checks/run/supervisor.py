"""Runs the checks in a process of their own and reports even a crash, a hang or an exit of that process.

Imports nothing slow, so that a mistake on the command line is answered at once.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .session import Session

CHECKS = Path(__file__).resolve().parents[1]
ROOT = str(
    Path(str(sys.modules[__name__.partition(".")[0]].__file__)).resolve().parents[1]
)  # where the package is found
PATIENCE = 300.0  # seconds without a new verdict
USAGE = """usage: transformer-checks FILE[:NAME] [options], or python -m transformer_checks FILE[:NAME] [options]

FILE.py[:NAME], NOTEBOOK.ipynb[:NAME] or package.module:NAME is the model to check; `transformer` is this project's own.
Options are those of `pytest --model`: --seed N, --budget SECONDS, --checkpoint FILE, --with PART=FILE:NAME, -k WORDS, …
  --patience SECONDS   longest time for one check; then the run is stopped (default: 300)"""
# Runs in the child. Neither the working directory nor ours comes before the standard library.
BOOT = """
import json, sys
sys.path.append({root!r})
import pytest
code = pytest.main(sys.argv[2:])
with open(sys.argv[1], "a", encoding="utf-8") as file:
    file.write(json.dumps({{"ended": int(code)}}) + "\\n")
sys.exit(int(code))
"""


@dataclass
class Watched:
    """What the child has written so far."""

    session: Session
    running: str = ""  # the check that started and has no verdict yet
    ended: int | None = None  # pytest's exit code, once it came to its end

    def read(self, line: str) -> None:
        try:
            record = json.loads(line)
        except ValueError:
            return
        if "started" in record:
            self.running = record["started"]
        elif "check" in record:
            self.running = ""
            self.session.add(record)
        elif "ended" in record:
            self.ended = record["ended"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns pytest's exit code, or 1 if the process did not reach its end."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if given else 4
    if given[0].startswith("-"):
        print(f"the first argument is the model, got {given[0]}\n{USAGE}", file=sys.stderr)
        return 4
    try:
        patience = _taken(given, "--patience", PATIENCE)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 4
    with tempfile.TemporaryDirectory() as folder:
        return _supervise(given, patience, Path(folder))


def _taken(given: list[str], option: str, default: float) -> float:
    """The value of an option of ours, which is removed from the arguments."""
    for index, text in enumerate(given):
        name, equals, value = text.partition("=")
        if name == option:
            value = value if equals else (given[index + 1] if index + 1 < len(given) else "")
            del given[index : index + (1 if equals else 2)]
            try:
                return float(value)
            except ValueError:
                raise ValueError(f"{option} takes seconds, got {value!r}") from None
    return default


def _supervise(given: list[str], patience: float, folder: Path) -> int:
    verdicts, errors = folder / "verdicts.jsonl", folder / "stderr.txt"
    ours = next((given[i + 1] for i, text in enumerate(given[:-1]) if text == "--verdicts"), None)
    path = Path(ours) if ours else verdicts
    start = path.stat().st_size if path.exists() else 0
    options = given[1:] if ours else [*given[1:], "--verdicts", str(verdicts)]
    # No conftest is read: this run is about the model alone, and a conftest's folder would come before the installed.
    command = [sys.executable, "-P", "-X", "faulthandler", "-c", BOOT.format(root=ROOT), str(path)]
    command += [
        "-p",
        f"{__name__.removesuffix('.run.supervisor')}.plugin",
        "--noconftest",
        "--model",
        given[0],
        *options,
    ]
    with open(errors, "wb") as stderr:
        child = subprocess.Popen(command, stderr=stderr)
        watched = Watched(Session(given[0]))
        hung = _watch(child, path, start, watched, patience)
    said = errors.read_text(encoding="utf-8", errors="replace")
    if watched.ended is not None and not hung:
        sys.stderr.write(said)
        if watched.ended or "--collect-only" in given:
            return watched.ended
        return 0 if watched.session.executed and not watched.running else 1
    print(_end_of(child.returncode, watched, said, hung, patience, given[0]), file=sys.stderr)
    return 1


def _watch(child: subprocess.Popen[bytes], path: Path, start: int, watched: Watched, patience: float) -> bool:
    """Reads verdicts until the child ends; True if it wrote none for too long and had to be stopped."""
    rest, heard = b"", time.monotonic()
    try:
        while True:
            over = child.poll() is not None
            if path.exists():
                with open(path, "rb") as file:
                    file.seek(start)
                    new = file.read()
                start += len(new)
                *whole, rest = (rest + new).split(b"\n")
                for line in whole:
                    watched.read(line.decode("utf-8", "replace"))
                heard = time.monotonic() if new else heard
            if over:
                return False
            if time.monotonic() - heard > patience:
                _stop(child)
                return True
            time.sleep(0.05)
    except KeyboardInterrupt:
        child.send_signal(signal.SIGINT)
        child.wait()
        return False


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Asks the child for its stack (faulthandler prints it on SIGABRT), then kills it."""
    child.send_signal(signal.SIGABRT)
    try:
        child.wait(timeout=5)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _end_of(code: int, watched: Watched, said: str, hung: bool, patience: float, model: str) -> str:
    """The message about a process that ended before its run did."""
    if hung:
        how = f"wrote no verdict for {patience:g} s and was stopped"
    elif code < 0:
        how = f"was killed by {_signal(-code)}"
    else:
        how = f"ended itself with exit code {code}"
    judged = len(watched.session.records)
    when = f"in {watched.running}" if watched.running else "between checks" if judged else "before its first check"
    lines = [f"✗ the process that ran {model} {how} {when}; {judged} checks had a verdict. This run is not green."]
    place = _last_line(said)
    if place:
        lines.append(f"  where   {place}")
    return "\n".join(lines)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_line(said: str) -> str:
    """The innermost line of the user's own code in the stack that faulthandler printed."""
    stack = said[said.rfind("most recent call first") :] if "most recent call first" in said else ""
    for file, line, function in re.findall(r'File "(.+?)", line (\d+) in (.+)', stack):
        installed = f"{os.sep}site-packages{os.sep}" in file or file.startswith((sys.prefix, sys.base_prefix, "<"))
        if not installed and not file.startswith(str(CHECKS) + os.sep):
            return f"{os.path.relpath(file)}:{line} in {function}"
    return ""
