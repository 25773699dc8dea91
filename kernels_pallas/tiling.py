"""Arithmetic of tiles."""

from __future__ import annotations


def divisor(size: int, limit: int, unit: int) -> int:
    """The largest multiple of `unit` up to `limit` that divides `size`, itself such a multiple."""
    return unit * max(d for d in range(1, max(1, limit // unit) + 1) if size // unit % d == 0)
