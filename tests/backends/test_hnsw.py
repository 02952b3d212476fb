"""The graph keeps the contract, builds the same from the same, and answers where its walk breaks off."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from redi.backends import Hnsw, Retriever
from redi.backends.hnsw import HnswIndex
from redi.errors import InvalidInputError
from redi.testing import RetrieverContract
from redi.testing.retriever import brute_force
from tests.backends.data import tight_cluster

pytest.importorskip("hnswlib", reason="hnswlib is not installed")


class TestHnsw(RetrieverContract):
    exact: ClassVar[bool] = False
    adds: ClassVar[bool] = True
    recall_floor: ClassVar[float] = 0.98

    @pytest.fixture
    def retriever(self) -> Retriever:
        return Hnsw()


@pytest.mark.slow
class TestSparseGraphReranked(RetrieverContract):
    exact: ClassVar[bool] = False
    adds: ClassVar[bool] = True

    @pytest.fixture
    def retriever(self) -> Retriever:
        return Hnsw(M=4, ef_construction=20, ef_search=200, rerank=40)


def test_tight_clusters_are_told_apart() -> None:
    keys, queries = tight_cluster(100)
    np.testing.assert_array_equal(Hnsw().build(keys).search(queries, 1).ids, brute_force(keys, queries, 1).ids)


def test_the_same_keys_make_the_same_graph(tmp_path: Path) -> None:
    keys = np.random.default_rng(0).normal(size=(400, 30)).astype(np.float32)
    for name in ("a", "b"):
        Hnsw().build(keys).save(tmp_path / name)
    assert (tmp_path / "a" / "graph.bin").read_bytes() == (tmp_path / "b" / "graph.bin").read_bytes()


def test_keys_out_of_reach_are_found_by_looking_at_all() -> None:
    keys = np.random.default_rng(1).normal(size=(500, 16)).astype(np.float32)
    index = Hnsw(M=2, ef_construction=2, ef_search=1).build(keys)
    assert isinstance(index, HnswIndex)
    with pytest.raises(RuntimeError):
        index.graph.knn_query(keys[:1], 500)
    found, true = index.search(keys[:3], 500), brute_force(keys, keys[:3], 500)
    np.testing.assert_array_equal(found.ids, true.ids)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"M": 1}, "M must be at least 2"), ({"ef_search": 0}, "ef_search"), ({"rerank": -1}, "rerank")],
)
def test_refusals(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Hnsw(**wrong)
