"""The context length, which two files import by name."""

CONTEXT_LENGTH = 8
