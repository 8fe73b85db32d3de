"""A cache that cannot be used is a fault where it surely is one; else what was tried and what came of it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from transformer_checks.checks.check_cache import check_cached_decoding_equals_full
from transformer_checks.checks.check_causality import check_future_cannot_change_past_into_a_cache
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.run.verdict import judge
from transformer_checks.checks.subject import Subject

CONVENTIONS = Path(__file__).parent / "conventions"
OBJECT, BLOCKS, PLACE = "cache_object.py", "caches_of_each_block.py", "caches_at_a_place.py"
READ = "past = x if cache is None else cache.extend(x)"
SEEN = (
    "def forward(self, idx, cache=None):\n"
    "        seen = 0 if cache is None or cache.past is None else cache.past.shape[1]"
)


def damaged(folder: Path, name: str, old: str, new: str) -> Subject:
    source = (CONVENTIONS / name).read_text()
    assert old in source
    (folder / "model.py").write_text(source.replace(old, new))
    return subject_of(str(folder / "model.py"), seed=0)


@pytest.mark.parametrize("name", [OBJECT, BLOCKS, PLACE])
def test_a_right_cache_is_read(name):
    subject = subject_of(str(CONVENTIONS / name), seed=0)
    for check in (check_cached_decoding_equals_full, check_future_cannot_change_past_into_a_cache):
        assert judge(check, subject, {}).outcome == "passed"


@pytest.mark.parametrize(
    ("name", "old", "new", "facts"),
    [
        (OBJECT, "(self.past, x), dim=1", "(self.past, x), dim=2", ["RuntimeError"]),
        (OBJECT, READ, "cache is None or cache.extend(x)\n        past = x", ["written but not read"]),
        (OBJECT, "cache.extend(x)", "cache.update(x)", ["has no attribute 'update'"]),
        (OBJECT, "if self.past is None", "if self.pasts is None", ["has no attribute 'pasts'"]),
        (OBJECT, "def extend(self, x)", "def extend(self, layer, x)", ["missing 1 required positional argument"]),
        (OBJECT, "torch.cat((self.past, x)", "torch.cat((past, x)", ["NameError"]),
        (BLOCKS, "k, v = cache.update(k, v)", "cache.update(k, v)", ["written but not read"]),
        (BLOCKS, "else torch.cat((self.v, v), dim=1)", "else v", ["RuntimeError"]),
        (BLOCKS, "else caches[0].k.shape[1]", "else 0", ["new tokens may have wrong positions"]),
        (PLACE, "torch.cat((self.cache_k[:B, :start_pos], k), 1)", "k", ["RuntimeError"]),
        (PLACE, "[:B, start_pos : start_pos + T] = ", "[:B, :T] = ", ["given token"]),
    ],
)  # fmt: skip
def test_a_cache_that_surely_is_one_and_cannot_be_read_is_a_fault(tmp_path, name, old, new, facts):
    """It raises in code of its own, or reads a first piece rightly, keeps something, and reads the next one wrongly."""
    subject = damaged(tmp_path, name, old, new)
    verdict = judge(check_cached_decoding_equals_full, subject, {})
    assert verdict.outcome == "failed", verdict.says
    assert not [fact for fact in facts if fact not in verdict.says], verdict.says
    assert judge(check_future_cannot_change_past_into_a_cache, subject, {}).outcome in ("passed", "not_applicable")


@pytest.mark.parametrize(
    ("name", "old", "new", "facts"),
    [
        (OBJECT, READ, "past = x",
         ["forward takes cache= (", "model.py:23)", "cache=KVCache()", "keeps nothing between the calls"]),
        (OBJECT, SEEN, "def forward(self, idx, cache=None, already=0):\n        seen = already",
         ["forward takes cache=", "no check fills already="]),
        (OBJECT, "def __init__(self):\n        self.past", "def __init__(self, *, store):\n        self.past",
         ["forward takes cache=", "cache=KVCache()", "'store'"]),
        (OBJECT, "def forward(self, idx, cache=None):", "def forward(self, idx):\n        cache = None",
         ["the file defines KVCache", "no argument of forward ("]),
        (OBJECT, "class KVCache", "class Memory",
         ["forward takes cache=", "the model returns no cache", "no class called a cache"]),
    ],
    ids=["ignored", "another argument", "a class that needs more", "no argument", "another name"],
)  # fmt: skip
def test_what_came_of_a_cache_that_may_be_used_otherwise_is_told(tmp_path, name, old, new, facts):
    verdict = judge(check_cached_decoding_equals_full, damaged(tmp_path, name, old, new), {})
    assert verdict.outcome == "not_applicable" and verdict.says.startswith("no key-value cache was found")
    assert not [fact for fact in facts if fact not in verdict.says], verdict.says


def test_a_model_without_anything_called_a_cache_has_a_short_reason():
    verdict = judge(check_cached_decoding_equals_full, subject_of(str(CONVENTIONS / "letters.py"), seed=0), {})
    assert verdict.says == "no key-value cache was found in the model"
