"""Lengths and positions at which tables, masks and caches are commonly cut."""

from __future__ import annotations

LONG = 131  # tokens: past the powers of two at which tables, masks and caches are cut
LONGER = 521  # past more of them; only around these is looked


def telling_places(T: int) -> list[int]:
    """Around each power of two, and the last two."""
    around = {2**k + d for k in range(1, T.bit_length()) for d in (-1, 0, 1)} | {T - 2, T - 1}
    return sorted(place for place in around if 0 < place < T)
