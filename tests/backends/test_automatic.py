"""The default is exact up to a size; what comes after it finds the neighbours of latents all the same."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from redi.backends import Exact, Faiss
from redi.backends.automatic import EXACT_UP_TO, automatic
from redi.testing.retriever import brute_force


def test_exact_up_to_a_size_and_where_the_dimension_is_small() -> None:
    assert automatic((1, 1)) == automatic((EXACT_UP_TO // 16_384, 16_384)) == automatic((EXACT_UP_TO, 64)) == Exact()


def test_beyond_it_faiss_if_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    many = (EXACT_UP_TO // 16_384 + 1, 16_384)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "faiss", None)
        assert automatic(many) == Exact()
    pytest.importorskip("faiss")
    assert isinstance(automatic(many), Faiss)


def test_what_it_takes_then_finds_the_neighbours() -> None:
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    spectrum = 1 / np.arange(1, 1025)
    rows = (5 + rng.normal(size=(2040, 1024)) * spectrum).astype(np.float32)
    keys, queries = rows[:2000], rows[2000:]
    found = automatic((EXACT_UP_TO, 1024)).build(keys).search(queries, 16)
    np.testing.assert_array_equal(found.ids, brute_force(keys, queries, 16).ids)
