"""Asks a file of its own for a name that it lacks."""

from no_model import missing_name  # here
