"""The public suites can fail: every kind of wrong answer is caught. And they cost nothing to those who do not test."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numpy import ndarray
from torch import Tensor

import redi.testing
from redi.backends import Exact, Index, Keys, Retriever, Stored
from redi.combiners import Affine, Combiner, LeastSquares
from redi.testing import CombinerContract, RetrieverContract, clustered_latents, neighbourhoods
from redi.testing.retriever import brute_force, in_fork
from redi.types import Neighbors

KEYS = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
KEYS[7] = KEYS[3]
TRUE = Exact().build(KEYS).search(KEYS[3:5], 6)


def swapped(array: ndarray) -> ndarray:
    return array[:, [1, 0, *range(2, array.shape[1])]]


@pytest.mark.parametrize(
    "wrong",
    [
        replace(TRUE, ids=swapped(TRUE.ids)),  # ties not by id
        replace(TRUE, ids=TRUE.ids[:, ::-1].copy(), distances=TRUE.distances[:, ::-1].copy()),  # farthest first
        replace(TRUE, ids=np.repeat(TRUE.ids[:, :1], 6, axis=1)),  # one id again and again
        replace(TRUE, ids=TRUE.ids - 30),
        replace(TRUE, distances=np.sqrt(TRUE.distances)),
        Neighbors(TRUE.ids[:, 1:], TRUE.distances[:, 1:]),  # the nearest left out
    ],
)
def test_wrong_neighbours_are_caught(wrong: Neighbors) -> None:
    RetrieverContract().check(KEYS, KEYS[3:5], TRUE)
    with pytest.raises(AssertionError):
        RetrieverContract().check(KEYS, KEYS[3:5], wrong)


@dataclass(eq=False)
class BrokenIndex(Index):
    """Searches rightly, and goes wrong elsewhere in the way asked for."""

    keys: ndarray
    how: str
    last: ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        n, d = self.keys.shape
        return n, d

    def _search(self, queries: ndarray, k: int) -> tuple[ndarray, ndarray]:
        if self.how == "threads":
            self.last = queries
            time.sleep(0.001)
            queries = self.last
        found = brute_force(self.keys, queries, k)
        return found.ids, found.distances

    def _add(self, keys: Keys) -> Index:
        if self.how == "add changes it":
            self.keys = np.concatenate([keys.array(), self.keys])
            return self
        return BrokenIndex(np.concatenate([self.keys, keys.array()[::-1]]), self.how)

    def _save(self, folder: Path) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class BrokenRetriever(Retriever):
    how: str
    index_type: ClassVar[type[Index]] = BrokenIndex

    def _build(self, keys: Keys) -> Index:
        chunks = list(keys.chunks())
        return BrokenIndex(np.concatenate(chunks[::-1] if self.how == "order" else chunks), self.how)

    def _load(self, folder: Path, keys: Stored | None) -> Index:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("how", "test", "arguments"),
    [
        ("order", "test_a_stream_builds_what_an_array_builds", ([1],)),
        ("add changes it", "test_keys_can_be_added_or_it_says_what_to_do", ()),
        ("add reverses", "test_keys_can_be_added_or_it_says_what_to_do", ()),
        ("threads", "test_threads_may_search_at_the_same_time", ()),
    ],
)
def test_broken_retrievers_are_caught(how: str, test: str, arguments: tuple[object, ...]) -> None:
    contract = type("Adding", (RetrieverContract,), {"adds": True})()
    with pytest.raises(AssertionError):
        getattr(contract, test)(BrokenRetriever(how), *arguments)


def test_a_child_that_hangs_or_fails_is_caught() -> None:
    assert in_fork(lambda: True)
    assert not in_fork(lambda: False)
    with pytest.raises(AssertionError, match="did not answer"):
        in_fork(lambda: time.sleep(60) is None, seconds=0.2)
    with pytest.raises(AssertionError, match="failed"):
        in_fork(lambda: 1 / 0 > 0)


class Broken(Combiner):
    """Weights that go wrong in the way asked for."""

    def __init__(self, how: str) -> None:
        self.how = how

    def weights(self, keys: Tensor, query: Tensor) -> Tensor:
        w = Affine().weights(keys, query)
        match self.how:
            case "nan at distance zero":
                return w / (keys - query[:, None]).norm(dim=-1)
            case "units":
                return torch.softmax(-(keys - query[:, None]).norm(dim=-1), dim=1)
            case "order":
                return w * torch.arange(1, keys.shape[1] + 1)
            case "batch":
                return w + torch.arange(len(w))[:, None]
            case _:
                return w.float() if query.dtype == torch.float64 else w


@pytest.mark.parametrize(
    ("how", "test"),
    [
        ("nan at distance zero", "test_weights_are_finite_and_in_the_right_precision"),
        ("precision", "test_weights_are_finite_and_in_the_right_precision"),
        ("units", "test_units_do_not_matter"),
        ("order", "test_permuting_neighbours_permutes_weights"),
        ("order", "test_equal_keys_weigh_the_same"),
        ("batch", "test_samples_of_a_batch_do_not_meet"),
    ],
)
def test_broken_weights_are_caught(how: str, test: str) -> None:
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        getattr(CombinerContract(), test)(Broken(how))


@pytest.mark.parametrize(
    ("flag", "combiner"), [("affine", LeastSquares()), ("nonnegative", Affine()), ("beats_nearest", Affine(100.0))]
)
def test_broken_promises_are_caught(flag: str, combiner: Combiner) -> None:
    promising = type("Promising", (CombinerContract,), {flag: True})()
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        promising.test_what_it_promises_of_its_weights(combiner)


@settings(max_examples=60)
@given(clustered_latents(min_rows=3, max_rows=9, max_dimension=17))
def test_clustered_latents_are_as_promised(rows: ndarray) -> None:
    assert rows.dtype == np.float32
    assert 3 <= len(rows) <= 9
    assert rows.shape[1] <= 17
    assert np.isfinite(rows).all()


def test_duplicates_and_tight_clusters_occur() -> None:
    seen: set[str] = set()

    @settings(max_examples=80)
    @given(clustered_latents(min_rows=4, max_dimension=16))
    def look(rows: ndarray) -> None:
        if len(np.unique(rows, axis=0)) < len(rows):
            seen.add("duplicates")
        if np.linalg.norm(rows.mean(axis=0)) > 1000 * np.linalg.norm(rows.std(axis=0)) > 0:
            seen.add("tight")

    look()
    assert seen == {"duplicates", "tight"}


@given(neighbourhoods())
def test_neighbourhoods_come_nearest_first(case: tuple[Tensor, Tensor]) -> None:
    keys, query = (x.double() for x in case)
    distances = (keys - query[:, None]).norm(dim=-1)
    assert (distances.diff(dim=1) >= -1e-6 * (1 + keys.abs().max())).all()


def test_the_library_does_not_need_the_test_tools() -> None:
    code = (
        "import sys, redi, redi.testing, redi.backends, redi.combiners, redi.noise, redi.gate;"
        "print(sorted({'pytest', 'hypothesis', 'diffusers'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert said == "[]"


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Missing'"):
        _ = redi.testing.Missing
    for name in redi.testing.__all__:
        assert getattr(redi.testing, name) is not None
