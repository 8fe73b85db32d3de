"""A foreign model's weights, and which of the reference's each of them is."""
