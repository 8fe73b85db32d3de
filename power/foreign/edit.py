"""One known bug in the words of a foreign form: old text → new text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Edit:
    """One bug in one wording: `changes` are old text → new text, made in their order."""

    bug: str  # the id of a known bug
    changes: dict[str, str]
    only_in: tuple[str, ...] = ()  # forms, where others have the text and it would be another mistake in them, or none

    def fits(self, form: str, source: str) -> bool:
        return (not self.only_in or form in self.only_in) and all(source.count(old) == 1 for old in self.changes)

    def made_in(self, source: str) -> str:
        for old, new in self.changes.items():
            source = source.replace(old, new, 1)
        return source
