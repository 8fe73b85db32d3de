"""How a check probes a model: change a token, ablate a part, change the precision, and measure the effect."""
