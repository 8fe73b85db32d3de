"""What is said to a user whose code or command cannot be met as it is."""

from __future__ import annotations


class UsageError(ValueError):
    """The user's mistake, or a choice that is theirs: says where, what was seen and what would settle it."""
