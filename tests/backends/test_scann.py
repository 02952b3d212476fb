"""ScaNN keeps the contract, pads nothing and unpickles nothing."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from redi.backends import Retriever, Scann
from redi.backends.scann import ScannIndex
from redi.errors import InvalidInputError
from redi.testing import RetrieverContract
from redi.testing.retriever import brute_force
from tests.backends.data import blobs, tight_cluster

pytest.importorskip("scann", reason="scann is not installed")


class TestScann(RetrieverContract):
    exact: ClassVar[bool] = False
    recall_floor: ClassVar[float] = 0.5  # of four bits for two dimensions
    relative_error: ClassVar[float] = np.inf

    @pytest.fixture
    def retriever(self) -> Retriever:
        return Scann()


class TestScannReranked(RetrieverContract):
    exact: ClassVar[bool] = False
    recall_floor: ClassVar[float] = 0.97

    @pytest.fixture
    def retriever(self) -> Retriever:
        return Scann(leaves=8, leaves_to_search=7, rerank=64)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [{"dimensions_per_code": 0}, {"reorder": 64}, {"leaves": 1, "reorder": 64}])
class TestScannOtherwise(RetrieverContract):
    exact: ClassVar[bool] = False
    recall_floor: ClassVar[float] = 0.98

    @pytest.fixture
    def retriever(self, recipe: dict[str, int]) -> Retriever:
        return Scann(**recipe)


def test_it_searches_harder_instead_of_padding() -> None:
    keys = blobs(900)
    index = Scann(leaves=20, leaves_to_search=1).build(keys)
    assert isinstance(index, ScannIndex)
    assert np.isnan(index.searcher.search_batched(index.frame.into(keys[:5]), 500, 500, 1)[1]).any(), "too easy"
    found = index.search(keys[:5], 500)
    assert all(len(set(row)) == 500 for row in found.ids.tolist())


def test_tight_clusters_are_told_apart() -> None:
    keys, queries = tight_cluster(100)
    index = Scann(dimensions_per_code=0).build(keys)
    np.testing.assert_array_equal(index.search(queries, 1).ids, brute_force(keys, queries, 1).ids)


def test_a_pickle_in_the_folder_is_not_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "sprung",)

    keys = blobs(200)
    Scann().build(keys).save(tmp_path / "index")
    assert not list((tmp_path / "index").glob("*.pkl"))
    (tmp_path / "index" / "scann_docids.pkl").write_bytes(pickle.dumps(Trap()))
    assert Scann().load(tmp_path / "index").shape == (200, 24)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("wrong", "message"), [({"leaves": 0}, "leaves must"), ({"reorder": -1}, "reorder"), ({"rerank": -1}, "rerank")]
)
def test_refusals(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Scann(**wrong)
