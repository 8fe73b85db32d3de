"""Garbage collection: old objects are passed over while a check runs, and everything is afterwards as it was."""

import gc

import pytest

from transformer_checks.checks.garbage import nothing_collected, old_objects_kept
from transformer_checks.checks.reference import reference
from transformer_checks.checks.run.verdict import judge


class Cycle:
    def __init__(self):
        self.me = self


def cycles():
    return sum(type(thing) is Cycle for thing in gc.get_objects())


@pytest.fixture(autouse=True)
def settings_stay():
    before = gc.get_threshold(), gc.isenabled()
    yield
    assert (gc.get_threshold(), gc.isenabled()) == before
    assert gc.get_freeze_count() == 0


def test_garbage_made_inside_is_collected_and_what_was_old_comes_back_afterwards():
    gc.disable()  # so that only what is asked for below is collected
    Cycle()
    with old_objects_kept():
        Cycle()
        gc.collect()
        assert gc.get_freeze_count() > 1000
        assert cycles() == 0, "the new one is gone, the old one out of sight"
    assert cycles() == 1
    gc.collect()
    assert cycles() == 0
    gc.enable()


def test_a_check_runs_so():
    seen = []
    assert judge(lambda subject: seen.append(gc.get_freeze_count()), reference(), {}).outcome == "passed"
    assert seen[0] > 1000


@pytest.mark.parametrize("inside", [old_objects_kept, nothing_collected])
def test_what_the_caller_froze_stays_frozen(inside):
    gc.freeze()
    try:
        with inside():
            pass
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()


def test_whoever_collects_nothing_is_left_to_it():
    before = gc.get_threshold()
    gc.set_threshold(0)
    try:
        with old_objects_kept():
            assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)


def test_nothing_is_collected_during_imports_and_their_objects_count_as_old():
    gc.collect()
    with nothing_collected():
        assert not gc.isenabled()
        made = [Cycle() for _ in range(5)]
    assert gc.isenabled()
    assert {id(thing) for thing in gc.get_objects(generation=2)} >= {id(thing) for thing in made}
