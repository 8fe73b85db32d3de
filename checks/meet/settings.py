"""Values of settings found in a project's files: keywords, defaults, command-line options, YAML and JSON, read as text.

Used only if a constructor or a configuration needs a value that is not a size.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..expect import shown
from . import vocabulary

ENDINGS = (".py", ".yaml", ".yml", ".json", ".toml", ".ipynb")
MOST_FILES, MOST_BYTES = 300, 200_000
SKIPPED = ("node_modules", "site-packages", "__pycache__", "venv")
# Files that mark the root of a project.
MARKS = (".git", "pyproject.toml", "setup.py", "setup.cfg", "requirements.txt", "environment.yml")
WORDS = {"true": True, "false": False, "null": None}  # of YAML and JSON
ANNOTATION = r"(?::\s*[A-Za-z_][\w.\[\], |]*?)?"
VALUE = r"""("[^"\n]*"|'[^'\n]*'|[-+.\w]+)"""


class Project:
    """The files around the user's, nearest first."""

    def __init__(self, file: Path | None, near: Sequence[Path], far: Sequence[Path]) -> None:
        self.file, self.near, self.far = file, near, far
        self._texts: list[tuple[str, str]] | None = None

    def given(self, name: str) -> tuple[Any, str] | None:
        """The first value written for a setting, and its file; None if there is none."""
        named = rf"""(?<![\w.])\\?["']?{re.escape(name)}\\?["']?\s*"""
        assigned = re.compile(named + ANNOTATION + rf"[ \t]*[:=](?!=)[ \t]*{VALUE}")
        option = re.compile(rf"""add_argument\(\s*["']--?{re.escape(name).replace("_", "[-_]")}["']([^)]*)\)""")
        for file, text in self.texts():
            for match in option.finditer(text):
                if (value := _of_option(match[1])) is not vocabulary.MISSING:
                    return value, file
            for match in assigned.finditer(text):
                if (value := _literal(match[1])) is not vocabulary.MISSING:
                    return value, file
        return None

    def texts(self) -> list[tuple[str, str]]:
        """The files, as shown, and what is written in them."""
        if self._texts is None:
            self._texts = []
            for path in self._files():
                try:
                    if path.stat().st_size <= MOST_BYTES:
                        self._texts.append((shown(str(path)), path.read_text(encoding="utf-8", errors="replace")))
                except OSError:
                    continue
        return self._texts

    def _files(self) -> list[Path]:
        """The user's own file, those beside it, then those of the project, tests last."""
        file = self.file
        if file is None:
            return []
        marked = [f for f in self.far if any((f / mark).exists() for mark in MARKS)]
        found = [file]
        for root in (file.parent, *self.near, *(self.far if marked else ())):
            found += [path for path in _under(root, MOST_FILES - len(found)) if path not in found]
        return sorted(found, key=lambda path: (path != file, path.parent != file.parent, "test" in path.name))


def _under(root: Path, most: int) -> Iterator[Path]:
    for folder, inner, files in os.walk(root):
        inner[:] = sorted(d for d in inner if not d.startswith(".") and d not in SKIPPED)
        for name in sorted(files):
            if name.endswith(ENDINGS):
                if (most := most - 1) < 0:
                    return
                yield Path(folder, name)


def _of_option(rest: str) -> Any:
    if "store_true" in rest:
        return False
    if "store_false" in rest:
        return True
    default = re.search(rf"default\s*=\s*{VALUE}", rest)
    return _literal(default[1]) if default else None if "default" not in rest else vocabulary.MISSING


def _literal(text: str) -> Any:
    """A number, string, switch or None; MISSING for a name or an expression."""
    if text in WORDS:
        return WORDS[text]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return vocabulary.MISSING
    return value if isinstance(value, bool | int | float | str | None) else vocabulary.MISSING


def folders_above(folder: Path, near: list[Path]) -> list[Path]:
    """The folders above, up to the root of the project; two of them if nothing marks a root."""
    above = []
    for parent in folder.resolve().parents:
        if parent == parent.parent or parent == Path.home():
            break
        above.append(parent)
        if any((parent / mark).exists() for mark in MARKS):
            return [p for p in above[:6] if p not in near]
    return [p for p in above[:2] if p not in near]
