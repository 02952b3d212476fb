"""Exact search keeps its contract, and is exact where the usual formula is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray

from redi.backends import Exact, Retriever
from redi.backends.exact import ExactIndex, error_bound
from redi.errors import InvalidInputError
from redi.testing import RetrieverContract, clustered_latents
from redi.testing.retriever import brute_force
from tests.backends.data import tight_cluster


class TestExact(RetrieverContract):
    adds: ClassVar[bool] = True

    @pytest.fixture
    def retriever(self) -> Retriever:
        return Exact()


class TestExactInSmallTiles(RetrieverContract):
    adds: ClassVar[bool] = True

    @pytest.fixture
    def retriever(self) -> Retriever:
        return Exact(chunk_bytes=3000)


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 1 << 16])
def test_a_tight_cluster_of_latents(chunk_bytes: int) -> None:
    keys, queries = tight_cluster(300)
    true = brute_force(keys, queries, 5)
    found = Exact(chunk_bytes=chunk_bytes).build(keys).search(queries, 5)
    np.testing.assert_array_equal(found.ids, true.ids)
    np.testing.assert_array_equal(found.distances, true.distances)
    norms, q = np.square(keys).sum(1), queries
    usual = (np.square(q).sum(1)[:, None] - 2 * q @ keys.T + norms).argsort(axis=1)[:, :5]
    assert (usual != true.ids).any(), "this case is too easy to show anything"


def test_half_precision_keys_are_not_copied_up(tmp_path: Path) -> None:
    keys = np.random.default_rng(1).normal(size=(50, 64)).astype(np.float16)
    index = Exact().build(keys)
    assert isinstance(index, ExactIndex)
    assert index.keys.dtype == torch.float16
    np.save(tmp_path / "keys.npy", keys.astype(np.float32))
    mapped = np.load(tmp_path / "keys.npy", mmap_mode="r")
    index = Exact().build(mapped)
    assert isinstance(index, ExactIndex)
    assert np.shares_memory(index.keys.numpy(), mapped)


@given(clustered_latents(max_rows=40), st.booleans())
def test_the_certificate_holds(keys: ndarray, one: bool) -> None:
    queries = (keys[: 1 if one else 5].astype(np.float64) + keys.std(axis=0)).astype(np.float32)
    index = Exact(chunk_bytes=2000).build(keys)
    assert isinstance(index, ExactIndex)
    c, d = index.centre.double(), keys.shape[1]
    y, u = torch.from_numpy(keys).double() - c, torch.from_numpy(queries).double() - c
    for width, centred in ((65_536, False), (4096, False), (1024, False), (1024, True), (7, True)):
        computed = index.norms - 2 * index._products(u.float(), width, centred=centred).double().T
        true = y.square().sum(1) - 2 * u @ (y if centred else torch.from_numpy(keys).double()).T
        bound = error_bound(index.norms.sqrt(), u.norm(dim=1), d, width, 0.0 if centred else float(c.norm()))
        assert ((computed - true).abs() <= bound).all()


def test_the_certificate_lets_few_through() -> None:
    rng = np.random.default_rng(2)
    keys = (14.6 * rng.normal(size=16_384) + rng.normal(size=(400, 16_384))).astype(np.float32)
    index = Exact().build(keys)
    assert isinstance(index, ExactIndex)
    u = torch.from_numpy(keys[:4] + rng.normal(size=(4, 16_384))) - index.centre.double()
    assert int(index._candidates(u, 8).sum(0).max()) <= 16


def test_only_what_rounding_hides_is_seen_from_the_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[bool] = []
    products = ExactIndex._products
    monkeypatch.setattr(
        ExactIndex, "_products", lambda *a, centred: (passes.append(centred), products(*a, centred=centred))[1]
    )
    rng = np.random.default_rng(3)
    spread = rng.normal(size=(300, 16_384))
    pair = np.repeat(rng.normal(size=(2, 16_384)), 150, axis=0)  # each half as tight as can be, the centre between them
    for keys, expected in ((spread + 2, [False]), (spread + 1000, [True]), (pair + 1e-3 * spread, [False, True])):
        keys = keys.astype(np.float32)
        for queries in (keys[:1], keys[:3]):
            passes.clear()
            np.testing.assert_array_equal(Exact().build(keys).search(queries, 2).ids, brute_force(keys, queries, 2).ids)
            assert passes == expected


@pytest.fixture
def reduced_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("reduced_precision")
def test_it_stays_exact_where_torch_may_multiply_in_bfloat16() -> None:
    rng = np.random.default_rng(4)
    keys = (3 + rng.normal(size=(500, 512))).astype(np.float32)
    queries = (3 + rng.normal(size=(16, 512))).astype(np.float32)
    np.testing.assert_array_equal(Exact().build(keys).search(queries, 9).ids, brute_force(keys, queries, 9).ids)


def test_many_queries_are_answered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redi.backends.exact._SCORES", 100)
    keys = np.random.default_rng(5).normal(size=(30, 12)).astype(np.float32)
    np.testing.assert_array_equal(Exact().build(keys).search(keys, 3).ids, brute_force(keys, keys, 3).ids)


def test_refusals() -> None:
    with pytest.raises(InvalidInputError, match="chunk_bytes"):
        Exact(chunk_bytes=0)
