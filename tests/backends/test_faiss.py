"""Faiss keeps the contract whatever its factory string, and what it is known to get wrong comes out right."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy import ndarray

from redi.backends import Faiss, Retriever
from redi.backends.faiss import FaissIndex
from redi.errors import InvalidInputError
from redi.testing import RetrieverContract
from redi.testing.retriever import brute_force
from tests.backends.data import blobs, tight_cluster

faiss: Any = pytest.importorskip("faiss", reason="faiss is not installed")


@pytest.mark.parametrize("factory", ["HNSW0", "HNSW1", "HNSW1,Flat", "HNSW00_SQ8", "IVF16_HNSW0,Flat", "PCA8,HNSW1"])
def test_graphs_that_would_end_the_process_are_refused(factory: str) -> None:
    with pytest.raises(InvalidInputError, match="at least 2 links"):
        Faiss(factory)
    Faiss(factory.replace("HNSW", "HNSW1"))  # of ten links and more


class Approximate(RetrieverContract):
    exact = False
    adds = True


class TestFlat(Approximate):
    recall_floor: ClassVar[float] = 1.0

    @pytest.fixture
    def retriever(self) -> Retriever:
        return Faiss()


class TestInvertedFile(Approximate):
    recall_floor: ClassVar[float] = 0.97
    relative_error: ClassVar[float] = 1e-2  # of half precision

    @pytest.fixture
    def retriever(self) -> Retriever:
        return Faiss("IVF8,SQfp16", nprobe=7)


class TestCodesReranked(Approximate):
    recall_floor: ClassVar[float] = 0.95

    @pytest.fixture
    def retriever(self) -> Retriever:
        return Faiss("RaBitQ", rerank=128)


class TestGraph(Approximate):
    recall_floor: ClassVar[float] = 0.8

    @pytest.fixture
    def retriever(self) -> Retriever:
        return Faiss("HNSW16", ef_search=16)


@pytest.mark.slow
@pytest.mark.parametrize("rerank", [0, 50])
@pytest.mark.parametrize(
    "factory",
    ["SQ8", "SQ4", "PQ1x4fs", "IVF4,PQ1x4fs", "IVF4,RaBitQfs", "PCAR1,SQ8", "HNSW8,SQ8", "IVF4_HNSW8,Flat,RFlat"],
)
class TestEveryFactory(Approximate):
    recall_floor: ClassVar[float] = 0.03  # a code of one dimension out of 256 knows little
    relative_error: ClassVar[float] = np.inf

    @pytest.fixture
    def retriever(self, factory: str, rerank: int) -> Retriever:
        return Faiss(factory, rerank=rerank)


@pytest.mark.parametrize("batch", [1, 7, 8, 24])
def test_flat_is_right_in_tight_clusters_whatever_the_batch(batch: int) -> None:
    keys, queries = tight_cluster(200)
    queries = np.concatenate([queries, keys[:16] + np.float32(1e-4)])[-batch:]
    threshold = faiss.cvar.distance_compute_blas_threshold
    found = Faiss().build(keys).search(queries, 3)
    np.testing.assert_array_equal(found.ids[:, 0], brute_force(keys, queries, 1).ids[:, 0])
    assert faiss.cvar.distance_compute_blas_threshold == threshold, "a setting of the whole process was changed"


def test_the_plain_formula_would_have_erred() -> None:
    keys, queries = tight_cluster(200)
    plain = faiss.IndexFlatL2(keys.shape[1])
    plain.add(keys)
    assert (plain.search(queries, 1)[1] != brute_force(keys, queries, 1).ids).any()


def test_codes_are_of_what_differs() -> None:
    """Half precision of the keys themselves could not tell these apart."""
    keys, queries = tight_cluster(300, 1024)
    found, true = Faiss("SQfp16").build(keys).search(queries, 1), brute_force(keys, queries, 1)
    assert (brute_force(keys.astype(np.float16), queries, 1).ids != true.ids).any(), "this case is too easy"
    np.testing.assert_array_equal(found.ids, true.ids)
    np.testing.assert_allclose(found.distances, true.distances, rtol=1e-2)


@pytest.mark.parametrize("factory", ["IVF20,Flat", "IVF20,PQ8x4fs", "PCA8,IVF20,SQ8", "IVF20,SQ8,RFlat", "HNSW4"])
def test_it_searches_harder_instead_of_padding(factory: str) -> None:
    keys = blobs(900)
    index = Faiss(factory, nprobe=1, ef_search=1).build(keys)
    assert isinstance(index, FaissIndex)
    assert (index.index.search(index.frame.into(keys[:5]), 500)[1] < 0).any(), "this case is too easy"
    found = index.search(keys[:5], 500)
    assert (found.ids >= 0).all()
    assert np.mean(found.ids[:, 0] == np.arange(5)) >= 0.6


def test_few_keys_get_few_lists() -> None:
    keys = blobs(200)
    for rows, lists in ((3, 1), (80, 2), (200, 5)):
        index = Faiss("IVF1k,Flat").build(keys[:rows])
        assert isinstance(index, FaissIndex)
        assert index.index.nlist == lists


@pytest.mark.parametrize("factory", ["PQ1x4fs", "IVF2,PQ1x4fs", "SQ8", "RaBitQ", "IVF2,Flat"])
@pytest.mark.parametrize("n", [1, 90])
def test_keys_that_are_all_the_same_are_as_far_as_they_are(factory: str, n: int) -> None:
    keys = np.full((n, 8), 3.0, np.float32)
    found = Faiss(factory, nprobe=2).build(keys).search(np.stack([keys[0], keys[0] - 2]), 1)
    np.testing.assert_allclose(found.distances, [[0.0], [32.0]], rtol=0.05, atol=0.1)


def test_settings_reach_the_index_wherever_it_is(tmp_path: Path) -> None:
    keys = blobs(400)
    for factory in ("IVF8,Flat", "PCA8,IVF8,SQ8"):
        Faiss(factory, nprobe=3).build(keys).save(tmp_path / "index")
        index = Faiss(factory, nprobe=5).load(tmp_path / "index")
        assert isinstance(index, FaissIndex)
        inside = faiss.extract_index_ivf(index.index)
        assert inside.nprobe == 5


def test_it_never_holds_the_stream() -> None:
    keys, made, most = blobs(3000), list[weakref.ref[ndarray]](), 0

    def chunks() -> Iterator[ndarray]:
        nonlocal most
        for start in range(0, 3000, 100):
            chunk = keys[start : start + 100].copy()
            made.append(weakref.ref(chunk))
            most = max(most, sum(chunk() is not None for chunk in made))
            yield chunk

    index = Faiss("IVF16,SQ8", training_bytes=4 * 24 * 500).build_from(chunks, (3000, 24))
    assert index.shape == (3000, 24)
    assert most <= 3


def test_principal_axes_are_found_from_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redi.backends.faiss._AXES_FROM", 64)
    rng = np.random.default_rng(2)
    keys = (rng.normal(size=(3000, 6)) @ rng.normal(size=(6, 200)) + 0.01 * rng.normal(size=(3000, 200))).astype("f4")
    index = Faiss("PCA6,Flat").build(keys)
    found, true = index.search(keys[:50], 5), brute_force(keys, keys[:50], 5)
    assert np.mean([len(set(a) & set(b)) / 5 for a, b in zip(found.ids, true.ids, strict=True)]) > 0.9


def test_nothing_is_said_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    for factory in ("IVF8,PQ8", "PQ8", "OPQ2_4,PQ2x4", "IVF8,PQ8x4fs,RFlat"):
        Faiss(factory).build(blobs(700)).search(blobs(4), 3)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("factory", ["Nonsense", "IVF8,PQ7", "", "IDMap,Flat"])
def test_what_faiss_cannot_build_is_refused_in_its_words(factory: str) -> None:
    with pytest.raises(InvalidInputError, match="faiss cannot build"):
        Faiss(factory).build(blobs(400))


def test_loading_maps_the_file(tmp_path: Path) -> None:
    keys = np.random.default_rng(1).normal(size=(20_000, 256)).astype(np.float32)
    Faiss("SQfp16").build(keys).save(tmp_path / "index")
    before = anonymous_bytes()
    index = Faiss("SQfp16").load(tmp_path / "index")
    found = index.search(keys[:2], 3)
    assert anonymous_bytes() - before < keys.nbytes // 8
    np.testing.assert_array_equal(found.ids[:, 0], [0, 1])
    assert index.add(keys[:2]).shape == (20_002, 256)  # which faiss aborts at where it is asked plainly


def anonymous_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("only Linux says how much memory is no file's")
    return 1024 * int(status.read_text().split("RssAnon:")[1].split()[0])


def test_thread_counts_stay_as_they_were() -> None:
    keys, before = blobs(500), faiss.omp_get_max_threads()
    Faiss("IVF4,Flat").build(keys).search(keys, 3)
    assert faiss.omp_get_max_threads() == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"nprobe": 0}, "nprobe"),
        ({"ef_search": 0}, "ef_search"),
        ({"rerank": -1}, "rerank"),
        ({"training_bytes": 0}, "training_bytes"),
        ({"device": "tpu"}, "'cpu' or 'cuda'"),
    ],
)
def test_refusals(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Faiss(**wrong)


def test_a_gpu_is_asked_for_in_vain() -> None:
    if hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus():
        pytest.skip("this faiss has a GPU")
    with pytest.raises(InvalidInputError, match="faiss-gpu"):
        Faiss(device="cuda")
