"""ScaNN: keys in the leaves of a tree, scored by small codes and reordered by themselves. Linux on x86-64 only.

It is given neither ids of ours nor a way to unpickle any, and its padding never leaves this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, final

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from numpy import ndarray

from redi.backends.base import Retriever, at_least, optional
from redi.backends.frame import Frame
from redi.backends.index import Index
from redi.backends.keys import Keys, Stored

_ROWS_PER_LEAF: Final = 39  # as for the lists of an inverted file
_SAMPLE: Final = 4096  # rows whose mean and spread are taken for those of all
_ASSETS: Final = "scann_assets.pbtxt"


@final
@dataclass(frozen=True, eq=False)
class ScannIndex(Index):
    """A searcher of ScaNN and the frame it sees keys in.

    Args:
        searcher: of ScaNN, without docids: what it returns are positions.
        frame: its view.
        leaves: how many there are.
        leaves_to_search: how many of them are looked into.
        reorder: candidates that are scored by their keys.
    """

    searcher: Any
    frame: Frame
    leaves: int
    leaves_to_search: int
    reorder: int

    @property
    def shape(self) -> tuple[int, int]:
        """Number of keys and their dimension."""
        return self.searcher.size(), len(self.frame.centre)

    def _search(self, queries: Float32[ndarray, "b d"], k: int) -> tuple[Int64[ndarray, "b k"], Float[ndarray, "b k"]]:
        seen = self.frame.into(queries)
        ids, distances = np.full((len(seen), k), -1), np.full((len(seen), k), np.inf)
        leaves = min(self.leaves_to_search, self.leaves)
        short = np.ones(len(seen), bool)
        while True:
            found, scores = self.searcher.search_batched(seen[short], k, max(k, self.reorder), leaves)
            missing = np.isnan(scores)  # the id beside a NaN is 0
            ids[short], distances[short] = (
                np.where(missing, -1, found.astype(np.int64)),
                np.where(missing, np.inf, scores),
            )
            short = (ids < 0).any(axis=1)
            if leaves >= self.leaves or not short.any():
                return ids, self.frame.back(distances)
            leaves = min(2 * leaves, self.leaves)

    def _save(self, folder: Path) -> None:
        self.searcher.serialize(str(folder), relative_path=True)
        self.frame.save(folder)
        np.save(folder / "leaves.npy", self.leaves, allow_pickle=False)


@final
@dataclass(frozen=True, slots=True)
class Scann(Retriever):
    """ScaNN (Guo et al., arXiv 1908.10396) by squared L2, in memory; each search on the thread that asks.

    Distances are ScaNN's own: of the keys where it reorders or compares by brute force, else of their codes. Building
    gathers all keys in memory, and more keys cannot be added.

    Args:
        leaves: of the tree, fewer where there would be fewer than 39 keys for each; 1 is no tree.
        leaves_to_search: leaves that are looked into.
        dimensions_per_code: dimensions that share four bits; 0 scores by brute force.
        reorder: candidates that ScaNN scores again by float32 keys, of which it then keeps a copy; 0 is none.
        rerank: candidates whose distances are computed exactly from the stored keys; 0 takes ScaNN at its word.
    """

    leaves: int = 256
    leaves_to_search: int = 32
    dimensions_per_code: int = 2
    reorder: int = 0
    rerank: int = 0
    index_type: ClassVar[type[Index]] = ScannIndex

    def __post_init__(self) -> None:
        _scann()
        at_least(1, leaves=self.leaves, leaves_to_search=self.leaves_to_search)
        at_least(0, dimensions_per_code=self.dimensions_per_code, reorder=self.reorder, rerank=self.rerank)

    def _build(self, keys: Keys) -> ScannIndex:
        n, d = keys.shape
        whole = keys.array()
        frame = Frame.of(whole[:: max(1, n // _SAMPLE)])
        leaves = max(1, min(self.leaves, n // _ROWS_PER_LEAF))
        builder = _scann().builder(frame.into(whole), 1, "squared_l2").set_n_training_threads(torch.get_num_threads())
        if leaves > 1:
            builder = builder.tree(leaves, min(self.leaves_to_search, leaves), min_partition_size=1)
        if self.dimensions_per_code:
            builder = builder.score_ah(min(self.dimensions_per_code, d))
        else:
            builder = builder.score_brute_force()
        if self.reorder:
            builder = builder.reorder(self.reorder)
        return self._ready(builder.build(), frame, leaves)

    def _load(self, folder: Path, keys: Stored | None) -> ScannIndex:
        scann = _scann()
        # load_searcher would unpickle whatever scann_docids.pkl lies there
        searcher = scann.ScannSearcher(
            scann.scann_pybind.ScannNumpy(str(folder), (folder / _ASSETS).read_text(encoding="utf-8"))
        )
        leaves = int(np.load(folder / "leaves.npy", allow_pickle=False))
        return self._ready(searcher, Frame.load(folder), leaves)

    def _ready(self, searcher: Any, frame: Frame, leaves: int) -> ScannIndex:
        return ScannIndex(searcher, frame, leaves, self.leaves_to_search, self.reorder)


def _scann() -> Any:
    return optional("scann.scann_ops.py.scann_ops_pybind", "scann")
