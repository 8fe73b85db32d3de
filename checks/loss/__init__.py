"""What a loss is held to: its formula, the forms it comes in, and what a wrong one did."""
