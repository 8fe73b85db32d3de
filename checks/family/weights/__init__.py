"""A model's weights, and which weight of the reference each of them is."""
