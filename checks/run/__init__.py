"""One run of the checks behind three doors: pytest, a notebook, a supervised command."""

BROKEN = ("failed", "error")  # outcomes that are against the model
NOTHING_TO_LEARN = "the model has no trainable parameters"
REFERENCE = "transformer"  # what a user calls the reference of this project
