"""What a declared architecture fixes besides the logits of one forward pass: training, decoding, constants."""
