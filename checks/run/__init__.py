"""One run behind three doors: pytest, a notebook, a supervised command."""
