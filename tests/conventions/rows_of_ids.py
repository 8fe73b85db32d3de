"""A function of a list of ids, in NumPy, without a batch."""

import numpy as np

rng = np.random.default_rng(0)
table, mix, head = rng.normal(size=(29, 16)), rng.normal(size=(16, 16)), rng.normal(size=(16, 29))


def model(ids):
    x = table[list(ids)]
    scores = x @ mix @ x.T / 4
    scores[np.triu_indices(len(x), 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (x + weights / weights.sum(axis=-1, keepdims=True) @ x) @ head


def build_model():
    return model
