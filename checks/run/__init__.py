"""One run of the checks behind three doors: pytest, a notebook, a supervised command."""

REFERENCE = "transformer"  # what a user calls the reference of this project
