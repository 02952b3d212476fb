"""What a recipe builds: `Index`, and the checks that every search, addition and save passes through once.

How keys are searched is the business of the backends; how an index lies on disk is in `folder.py`.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from pathlib import Path
from typing import SupportsIndex, final

import numpy as np
from jaxtyping import Float, Float32, Int64
from numpy import ndarray

from redi.backends.folder import STORED, writing
from redi.backends.forks import fork_safe
from redi.backends.keys import Keys, Stored, checked, require_form, write_rows
from redi.errors import InvalidInputError, KnowledgeBaseError, ReDiError
from redi.types import Neighbors


class Index(ABC):
    """Keys made searchable; read-only once built.

    A subclass owes `shape`, `_search` and `_save`, and may rely on everything it is given. Threads may search one
    index at the same time. A forked child may search an index of its parent: torch and faiss then compute on one
    thread (start workers by "spawn" where they need more); what else a subclass calls must bear a fork by itself.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Number of keys n and their dimension d."""

    @abstractmethod
    def _search(self, queries: Float32[ndarray, "b d"], k: int) -> tuple[Int64[ndarray, "b k"], Float[ndarray, "b k"]]:
        """Ids and squared L2 distances of k neighbours of each query, in any order.

        One that was not found has the id −1 or a distance that is no number.

        1 ≤ b, 1 ≤ k ≤ n.
        """

    @abstractmethod
    def _save(self, folder: Path) -> None:
        """Write everything but `stored_keys` into this empty folder, without pickling anything."""

    def _add(self, keys: Keys) -> Index:
        """Another index with these keys after its own; `self` stays as it is."""
        raise InvalidInputError(f"a {self.kind} cannot take more keys; build one over all of them")

    @property
    def kind(self) -> str:
        """What `index.json` calls it."""
        return type(self).__name__

    @property
    def stored_keys(self) -> Stored | None:
        """The keys as they were given, where the index needs them to search and they may be kept apart from it."""
        return None

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
        queries = checked(queries, "queries")
        if queries.shape[1] != d:
            raise InvalidInputError(f"queries have dimension {queries.shape[1]}, the keys have {d}")
        if not len(queries):
            return Neighbors(np.empty((0, k), np.int64), np.empty((0, k), np.float32))
        with fork_safe():
            ids, distances = self._search(queries, k)
        # false where one is NaN
        rising = (distances[:, :1] >= 0).all() and (distances[:, 1:] > distances[:, :-1]).all()
        if not rising:
            ids = np.where(np.isnan(distances), -1, ids)
            order = np.arange(len(ids))[:, None], np.lexsort((ids, distances), axis=-1)
            ids, distances = ids[order], distances[order]
        by_id = np.sort(ids, axis=1)
        if by_id[:, 0].min() < 0 or by_id[:, -1].max() >= n or (by_id[:, 1:] == by_id[:, :-1]).any():
            raise ReDiError(
                f"{self.kind} did not find {k} different rows for every query; "
                f"let it search harder, or ask for fewer than {k} neighbours"
            )
        return Neighbors(ids, distances.astype(np.float32))

    @final
    def add(self, keys: ndarray) -> Index:
        """Another index that holds these keys too, with ids from n on; this one stays as it is.

        Nothing is learnt anew: centroids and codes are those of the first build.

        Args:
            keys: (m, d), as for `Retriever.build`.

        Raises:
            InvalidInputError: keys that no index can take, or an index that takes no more of them.
        """
        require_form(keys, "keys")
        if keys.shape[1] != self.shape[1]:
            raise InvalidInputError(
                f"the keys to add have dimension {keys.shape[1]}, those of the index {self.shape[1]}"
            )
        if not len(keys):
            return self
        with fork_safe():
            return self._add(Keys(lambda: (keys,), keys.shape))

    @final
    def save(self, path: Path, *, bound_to: str = "", with_keys: bool = True) -> None:
        """Write the index as a folder, all of it or nothing; an index that is already there is replaced.

        Args:
            path: where.
            bound_to: names what the keys were computed from, by a hash; `Retriever.load` compares it.
            with_keys: write `stored_keys` too. Without, `Retriever.load` must be given them.

        Raises:
            InvalidInputError: something other than an index is there.
            KnowledgeBaseError: it cannot be written there.
        """
        try:
            with writing(path, self.kind, self.shape, bound_to) as folder:
                self._save(folder)
                if with_keys and self.stored_keys is not None:
                    write_rows(self.stored_keys, folder / STORED)
        except (OSError, RuntimeError) as e:  # the latter is what faiss and hnswlib say of a full disk
            raise KnowledgeBaseError(f"index {path} cannot be written ({e}); see to the disk and try again") from e
