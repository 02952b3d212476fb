"""Exact distances for the candidates of an approximate index: written once, for every backend."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
from jaxtyping import Float32, Float64, Int64
from numpy import ndarray

from redi.backends.distances import nearest
from redi.backends.index import Index
from redi.backends.keys import Joined, Keys, Stored


@final
@dataclass(frozen=True, eq=False)
class Reranked(Index):
    """An index that proposes, and the keys that decide: distances are true, and ties go by id.

    Args:
        inner: finds candidates.
        keys: the keys it was built from.
        candidates: how many of them are looked at for each query; at least k are.
    """

    inner: Index
    keys: Stored
    candidates: int

    @property
    def shape(self) -> tuple[int, int]:
        """Number of keys and their dimension."""
        return self.inner.shape

    @property
    def kind(self) -> str:
        """That of the index inside: the re-rank belongs to the recipe."""
        return self.inner.kind

    @property
    def stored_keys(self) -> Stored:
        """The keys that decide."""
        return self.keys

    def _search(
        self, queries: Float32[ndarray, "b d"], k: int
    ) -> tuple[Int64[ndarray, "b k"], Float64[ndarray, "b k"]]:
        n = self.shape[0]
        found, _ = self.inner._search(queries, min(n, max(k, self.candidates)))
        ids, distances = np.full((len(queries), k), -1), np.full((len(queries), k), np.inf)
        for row, query in enumerate(queries):
            candidates = np.unique(found[row])
            candidates = candidates[(candidates >= 0) & (candidates < n)]
            best, true = nearest(self.keys.__getitem__, candidates, query, k)
            ids[row, : len(best)], distances[row, : len(best)] = best, true
        return ids, distances

    def _save(self, folder: Path) -> None:
        self.inner._save(folder)

    def _add(self, keys: Keys) -> Reranked:
        return Reranked(self.inner._add(keys), Joined(self.keys, keys.array(np.float32, np.float16)), self.candidates)
