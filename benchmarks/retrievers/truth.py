"""What is true, in float64: the nearest keys of every query, and how far an answer is from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
from numpy import ndarray

_SPARE: Final = 64  # candidates beyond k that are looked at again, directly
_STRETCH: Final = 1 << 24  # elements in float64 at once
EPSILONS: Final = (1e-4, 1e-2)


@final
@dataclass(frozen=True, eq=False)
class Truth:
    """The k nearest keys of each query, nearest first, ties by id: ids (b, k), and L2 distances (b, k)."""

    ids: ndarray
    distances: ndarray


def nearest(
    chunks: Iterable[ndarray], fetch: Callable[[ndarray], ndarray], queries: ndarray, k: int, step: Callable[[int], Any]
) -> Truth:
    """One pass over the keys in float64 sums, then direct differences for the k + 64 best.

    Args:
        chunks: all keys in order.
        fetch: keys by id.
        queries: (b, d).
        k: how many.
        step: told how many rows were passed.
    """
    centre = queries.astype(np.float64).mean(0)
    u = queries.astype(np.float64) - centre
    best_ids, best = np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0))
    start = 0
    for chunk in chunks:
        rows = max(1, _STRETCH // chunk.shape[1])
        for top in range(0, len(chunk), rows):
            y = chunk[top : top + rows].astype(np.float64) - centre
            scores = np.square(y).sum(1) - 2 * u @ y.T
            best = np.concatenate([best, scores], 1)
            new = np.arange(start, start + len(y))
            best_ids = np.concatenate([best_ids, np.broadcast_to(new, scores.shape)], 1)
            if best.shape[1] > k + _SPARE:
                keep = np.argpartition(best, k + _SPARE - 1, axis=1)[:, : k + _SPARE]
                best, best_ids = np.take_along_axis(best, keep, 1), np.take_along_axis(best_ids, keep, 1)
            start += len(y)
            step(len(y))
    k = min(k, start)
    distances = measured(fetch, queries, best_ids)
    order = np.stack([np.lexsort((i, d))[:k] for i, d in zip(best_ids, distances, strict=True)])
    return Truth(np.take_along_axis(best_ids, order, 1), np.take_along_axis(distances, order, 1))


def measured(fetch: Callable[[ndarray], ndarray], queries: ndarray, ids: ndarray) -> ndarray:
    """L2 distance of each query to the keys of its ids, by float64 differences."""
    return np.stack(
        [
            np.sqrt(np.square(fetch(row).astype(np.float64) - query.astype(np.float64)).sum(1))
            for row, query in zip(ids, queries, strict=True)
        ]
    )


def score(truth: Truth, ids: ndarray, fetch: Callable[[ndarray], ndarray], queries: ndarray) -> dict[str, float]:
    """How good an answer is; the distances it came with are not looked at.

    Args:
        truth: the nearest keys, at least as many as were asked for.
        ids: (b, k), nearest first.
        fetch: keys by id.
        queries: (b, d).

    Returns:
        For the first 2 and all k: recall by id, recall by distance (found within (1 + ε) of the k-th true distance),
        and the mean of found over true distances.
    """
    found = measured(fetch, queries, ids)
    result: dict[str, float] = {}
    for k in sorted({min(2, ids.shape[1]), ids.shape[1]}):
        hits = [len(set(a) & set(b)) for a, b in zip(ids[:, :k].tolist(), truth.ids[:, :k].tolist(), strict=True)]
        result[f"recall@{k}"] = float(np.mean(hits)) / k
        limit = truth.distances[:, k - 1 : k]
        for epsilon in EPSILONS:
            result[f"recall@{k} within {epsilon:g}"] = float((found[:, :k] <= (1 + epsilon) * limit).mean())
        true = np.maximum(truth.distances[:, :k], 1e-12)
        result[f"distance ratio@{k}"] = float((np.maximum(found[:, :k], 1e-12) / true).mean())
    return result
