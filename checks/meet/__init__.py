"""From a user's file, module or object to a Subject: finds the model, builds it, and finds out how it is called.

Each module is one stage; `foreign.py` puts them together. Nothing here judges a model. `UsageError` is a mistake of
the user, or a choice that only they can make.
"""

from .errors import UsageError

__all__ = ["UsageError"]
