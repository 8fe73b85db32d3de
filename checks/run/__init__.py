"""One run of the checks behind three doors: pytest, a notebook, a supervised command."""

BROKEN = ("failed", "error")  # outcomes that are against the model
REFERENCE = "transformer"  # what a user calls the reference of this project
