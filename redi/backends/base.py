"""The two interfaces of retrieval, and the checks that every search, build and load passes through once.

How keys are searched is the business of the other files in this folder; how an index lies on disk is in `folder.py`.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, SupportsIndex, final

import numpy as np
from jaxtyping import Float, Float32, Int64
from numpy import ndarray

from redi.backends.folder import reading, writing
from redi.errors import InvalidInputError, KnowledgeBaseError, ReDiError
from redi.types import Neighbors

_STRETCH = 1 << 22  # elements looked at in one go, so that a memory map never comes in whole


class Index(ABC):
    """Keys made searchable; read-only once built.

    A subclass owes `shape`, `_search` and `_save`, and may rely on everything it is given.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Number of keys n and their dimension d."""

    @abstractmethod
    def _search(self, queries: Float32[ndarray, "b d"], k: int) -> tuple[Int64[ndarray, "b k"], Float[ndarray, "b k"]]:
        """Ids and squared L2 distances of k neighbours of each query, in any order; 1 ≤ b, 1 ≤ k ≤ n."""

    @abstractmethod
    def _save(self, folder: Path) -> None:
        """Write everything into this empty folder, without pickling anything."""

    @final
    def search(self, queries: ndarray, k: SupportsIndex) -> Neighbors:
        """Find the k nearest keys of each query, nearest first, ties by id.

        Args:
            queries: (b, d) floating-point, finite.
            k: how many, at most n.

        Raises:
            InvalidInputError: queries that no index can take, or more neighbours than there are keys.
            ReDiError: the backend did not find k different keys.
        """
        n, d = self.shape
        k = operator.index(k)
        if not 1 <= k <= n:
            raise InvalidInputError(f"asked for {k} neighbours, the index has {n} rows; ask for 1 … {n}")
        queries = checked(queries, "queries", (np.float32,))
        if queries.shape[1] != d:
            raise InvalidInputError(f"queries have dimension {queries.shape[1]}, the keys have {d}")
        if not len(queries):
            return Neighbors(np.empty((0, k), np.int64), np.empty((0, k), np.float32))
        ids, distances = self._search(queries, k)
        order = np.lexsort((ids, distances), axis=-1)
        ids, distances = np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)
        by_id = np.sort(ids, axis=1)
        if by_id[:, 0].min() < 0 or by_id[:, -1].max() >= n or (by_id[:, 1:] == by_id[:, :-1]).any():
            raise ReDiError(
                f"{type(self).__name__} did not find {k} different rows for every query; "
                f"let it search harder, or ask for fewer than {k} neighbours"
            )
        return Neighbors(ids, distances.astype(np.float32))

    @final
    def save(self, path: Path) -> None:
        """Write the index as a folder, all of it or nothing; an index that is already there is replaced.

        Raises:
            InvalidInputError: something other than an index is there.
        """
        with writing(path, type(self).__name__, self.shape) as folder:
            self._save(folder)


class Retriever(ABC):
    """A recipe for an index: hyper-parameters only, so a frozen dataclass.

    A subclass owes `_build` and `_load`, and names the index it makes.

    Attributes:
        index_type: what `_build` and `_load` return.
        accepts: dtypes that `_build` takes as they are; anything else is converted to float32 first.
    """

    index_type: ClassVar[type[Index]]
    accepts: ClassVar[tuple[type[np.floating], ...]] = (np.float32,)

    @abstractmethod
    def _build(self, keys: Float[ndarray, "n d"]) -> Index:
        """An index over finite, C-contiguous keys of a dtype in `accepts`; 1 ≤ n, 1 ≤ d."""

    @abstractmethod
    def _load(self, folder: Path) -> Index:
        """The index that `Index._save` wrote here; every file has been found to be as it was written."""

    @final
    def build(self, keys: ndarray) -> Index:
        """Make keys searchable.

        Args:
            keys: (n, d) float16, float32 or float64, finite; float64 is rounded to float32. A memory map stays one
                where the recipe accepts its dtype. Not to be changed as long as the index lives.

        Raises:
            InvalidInputError: keys that no index can take.
        """
        keys = checked(keys, "keys", self.accepts)
        if not len(keys):
            raise InvalidInputError("no keys to build an index from; add rows to the knowledge base first")
        return self._build(keys)

    @final
    def load(self, path: Path) -> Index:
        """Open an index that was saved, after making sure that every byte of it is as it was written.

        Raises:
            KnowledgeBaseError: nothing is there, it is damaged, or another retriever saved it.
        """
        folder, shape = reading(path, self.index_type.__name__)
        try:
            index = self._load(folder)
        except (OSError, ValueError, KeyError, EOFError) as e:
            raise KnowledgeBaseError(f"index {path} cannot be read ({e}); delete it and build it again") from e
        if index.shape != shape:
            raise KnowledgeBaseError(
                f"index {path} holds keys of shape {index.shape}, its manifest says {shape}; delete it and build again"
            )
        return index


def checked(array: ndarray, what: str, accepts: tuple[type[np.floating], ...]) -> Float[ndarray, "n d"]:
    """The array as C-contiguous `accepts[0]`, or as it is if its dtype is accepted; never a copy without need.

    Raises:
        InvalidInputError: not a two-dimensional floating-point array, not finite, or so large that squared distances
            leave float32.
    """
    if not isinstance(array, ndarray):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidInputError(f"{what} must be a numpy array, given {type(array).__name__}; convert with .numpy()")
    if array.ndim != 2 or array.shape[1] < 1:
        raise InvalidInputError(f"{what} must have shape (rows, dimension ≥ 1), given {array.shape}; flatten samples")
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise InvalidInputError(f"{what} must be float16, float32 or float64, given {array.dtype}")
    keep = array.dtype.isnative and array.dtype.type in accepts
    if keep and array.flags.c_contiguous and array.flags.aligned:
        result = np.asarray(array)
    else:
        result = np.empty(array.shape, array.dtype.type if keep else accepts[0])
    # ‖x − q‖² ≤ d (2 limit)² must be a float32, with room for the products it may be computed from.
    limit = float(np.sqrt(np.finfo(np.float32).max / array.shape[1])) / 8
    rows = max(1, _STRETCH // array.shape[1])
    for start in range(0, len(array), rows):
        stretch = array[start : start + rows]
        largest = float(max(stretch.max(), -stretch.min()))
        if not largest <= limit:
            at = start + int(np.argmin((np.abs(stretch.astype(np.float64)) <= limit).all(axis=1)))
            raise InvalidInputError(
                f"{what} must be finite and within ±{limit:.1e} (squared distances are float32); row {at} is not"
            )
        if not np.shares_memory(result, array):
            result[start : start + rows] = stretch
    return result
