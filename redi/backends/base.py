"""A recipe for an index: `Retriever`, and what every build and load passes through once."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
from numpy import ndarray

from redi.backends.folder import STORED, reading
from redi.backends.forks import fork_safe
from redi.backends.index import Index
from redi.backends.keys import Keys, Stored, require_form
from redi.backends.rerank import Reranked
from redi.errors import InvalidInputError, KnowledgeBaseError, MissingExtraError, ReDiError


class Retriever(ABC):
    """A recipe for an index: hyper-parameters only, so a frozen dataclass.

    A subclass owes `_build` and `_load`, and names the index it makes.

    Attributes:
        index_type: what `_build` and `_load` return.
        rerank: candidates whose distances are computed exactly from the stored keys; 0 takes the index at its word.
            A recipe that declares this as a field of its own can be re-ranked, and need not know how.
    """

    index_type: ClassVar[type[Index]]
    rerank: int = 0

    @abstractmethod
    def _build(self, keys: Keys) -> Index:
        """An index over these keys, taken in chunks or as one array; 1 ≤ n, 1 ≤ d."""

    @abstractmethod
    def _load(self, folder: Path, keys: Stored | None) -> Index:
        """The index that `Index._save` wrote here; every file has been found to be as it was written.

        Args:
            folder: where it is.
            keys: `Index.stored_keys`, if they were written beside it or are at hand.
        """

    @final
    def build(self, keys: ndarray) -> Index:
        """Make keys searchable.

        Args:
            keys: (n, d) float16, float32 or float64, finite; float64 is rounded to float32. A memory map is read in
                parts, and stays one where the index keeps keys. Not to be changed as long as the index lives.

        Raises:
            InvalidInputError: keys that no index can take.
        """
        require_form(keys, "keys")
        return self.build_from(lambda: (keys,), keys.shape)

    @final
    def build_from(
        self, chunks: Callable[[], Iterable[ndarray]], shape: tuple[int, int], *, keys: Stored | None = None
    ) -> Index:
        """Make keys searchable that come as a stream.

        Backends that can (`Faiss`, `Hnsw`) hold no more of it than they index and a sample to learn from; the others
        gather it in memory.

        Args:
            chunks: begins the stream; called more than once where a backend learns from a sample first, and must
                then give the same keys again. Chunks are (m_i, d), as for `build`; how they are cut does not matter.
            shape: n = Σ m_i and d.
            keys: the same keys, fetched by id, for what needs them at search time (re-ranking). Without, they are
                gathered in memory there.

        Raises:
            InvalidInputError: keys that no index can take, or other than `shape` promised.
        """
        n, d = shape
        if n < 1 or d < 1:
            raise InvalidInputError(f"no keys to build an index from, given shape {shape}; add rows first")
        if keys is not None and tuple(keys.shape) != (n, d):
            raise InvalidInputError(f"keys have shape {tuple(keys.shape)}, the stream {(n, d)}; give the same rows")
        stream = Keys(chunks, (n, d))
        with fork_safe():
            if not self.rerank:
                return self._build(stream)
            stored = stream.array(np.float32, np.float16) if keys is None else keys
            return Reranked(self._build(stream), stored, self.rerank)

    @final
    def load(self, path: Path, *, bound_to: str | None = None, keys: Stored | None = None) -> Index:
        """Open an index that was saved, after making sure that every byte of it is as it was written.

        Args:
            path: where it is.
            bound_to: what `Index.save` must have been told; None does not ask.
            keys: the keys it was built from, if it was saved without them.

        Raises:
            KnowledgeBaseError: nothing is there, it is damaged, bound to something else, another retriever saved it,
                or it needs keys that are neither there nor given.
        """
        folder, shape = reading(path, self.index_type.__name__, bound_to)
        try:
            if keys is None and (folder / STORED).is_file():
                keys = np.load(folder / STORED, mmap_mode="r", allow_pickle=False)
            if keys is not None and tuple(keys.shape) != shape:
                raise ValueError(f"keys of shape {tuple(keys.shape)} for an index of {shape}")
            index = self._load(folder, keys)
        except ReDiError:
            raise
        except Exception as e:  # every byte is as it was written: what its package says now is for that package
            raise KnowledgeBaseError(f"index {path} cannot be read ({e}); delete it and build it again") from e
        if index.shape != shape:
            raise KnowledgeBaseError(
                f"index {path} holds keys of shape {index.shape}, its manifest says {shape}; delete it and build again"
            )
        if not self.rerank:
            return index
        return Reranked(index, needed(keys, path), self.rerank)


def needed(keys: Stored | None, path: Path) -> Stored:
    """The keys, where there is no doing without.

    Raises:
        KnowledgeBaseError: they are missing.
    """
    if keys is None:
        raise KnowledgeBaseError(
            f"index {path} was saved without its keys, which this retriever needs; give them to load(keys=…), "
            "or build it again"
        )
    return keys


def at_least(least: int, **given: int) -> None:
    """Refuse a setting that is too small.

    Raises:
        InvalidInputError: names it.
    """
    for name, value in given.items():
        if value < least:
            raise InvalidInputError(f"{name} must be at least {least}, given {value}")


def optional(module: str, extra: str) -> Any:
    """A module of a package that redi does not need.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise MissingExtraError(module.split(".")[0], extra) from e
