"""A package whose code reads its own modules by name."""
