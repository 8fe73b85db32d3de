"""Its __init__ asks for the distribution, which is not installed."""

import importlib.metadata

__version__ = importlib.metadata.version("a-repository")
