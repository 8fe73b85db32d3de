"""How our modules are imported under pytest: as they are written, with no assert rewritten."""

from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

PACKAGE = f"{__package__}."


class AsWritten:
    """On `sys.meta_path`, finds our modules before pytest does, which rewrites the asserts of a plugin's whole package.

    None of ours is meant for pytest. Rewriting all takes 0.5 s of every process that may not keep the result, as in
    most containers (PYTHONDONTWRITEBYTECODE).
    """

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, path, target) if name.startswith(PACKAGE) else None
