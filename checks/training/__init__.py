"""The right answer of a training step: how to call one, an independent computation, and what a wrong step did."""
