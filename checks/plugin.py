"""pytest options, the subject fixture, one verdict line a check, the summary."""
