"""Keys reach a backend whole, in order, checked, and no more of them at once than need be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray

from redi.backends import Keys, Stored
from redi.backends.keys import Joined, gathered, write_rows

ROWS = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)


def stream(cuts: list[int], dtype: str = "float32") -> Keys:
    return Keys(lambda: np.split(ROWS.astype(dtype), sorted(cuts)), (40, 6))


@given(cuts=st.lists(st.integers(0, 40), max_size=6), at_once=st.integers(1, 300))
def test_however_a_stream_is_cut_it_is_the_same(cuts: list[int], at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("redi.backends.keys._CHUNK", at_once)
        chunks = list(stream(cuts).chunks())
        assert max(chunk.size for chunk in chunks) <= max(6, at_once)
        np.testing.assert_array_equal(np.concatenate(chunks), ROWS)
        np.testing.assert_array_equal(stream(cuts).array(), ROWS)
        np.testing.assert_array_equal(stream(cuts).sample(7), stream([]).sample(7))


def test_a_sample_is_of_different_rows() -> None:
    sample = stream([3, 17]).sample(25)
    places = [np.flatnonzero((row == ROWS).all(axis=1)).tolist() for row in sample]
    assert all(len(place) == 1 for place in places)
    assert sorted(places) == places
    assert len(np.unique(places)) == 25
    np.testing.assert_array_equal(stream([9]).sample(1000), ROWS)


def test_precision_is_what_was_asked_for() -> None:
    half = stream([10], "float16")
    assert {chunk.dtype for chunk in half.chunks()} == {np.dtype(np.float32)}
    assert {chunk.dtype for chunk in half.chunks(np.float32, np.float16)} == {np.dtype(np.float16)}
    assert half.array(np.float32, np.float16).dtype == np.float16
    mixed = Keys(lambda: (ROWS[:20].astype(np.float16), ROWS[20:].astype(np.float64)), (40, 6))
    whole = mixed.array(np.float32, np.float16)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole[20:], ROWS[20:])
    np.testing.assert_array_equal(whole[:20], ROWS[:20].astype(np.float16))


def test_one_array_is_not_copied() -> None:
    assert Keys(lambda: (ROWS,), ROWS.shape).array() is ROWS
    assert all(np.shares_memory(chunk, ROWS) for chunk in Keys(lambda: np.split(ROWS, [8]), ROWS.shape).chunks())


class Made:
    """Rows that are made when asked for."""

    shape = (40, 6)

    def __getitem__(self, ids: ndarray, /) -> ndarray:
        return ROWS[ids].astype(np.float16)


def test_stored_rows_may_be_anything_that_fetches_by_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redi.backends.keys._CHUNK", 30)
    more = ROWS[:3] + 1
    both = Joined(Made(), more)
    for rows in (Made(), both, np.asarray(ROWS)):
        assert isinstance(rows, Stored)
        write_rows(rows, tmp_path / "rows.npy")
        np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), gathered(rows))
    expected = np.concatenate([ROWS.astype(np.float16), more])
    assert both.shape == (43, 6)
    assert gathered(both).dtype == np.float32
    ids = np.array([42, 0, 41, 7])
    np.testing.assert_array_equal(both[ids], expected[ids])
