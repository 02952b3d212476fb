"""A retriever of one's own in thirty lines inherits the whole contract; one that misbehaves is caught."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

import numpy as np
import pytest
import torch
from numpy import ndarray

from redi.backends import Exact, Index, Retriever
from redi.backends.keys import Keys, Stored, require_form
from redi.errors import InvalidInputError, KnowledgeBaseError, ReDiError
from redi.testing import RetrieverContract


@final
@dataclass(frozen=True, eq=False)
class ScanIndex(Index):
    keys: ndarray

    @property
    def shape(self) -> tuple[int, int]:
        n, d = self.keys.shape
        return n, d

    def _search(self, queries: ndarray, k: int) -> tuple[ndarray, ndarray]:
        keys = self.keys.astype(np.float64)
        distances = np.stack([np.square(keys - q).sum(axis=1) for q in queries])
        ids = distances.argsort(axis=1, kind="stable")[:, :k]
        return ids, np.take_along_axis(distances, ids, 1)

    def _save(self, folder: Path) -> None:
        np.save(folder / "keys.npy", self.keys)


@final
@dataclass(frozen=True)
class Scan(Retriever):
    index_type: ClassVar[type[Index]] = ScanIndex

    def _build(self, keys: Keys) -> Index:
        return ScanIndex(keys.array())

    def _load(self, folder: Path, keys: Stored | None) -> Index:
        return ScanIndex(np.load(folder / "keys.npy"))


class TestScan(RetrieverContract):
    @pytest.fixture
    def retriever(self) -> Retriever:
        return Scan()


@final
@dataclass(frozen=True, eq=False)
class Careless(Index):
    """Answers what it is told to."""

    ids: ndarray
    distances: ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return 5, 2

    def _search(self, queries: ndarray, k: int) -> tuple[ndarray, ndarray]:
        return self.ids, self.distances

    def _save(self, folder: Path) -> None:
        raise OSError("disk full")


@pytest.mark.parametrize("ids", [[[0, -1]], [[0, 5]], [[3, 3]]])
def test_padding_strangers_and_repetition_are_never_passed_on(ids: list[list[int]]) -> None:
    index = Careless(np.array(ids), np.array([[0.0, 1.0]], np.float32))
    with pytest.raises(ReDiError, match="search harder"):
        index.search(np.zeros((1, 2), np.float32), 2)


def test_a_distance_that_is_no_number_is_never_passed_on() -> None:
    index = Careless(np.array([[0, 1]]), np.array([[0.0, np.nan]], np.float32))
    with pytest.raises(ReDiError, match="search harder"):
        index.search(np.zeros((1, 2), np.float32), 2)


def test_any_order_is_put_right() -> None:
    index = Careless(np.array([[4, 2, 1, 0]]), np.array([[1.0, 0.5, 1.0, 2.0]], np.float32))
    found = index.search(np.zeros((1, 2), np.float32), 4)
    assert found.ids.tolist() == [[2, 1, 4, 0]]
    assert found.distances.tolist() == [[0.5, 1.0, 1.0, 2.0]]


def test_a_failed_save_leaves_nothing_and_spares_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "index"
    Scan().build(np.eye(3, dtype=np.float32)).save(path)
    with pytest.raises(KnowledgeBaseError, match=r"cannot be written \(disk full\)"):
        Careless(np.zeros((1, 1), np.int64), np.zeros((1, 1), np.float32)).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["index"]
    assert Scan().load(path).shape == (3, 3)


def test_an_index_of_another_kind_is_named(tmp_path: Path) -> None:
    Exact().build(np.eye(3, dtype=np.float32)).save(tmp_path / "index")
    with pytest.raises(KnowledgeBaseError, match="holds a ExactIndex, expected a ScanIndex"):
        Scan().load(tmp_path / "index")


def test_what_is_not_an_array_is_refused() -> None:
    unchecked = inspect.unwrap(require_form)  # as users run it, without the type checks of these tests
    with pytest.raises(InvalidInputError, match="numpy array, given Tensor"):
        unchecked(torch.zeros(2, 2), "keys")
