"""Squared distances that can be trusted: the arithmetic by which every exact answer is decided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from jaxtyping import Float, Float64, Int64
from numpy import ndarray

_CLOSE: Final = 1 << 17  # elements looked at in one go, which the level-2 cache should hold


def nearest(
    fetch: Callable[[Int64[ndarray, " j"]], Float[ndarray, "j d"]],
    candidates: Int64[ndarray, " m"],
    query: Float[ndarray, " d"],
    k: int,
) -> tuple[Int64[ndarray, " j"], Float64[ndarray, " j"]]:
    """The k nearest of some rows, ties by id, and ‖q − x_i‖² from float64 differences; fewer where m < k.

    numpy sums each row by itself, so equal rows come out equal.

    Args:
        fetch: rows by id.
        candidates: ids, each once.
        query: q.
        k: how many.
    """
    true = np.empty(len(candidates))
    some = max(1, min(len(candidates), _CLOSE // len(query)))
    room = np.empty((some, len(query)))
    q = query.astype(np.float64)
    for start in range(0, len(candidates), some):
        rows = fetch(candidates[start : start + some])
        difference = np.subtract(rows, q, out=room[: len(rows)])
        true[start : start + some] = np.square(difference, out=difference).sum(axis=1)
    best = np.lexsort((candidates, true))[:k]
    return candidates[best], true[best]
