"""How foreign code is met: files and names, constructors, calls, return forms, masks, caches, losses, generators.

Nothing here judges. `UsageError` is a mistake of the user or something that cannot be decided for them.
"""

from .errors import UsageError

__all__ = ["UsageError"]
