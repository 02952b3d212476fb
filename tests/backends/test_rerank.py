"""Re-ranking makes distances true, whatever proposes, from keys wherever they are."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import pytest
from numpy import ndarray

from redi.backends import Faiss, Hnsw, Index, Keys, Retriever, Scann, Stored
from redi.backends.rerank import Reranked
from redi.errors import InvalidInputError, KnowledgeBaseError, MissingExtraError, ReDiError
from redi.testing.retriever import brute_force


@final
@dataclass(frozen=True, eq=False)
class CoarseIndex(Index):
    """Compares whole numbers only, lies about distances, and repeats and pads what it proposes."""

    rounded: ndarray

    @property
    def shape(self) -> tuple[int, int]:
        n, d = self.rounded.shape
        return n, d

    def _search(self, queries: ndarray, k: int) -> tuple[ndarray, ndarray]:
        order = np.abs(self.rounded - np.round(queries)[:, None]).sum(-1).argsort(axis=1, kind="stable")[:, :k]
        order[:, 1::7] = -1
        order[:, 2::7] = order[:, :1]
        return order, np.zeros(order.shape)

    def _save(self, folder: Path) -> None:
        np.save(folder / "rounded.npy", self.rounded)


@final
@dataclass(frozen=True)
class Coarse(Retriever):
    rerank: int = 0
    index_type: ClassVar[type[Index]] = CoarseIndex

    def _build(self, keys: Keys) -> Index:
        return CoarseIndex(np.round(keys.array()))

    def _load(self, folder: Path, keys: Stored | None) -> Index:
        return CoarseIndex(np.load(folder / "rounded.npy"))


KEYS = (3 * np.random.default_rng(0).normal(size=(60, 5))).astype(np.float32)


def test_only_true_distances_and_real_candidates_are_left() -> None:
    index = Coarse(rerank=40).build(KEYS)
    assert isinstance(index, Reranked)
    found = index.search(KEYS[:9], 4)
    np.testing.assert_array_equal(found.ids[:, 0], np.arange(9))
    np.testing.assert_array_equal(found.distances[:, 0], 0)
    true = np.square(KEYS[found.ids].astype(np.float64) - KEYS[:9, None]).sum(-1)
    np.testing.assert_array_equal(found.distances, true.astype(np.float32))
    with pytest.raises(ReDiError, match="CoarseIndex did not find 60"):
        index.search(KEYS[:1], 60)


def test_an_index_can_be_reranked_or_not_as_it_is_loaded(tmp_path: Path) -> None:
    Coarse(rerank=40).build(KEYS).save(tmp_path / "with")
    Coarse().build(KEYS).save(tmp_path / "without")
    assert type(Coarse().load(tmp_path / "with")) is CoarseIndex
    with pytest.raises(KnowledgeBaseError, match="give them to load"):
        Coarse(rerank=40).load(tmp_path / "without")
    for path, keys in (("with", None), ("without", KEYS)):
        found = Coarse(rerank=40).load(tmp_path / path, keys=keys).search(KEYS, 1)
        np.testing.assert_array_equal(found.ids[:, 0], np.arange(60))


class Recorded:
    """Keys that are nowhere, and remember which were asked for."""

    shape = (60, 5)

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __getitem__(self, ids: ndarray, /) -> ndarray:
        self.asked += ids.tolist()
        return KEYS[ids]


def test_keys_are_fetched_where_they_are() -> None:
    keys = Recorded()
    index = Coarse(rerank=10).build_from(lambda: np.split(KEYS, 3), (60, 5), keys=keys)
    assert keys.asked == []
    index.search(KEYS[:1], 2)
    assert 0 < len(keys.asked) <= 10
    assert len(set(keys.asked)) == len(keys.asked)
    with pytest.raises(InvalidInputError, match=r"\(60, 5\)"):
        Coarse(rerank=10).build_from(lambda: (KEYS[:59],), (59, 5), keys=keys)


def test_half_precision_keys_decide_as_they_are(tmp_path: Path) -> None:
    half = KEYS.astype(np.float16)
    index = Coarse(rerank=60).build(half)
    index.save(tmp_path / "index")
    assert np.load(tmp_path / "index" / "stored_keys.npy").dtype == np.float16
    for again in (index, Coarse(rerank=60).load(tmp_path / "index")):
        found = again.search(KEYS[:5], 1)
        np.testing.assert_array_equal(found.distances, brute_force(half, KEYS[:5], 1).distances)


@pytest.mark.parametrize(
    ("package", "module", "extra", "recipe"),
    [
        ("faiss", "faiss", "faiss", Faiss),
        ("hnswlib", "hnswlib", "hnsw", Hnsw),
        ("scann", "scann.scann_ops.py.scann_ops_pybind", "scann", Scann),
    ],
)
def test_what_is_not_installed_is_named_before_any_work(
    monkeypatch: pytest.MonkeyPatch, package: str, module: str, extra: str, recipe: Any
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"{package} is not installed; run: pip install 'redi\[{extra}\]'"):
        recipe()
