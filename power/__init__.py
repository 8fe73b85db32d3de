"""What is caught, with intervals: every known bug and control, one-place mistakes in a public file."""
