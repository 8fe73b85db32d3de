"""Seeding: the numbers that a program gets which seeds as usual, and everybody's state as it was afterwards."""

import random

import numpy as np
import torch

from transformer_checks.checks.watch.draws import seeded, states


def drawn():
    return torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist(), np.random.randn(2).tolist()


def test_seeded_draws_what_a_seeded_program_draws():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        want = drawn()
    with seeded(5):
        assert drawn() == want


def test_seeded_leaves_every_state_as_it_was_even_nested_and_after_an_error():
    before = states()
    try:
        with seeded(1):
            outside = states()
            with seeded(2):
                drawn()
            assert states() == outside
            drawn()
            raise ValueError
    except ValueError:
        pass
    assert states() == before


def test_seeding_notes_nothing_for_accelerators_that_are_not_there():
    noted = torch.cuda._queued_calls
    before = len(noted)
    with seeded(3):
        drawn()
    assert len(noted) == before
