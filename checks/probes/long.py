"""Lengths and positions at which tables, masks and caches commonly end."""

from __future__ import annotations

LONG = 131  # tokens: beyond the powers of two at which tables, masks and caches commonly end
LONGER = 521  # beyond more of them; only positions around these are tried


def telling_places(T: int) -> list[int]:
    """The positions around each power of two, and the last two."""
    around = {2**k + d for k in range(1, T.bit_length()) for d in (-1, 0, 1)} | {T - 2, T - 1}
    return sorted(place for place in around if 0 < place < T)
