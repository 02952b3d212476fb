"""A navigable small-world graph over the keys, by hnswlib: fast where a walk of few steps finds the neighbourhood.

The graph holds float32 keys and subtracts them, so tight clusters far from the origin are no trouble to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from numpy import ndarray

from redi.backends.base import Retriever, at_least, optional
from redi.backends.distances import nearest
from redi.backends.index import Index
from redi.backends.keys import Keys, Stored


@final
@dataclass(frozen=True, eq=False)
class HnswIndex(Index):
    """A graph of hnswlib, complete.

    Args:
        graph: of hnswlib; labels are ids.
        threads: that add to it.
    """

    graph: Any
    threads: int

    @property
    def shape(self) -> tuple[int, int]:
        """Number of keys and their dimension."""
        return self.graph.get_current_count(), self.graph.dim

    def _search(self, queries: Float32[ndarray, "b d"], k: int) -> tuple[Int64[ndarray, "b k"], Float[ndarray, "b k"]]:
        try:
            ids, distances = self.graph.knn_query(queries, k, num_threads=torch.get_num_threads())
        except RuntimeError:  # the walk of some query reached fewer than k keys
            if len(queries) > 1:
                each = [self._search(query, k) for query in np.split(queries, len(queries))]
                return np.concatenate([ids for ids, _ in each]), np.concatenate([found for _, found in each])
            ids, distances = nearest(self._rows, np.arange(self.shape[0]), queries[0], k)
            return ids[None], distances[None]
        return ids.astype(np.int64), distances

    def _rows(self, ids: Int64[ndarray, " m"]) -> Float32[ndarray, "m d"]:
        return self.graph.get_items(ids, return_type="numpy")

    def _add(self, keys: Keys) -> HnswIndex:
        n = self.shape[0]
        graph = _hnswlib().Index(self.graph)  # a copy
        graph.resize_index(n + keys.shape[0])
        _fill(graph, keys, self.threads)
        return HnswIndex(graph, self.threads)

    def _save(self, folder: Path) -> None:
        file = folder / "graph.bin"
        self.graph.save_index(str(file))
        if (written := file.stat().st_size) != (size := self.graph.index_file_size()):  # hnswlib itself does not look
            raise OSError(f"{written} of {size} bytes of {file.name} were written")
        np.save(folder / "dimension.npy", self.graph.dim, allow_pickle=False)


@final
@dataclass(frozen=True, slots=True)
class Hnsw(Retriever):
    """A graph of hnswlib (Malkov and Yashunin, arXiv 1603.09320) by squared L2, in memory.

    Distances are float32 sums of squared differences, unless re-ranked. As many threads search as torch is allowed.

    Args:
        M: links of a key in the upper layers; twice as many in the lowest.
        ef_construction: candidates kept while a key is linked.
        ef_search: candidates kept while a query is answered; never fewer than neighbours asked for.
        rerank: candidates whose distances are computed exactly from the stored keys; 0 takes the graph at its word.
        seed: of the layers.
        threads: that build; with 1 the same keys make the same graph.
    """

    M: int = 16
    ef_construction: int = 200
    ef_search: int = 64
    rerank: int = 0
    seed: int = 0
    threads: int = 1
    index_type: ClassVar[type[Index]] = HnswIndex

    def __post_init__(self) -> None:
        _hnswlib()
        at_least(2, M=self.M)
        at_least(1, ef_construction=self.ef_construction, ef_search=self.ef_search, threads=self.threads)
        at_least(0, rerank=self.rerank, seed=self.seed)

    def _build(self, keys: Keys) -> HnswIndex:
        n, d = keys.shape
        graph = _hnswlib().Index("l2", d)
        graph.init_index(n, M=self.M, ef_construction=self.ef_construction, random_seed=self.seed)
        _fill(graph, keys, self.threads)
        return self._ready(graph)

    def _load(self, folder: Path, keys: Stored | None) -> HnswIndex:
        graph = _hnswlib().Index("l2", int(np.load(folder / "dimension.npy", allow_pickle=False)))
        graph.load_index(str(folder / "graph.bin"))
        return self._ready(graph)

    def _ready(self, graph: Any) -> HnswIndex:
        graph.set_ef(self.ef_search)
        return HnswIndex(graph, self.threads)


def _hnswlib() -> Any:
    return optional("hnswlib", "hnsw")


def _fill(graph: Any, keys: Keys, threads: int) -> None:
    for chunk in keys.chunks():
        start = graph.get_current_count()
        graph.add_items(chunk, np.arange(start, start + len(chunk)), num_threads=threads)
