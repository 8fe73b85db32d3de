"""How a wheel is made: `checks` and `transformer`, which lie at the top of a checkout, go inside `transformer_checks`.

An editable install takes nothing in: there `src/transformer_checks/__init__.py` finds both, and nothing beside them is
importable.
"""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDERS = ("checks", "transformer")


class OneName(BuildHookInterface):
    """Called by the build backend before each build of a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"].update({folder: f"transformer_checks/{folder}" for folder in FOLDERS})
