"""Files as a user would type them."""

from __future__ import annotations

import os


def shown(filename: str) -> str:
    """A file relative to the working directory where that is shorter."""
    try:
        relative = os.path.relpath(filename)
    except ValueError:  # another drive
        return filename
    return relative if len(relative) < len(filename) else filename
