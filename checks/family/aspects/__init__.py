"""What a declared architecture fixes beyond its logits."""
