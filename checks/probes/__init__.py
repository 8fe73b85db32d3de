"""How a check looks at a model: perturb a token, ablate a part, change the precision, and measure what follows."""
