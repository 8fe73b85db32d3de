"""What a training step is held to: the forms it comes in, an independent loop, and what a wrong one did."""
