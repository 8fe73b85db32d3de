"""The options of a run: what they are called, and the subjects and settings that they ask for."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..meet.errors import UsageError
from . import REFERENCE

if TYPE_CHECKING:
    from ..subject import Subject
    from .expected_failures import Expected


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise ValueError(f"expected more than 0 seconds, got {text}")
    return seconds


OPTIONS: dict[str, dict[str, Any]] = {
    "--model": dict(
        action="append",
        metavar="WHAT",
        help="the model to check: FILE.py[:NAME], NOTEBOOK.ipynb[:NAME], package.module:NAME or bug:ID; repeatable",
    ),
    "--with": dict(
        action="append",
        dest="checks_with",
        metavar="PART=FILE:NAME",
        help="a part defined elsewhere: loss, generate, train_step, trainer or tokenizer; repeatable",
    ),
    "--checkpoint": dict(metavar="FILE", help="weights to load into the model"),
    "--spec": dict(
        metavar="FAMILY",
        help="what the model should be: gpt2, llama, or auto (only report the nearest); gpt2:FILE.json adds a table of "
        "which weight is which, in the form that -v prints",
    ),
    "--not-causal": dict(action="store_true", help="the model is an encoder or a prefix model by design"),
    "--device": dict(metavar="DEVICE", help="where the checks run: cpu (the default), cuda, mps, xpu"),
    "--gpu": dict(action="store_true", help="run the checks on CUDA, then benchmark training steps and decoding"),
    "--slow": dict(action="store_true", help="also run the checks that take minutes: compilers, new processes"),
    "--budget": dict(
        type=_seconds,
        metavar="SECONDS",
        help="stop when the checks have taken this much processor time; those that catch most come first",
    ),
    "--seed": dict(type=int, metavar="N", help="random seed of the run (default: a new one, printed)"),
    "--out": dict(metavar="FOLDER", help="where the sanity checks write their artifacts (default: out)"),
    "--verdicts": dict(metavar="FILE", help="write one JSON line per verdict, as it happens"),
    "--expected-failures": dict(
        metavar="FILE",
        help="checks known to fail, one `check: reason` per line; a listed check that passes is an error",
    ),
}


class Options:
    """The options as given. `value(name)` gives one by its name without dashes, None where it is not given."""

    def __init__(self, value: Callable[[str], Any], *, seed: int | None = None) -> None:
        self._value, self._seed = value, seed

    def get(self, name: str, default: Any = None) -> Any:
        value = self._value(name)
        return default if value is None else value

    @property
    def asked(self) -> bool:
        """Whether the command line is about a model: one of our options is given."""
        return any(self._value(name.removeprefix("--")) for name in OPTIONS)

    @cached_property
    def seed(self) -> int:
        return int(self.get("seed", secrets.randbelow(2**31))) if self._seed is None else self._seed

    def subjects(self) -> list[Subject]:
        """Raises UsageError for a model that cannot be loaded, and for settings that cannot be."""
        from .subjects import subject_of

        declared: dict[str, Any] = dict(
            seed=self.seed,
            device=self.device(),
            causal=not self.get("not-causal", False),
            checkpoint=self.get("checkpoint"),
            parts=self.parts(),
            spec=self.get("spec", "auto"),
        )
        return [subject_of(model, **declared) for model in self.get("model", [REFERENCE])]

    def expected_failures(self) -> Expected:
        from .expected_failures import Expected, read
        from .order import all_listed

        path = self.get("expected-failures")
        return read(path, all_listed()) if path else Expected()

    def parts(self) -> dict[str, str]:
        given: list[str] = self.get("with", [])
        bad = [text for text in given if "=" not in text]
        if bad:
            raise UsageError(f"--with {bad[0]}: expected PART=FILE:NAME, as in --with loss=train.py:masked_loss")
        return {name: where for name, _, where in (text.partition("=") for text in given)}

    def device(self) -> str:
        import torch

        device: str = "cuda" if self.get("gpu") else self.get("device", "cpu")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UsageError(f"no CUDA device here: the installed torch is {torch.__version__}")
        try:
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError, ImportError) as error:
            says = str(error).splitlines()[0].split(". ")[0]
            raise UsageError(f"--device {device}: torch {torch.__version__} says: {says}") from None
        return device
