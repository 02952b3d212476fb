"""The contract of a Retriever: supply the fixture `retriever`, inherit the tests.

Nothing an index says is believed: ids and distances are compared with a brute-force search in float64.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy import ndarray

from redi.backends import Retriever
from redi.errors import InvalidInputError, KnowledgeBaseError
from redi.testing.strategies import clustered_latents
from redi.types import Neighbors

# The fixture is a frozen recipe, so sharing it between examples is sound.
_shared = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors]
)


def brute_force(keys: ndarray, queries: ndarray, k: int) -> Neighbors:
    """The k nearest keys by float64 distance, ties by id."""
    distances = np.stack([np.square(keys.astype(np.float64) - q.astype(np.float64)).sum(axis=1) for q in queries])
    ids = np.lexsort((np.broadcast_to(np.arange(len(keys)), distances.shape), distances), axis=-1)[:, :k]
    return Neighbors(ids, np.take_along_axis(distances, ids, 1).astype(np.float32))


def in_fork(work: Callable[[], bool], seconds: float = 120.0) -> bool:
    """What `work` says in a forked child.

    Raises:
        AssertionError: it said nothing in time.
    """
    if not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that forking a process with threads may hang: that is it
        child = os.fork()
    if not child:
        said = 2
        try:
            said = 0 if work() else 1
        finally:
            os._exit(said)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) < 2, "the child failed"
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"the child did not answer within {seconds:.0f} s")


class RetrieverContract:
    """Every promise of `redi.backends.Retriever` and of the `Index` it builds.

    Attributes:
        exact: finds what brute force finds, to the last id. Otherwise `recall_floor` is asked for.
        recall_floor: share of the true ten nearest that are found among 500 clustered keys.
        relative_error: of squared distances, measured against ‖q‖² and the largest ‖x‖² (against their own size where
            `exact`); infinite where nothing is said of them.
        adds: `Index.add` works; otherwise it must say what to do instead.
    """

    exact: ClassVar[bool] = True
    recall_floor: ClassVar[float] = 0.9
    relative_error: ClassVar[float] = 1e-5
    adds: ClassVar[bool] = False

    @pytest.fixture
    def retriever(self) -> Retriever:
        """The retriever under test."""
        raise NotImplementedError("supply the fixture `retriever`")

    def check(self, keys: ndarray, queries: ndarray, found: Neighbors) -> None:
        """What holds of every answer: shapes, valid and unique ids, true distances, ascending, ties by id."""
        ids, distances = found.ids, found.distances
        assert ids.dtype == np.int64
        assert distances.dtype == np.float32
        assert ids.shape == distances.shape
        assert len(ids) == len(queries)
        assert ((ids >= 0) & (ids < len(keys))).all()
        assert all(len(set(row)) == len(row) for row in ids.tolist()), "an id came twice"
        difference = keys[ids].astype(np.float64) - queries[:, None].astype(np.float64)
        true = np.square(difference).sum(axis=-1)
        size = np.square(queries.astype(np.float64)).sum(-1)[:, None] + np.square(keys.astype(np.float64)).sum(-1).max()
        if np.isfinite(self.relative_error):
            assert (np.abs(distances - true) <= self.relative_error * (true if self.exact else size) + 1e-30).all()
        assert (np.diff(distances, axis=1) >= 0).all(), "not nearest first"
        if self.exact:
            expected = brute_force(keys, queries, ids.shape[1])
            np.testing.assert_array_equal(ids, expected.ids)
            np.testing.assert_array_equal(distances, expected.distances)

    @_shared
    @given(keys=clustered_latents(), data=st.data())
    def test_answers_are_true(self, retriever: Retriever, keys: ndarray, data: st.DataObject) -> None:
        """For queries near the cluster, equal to keys, and far away."""
        k = data.draw(st.integers(1, len(keys)))
        rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
        near = keys[rng.integers(len(keys), size=3)] + keys.std(axis=0) * rng.normal(size=(3, keys.shape[1]))
        queries = np.concatenate([near, keys[:2], 2 * keys[:1], 0 * keys[:1]]).astype(np.float32)
        index = retriever.build(keys)
        assert index.shape == keys.shape
        self.check(keys, queries, index.search(queries, k))

    def test_recall(self, retriever: Retriever) -> None:
        """Enough of the true ten nearest are found."""
        rng = np.random.default_rng(0)
        keys = (14.6 * rng.normal(size=(1, 256)) + rng.normal(size=(500, 256))).astype(np.float32)
        queries = (keys[:50] + rng.normal(size=(50, 256))).astype(np.float32)
        found, true = retriever.build(keys).search(queries, 10), brute_force(keys, queries, 10)
        hits = [len(set(a) & set(b)) for a, b in zip(found.ids.tolist(), true.ids.tolist(), strict=True)]
        assert np.mean(hits) / 10 >= (1 if self.exact else self.recall_floor)

    @_shared
    @given(keys=clustered_latents(max_rows=30, max_dimension=257), data=st.data())
    def test_a_full_rerank_is_exact(self, retriever: Retriever, keys: ndarray, data: st.DataObject) -> None:
        """Where every row is a candidate, the answer is that of brute force to the last id."""
        if "rerank" not in {f.name for f in dataclasses.fields(retriever)}:  # pyright: ignore[reportArgumentType]
            pytest.skip(f"{type(retriever).__name__} has no field `rerank`")
        recipe: Retriever = dataclasses.replace(retriever, rerank=len(keys))  # pyright: ignore
        k = data.draw(st.integers(1, len(keys)))
        queries = np.concatenate([keys[:2], keys[:2] + keys.std(axis=0)])
        found, true = recipe.build(keys).search(queries, k), brute_force(keys, queries, k)
        np.testing.assert_array_equal(found.ids, true.ids)
        np.testing.assert_array_equal(found.distances, true.distances)

    @pytest.mark.parametrize("cuts", [[], [1], [13, 13, 57], [5, 40]])
    def test_a_stream_builds_what_an_array_builds(self, retriever: Retriever, cuts: list[int]) -> None:
        """However it is cut."""
        keys = 20 + np.random.default_rng(7).normal(size=(60, 24)).astype(np.float32)
        streamed = retriever.build_from(lambda: np.split(keys, cuts), (60, 24))
        a, b = streamed.search(keys[:9] + 0.1, 6), retriever.build(keys).search(keys[:9] + 0.1, 6)
        np.testing.assert_array_equal(a.ids, b.ids)
        # where keys lie in memory decides in which order a sum is taken: by the last digit it may be another
        np.testing.assert_allclose(a.distances, b.distances, rtol=1e-6)

    @pytest.mark.parametrize(
        ("chunks", "message"),
        [
            ([np.ones((4, 3), np.float32)], "ended after 4 of 5"),
            ([], "ended after 0 of 5"),
            ([np.ones((4, 3), np.float32)] * 2, "expected 5 keys"),
            ([np.ones((4, 3), np.float32), np.ones((1, 2), np.float32)], "dimension 2"),
            ([np.ones((4, 3), np.float32), np.full((1, 3), np.nan, np.float32)], "row 4"),
            ([np.ones((5, 3), np.int64)], "float16, float32 or float64"),
        ],
    )
    def test_streams_that_break_their_word_are_refused(
        self, retriever: Retriever, chunks: list[ndarray], message: str
    ) -> None:
        """Too few rows, too many, other dimensions, and numbers that are none, named by their place in the stream."""
        with pytest.raises(InvalidInputError, match=message):
            retriever.build_from(lambda: chunks, (5, 3))

    def test_keys_can_be_added_or_it_says_what_to_do(self, retriever: Retriever) -> None:
        """Ids go on from n, and the index that was there is the same as before."""
        rng = np.random.default_rng(8)
        keys, more = (rng.normal(size=(n, 12)).astype(np.float32) for n in (45, 15))
        index = retriever.build(keys)
        before = index.search(keys[:5], 4)
        if not self.adds:
            with pytest.raises(InvalidInputError, match="build"):
                index.add(more)
            return
        both = index.add(more[:6]).add(more[6:].astype(np.float64))
        assert (index.shape, both.shape) == ((45, 12), (60, 12))
        everything = np.concatenate([keys, more])
        self.check(everything, more[:5], both.search(more[:5], 60))
        assert self.exact or (both.search(more, 3).ids >= 45).any(axis=1).mean() >= self.recall_floor
        after = index.search(keys[:5], 4)
        np.testing.assert_array_equal(after.ids, before.ids)
        assert index.add(more[:0]).shape == (45, 12)
        with pytest.raises(InvalidInputError, match="dimension 3"):
            index.add(more[:, :3])

    def test_all_rows_can_be_asked_for(self, retriever: Retriever) -> None:
        """With k = n every id comes back once."""
        keys = np.random.default_rng(1).normal(size=(20, 8)).astype(np.float32)
        found = retriever.build(keys).search(keys[:3], 20)
        self.check(keys, keys[:3], found)
        np.testing.assert_array_equal(np.sort(found.ids, axis=1), np.tile(np.arange(20), (3, 1)))

    def test_equal_keys_come_by_id(self, retriever: Retriever) -> None:
        """Among duplicates the lower id comes first."""
        rng = np.random.default_rng(2)
        keys = rng.normal(size=(6, 33)).astype(np.float32)[[0, 1, 2, 1, 3, 1, 4, 1, 5]]
        found = retriever.build(keys).search(keys[[1]], 4)
        np.testing.assert_array_equal(found.ids, [[1, 3, 5, 7]])
        assert (np.abs(found.distances) <= self.relative_error * 100).all()

    def test_one_row_and_one_dimension(self, retriever: Retriever) -> None:
        """The smallest index there is."""
        found = retriever.build(np.array([[3.0]], np.float32)).search(np.array([[1.0], [3.0]], np.float32), 1)
        np.testing.assert_array_equal(found.ids, [[0], [0]])
        assert (np.abs(found.distances - [[4.0], [0.0]]) <= self.relative_error * 10).all()

    def test_no_queries(self, retriever: Retriever) -> None:
        """An empty batch has an empty answer."""
        found = retriever.build(np.eye(3, dtype=np.float32)).search(np.empty((0, 3), np.float32), 2)
        assert found.ids.shape == found.distances.shape == (0, 2)

    @pytest.mark.parametrize("form", ["float16", "float64", "fortran", "strided", "big-endian", "memory map"])
    def test_every_form_of_array_is_taken(self, retriever: Retriever, form: str, tmp_path: Path) -> None:
        """Half and double precision, any layout, and read-only memory maps, for keys and queries alike."""
        plain = np.random.default_rng(3).normal(size=(40, 24)).astype(np.float16).astype(np.float32)
        match form:
            case "float16" | "float64":
                keys: ndarray = plain.astype(form)
            case "fortran":
                keys = np.asfortranarray(plain)
            case "strided":
                keys = np.repeat(plain, 2, axis=1)[:, ::2]
            case "big-endian":
                keys = plain.astype(">f4")
            case _:
                np.save(tmp_path / "keys.npy", plain.astype(np.float16))
                keys = np.load(tmp_path / "keys.npy", mmap_mode="r")
        self.check(plain, plain[:5], retriever.build(keys).search(keys[:5], 4))

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            (np.zeros((0, 4), np.float32), "no keys"),
            (np.zeros((3, 0), np.float32), "dimension"),
            (np.zeros(4, np.float32), "shape"),
            (np.zeros((2, 3, 4), np.float32), "flatten"),
            (np.zeros((3, 4), np.int64), "float16, float32 or float64"),
            (np.array([[0, 1], [0, np.nan]], np.float32), "row 1"),
            (np.array([[np.inf, 1], [0, 0]], np.float16), "row 0"),
            (np.array([[0, 0], [-1e300, 0]]), "row 1"),
        ],
    )
    def test_keys_that_cannot_be_searched_are_refused(self, retriever: Retriever, keys: ndarray, message: str) -> None:
        """Before the backend sees them, by an error that names what is wrong."""
        with pytest.raises(InvalidInputError, match=message):
            retriever.build(keys)

    @pytest.mark.parametrize(
        ("queries", "k", "message"),
        [
            (np.zeros((1, 3), np.float32), 0, "asked for 0"),
            (np.zeros((1, 3), np.float32), 6, "5 rows"),
            (np.zeros((1, 4), np.float32), 1, "dimension 4, the keys have 3"),
            (np.zeros(3, np.float32), 1, "shape"),
            (np.array([[0, np.nan, 0]], np.float32), 1, "row 0"),
            (np.zeros((1, 3), np.int32), 1, "int32"),
        ],
    )
    def test_queries_that_cannot_be_answered_are_refused(
        self, retriever: Retriever, queries: ndarray, k: int, message: str
    ) -> None:
        """Before the backend sees them, by an error that names what is wrong."""
        with pytest.raises(InvalidInputError, match=message):
            retriever.build(np.eye(5, 3, dtype=np.float32)).search(queries, k)

    def test_batches_do_not_matter(self, retriever: Retriever) -> None:
        """A query's neighbours are the same whatever else is in its batch."""
        if not self.exact:
            pytest.skip("an approximate index may answer differently in another batch")
        keys = 100 + np.random.default_rng(4).normal(size=(70, 300)).astype(np.float32)
        index = retriever.build(keys)
        together = index.search(keys[:9] + 0.5, 7)
        for i in range(9):
            alone = index.search(keys[i : i + 1] + 0.5, 7)
            np.testing.assert_array_equal(alone.ids[0], together.ids[i])
            np.testing.assert_array_equal(alone.distances[0], together.distances[i])

    def test_threads_may_search_at_the_same_time(self, retriever: Retriever) -> None:
        """And get what each would have got alone; no thread count of the process is another afterwards."""
        keys = np.random.default_rng(10).normal(size=(300, 64)).astype(np.float32)
        index, threads = retriever.build(keys), torch.get_num_threads()
        batches = [keys[i : i + 5] + 0.1 for i in range(0, 200, 5)]
        alone = [index.search(batch, 5) for batch in batches]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(index.search, batches, repeat(5)))
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a.ids, b.ids)
            np.testing.assert_array_equal(a.distances, b.distances)
        assert torch.get_num_threads() == threads

    def test_a_forked_child_may_search(self, retriever: Retriever) -> None:
        """After its parent has searched on several threads: an answer, the same one, and no waiting for ever."""
        keys = np.random.default_rng(11).normal(size=(500, 256)).astype(np.float32)
        index, threads = retriever.build(keys), torch.get_num_threads()

        def child() -> bool:
            found = index.search(keys[:64] + 0.1, 5)
            return np.array_equal(found.ids, before.ids) and torch.get_num_threads() == 2

        torch.set_num_threads(2)
        try:
            before = index.search(keys[:64] + 0.1, 5)
            assert in_fork(child), "the child found something else, or its thread count was not put back"
        finally:
            torch.set_num_threads(threads)

    def test_saved_and_loaded_it_answers_the_same(self, retriever: Retriever, tmp_path: Path) -> None:
        """Into a new folder, over an older index, and over itself."""
        keys = 50 + np.random.default_rng(5).normal(size=(60, 40)).astype(np.float32)
        index, path = retriever.build(keys), tmp_path / "deep" / "index"
        before = index.search(keys[:6] + 0.1, 5)
        retriever.build(keys[:7]).save(path)
        index.save(path)
        for _ in range(2):
            index = retriever.load(path)
            assert index.shape == keys.shape
            after = index.search(keys[:6] + 0.1, 5)
            np.testing.assert_array_equal(after.ids, before.ids)
            np.testing.assert_array_equal(after.distances, before.distances)
            index.save(path)
        assert [p.name for p in path.parent.iterdir()] == ["index"], "a temporary folder was left behind"

    def test_a_full_disk_is_an_error(self, retriever: Retriever, tmp_path: Path) -> None:
        """Neither a dead process nor half an index that passes for a whole one; what lay there before stays."""
        resource = pytest.importorskip("resource", reason="this system does not limit the size of files")
        keys = np.random.default_rng(12).normal(size=(2000, 24)).astype(np.float32)
        index, path = retriever.build(keys), tmp_path / "index"
        retriever.build(keys[:7]).save(path)

        def child() -> bool:
            resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))  # less than a buffer, which reaches the disk last
            try:
                index.save(path)
            except KnowledgeBaseError as e:
                return "cannot be written" in str(e)
            return False

        assert in_fork(child), "it was saved where there is no room"
        assert [p.name for p in tmp_path.iterdir()] == ["index"], "a temporary folder was left behind"
        assert retriever.load(path).shape == (7, 24)

    def test_an_index_of_other_rows_is_refused(self, retriever: Retriever, tmp_path: Path) -> None:
        """What it was bound to when saved is compared by whoever knows what it should be."""
        index = retriever.build(np.eye(3, dtype=np.float32))
        index.save(tmp_path / "bound", bound_to="a1")
        index.save(tmp_path / "free")
        for path, bound_to in (("bound", "a1"), ("bound", None), ("free", None), ("free", "")):
            assert retriever.load(tmp_path / path, bound_to=bound_to).shape == (3, 3)
        for path, bound_to in (("bound", "b2"), ("bound", ""), ("free", "a1")):
            with pytest.raises(KnowledgeBaseError, match="stale"):
                retriever.load(tmp_path / path, bound_to=bound_to)

    def test_keys_need_not_be_written_twice(self, retriever: Retriever, tmp_path: Path) -> None:
        """An index saved without its keys needs them to be loaded, if it needs them at all."""
        keys = np.random.default_rng(9).normal(size=(50, 20)).astype(np.float32)
        index = retriever.build(keys)
        before = index.search(keys[:4] + 0.1, 5)
        index.save(tmp_path / "index", with_keys=False)
        if index.stored_keys is not None:
            with pytest.raises(KnowledgeBaseError, match="without its keys"):
                retriever.load(tmp_path / "index")
        with pytest.raises(KnowledgeBaseError, match=r"\(49, 20\)"):
            retriever.load(tmp_path / "index", keys=keys[:49])
        after = retriever.load(tmp_path / "index", keys=keys).search(keys[:4] + 0.1, 5)
        np.testing.assert_array_equal(after.ids, before.ids)
        np.testing.assert_array_equal(after.distances, before.distances)

    def test_a_folder_with_other_files_is_not_overwritten(self, retriever: Retriever, tmp_path: Path) -> None:
        """Neither a stranger's folder, nor one that holds more than an index."""
        index = retriever.build(np.eye(3, dtype=np.float32))
        index.save(tmp_path / "a")
        for folder in (tmp_path / "a", tmp_path / "b"):
            folder.mkdir(exist_ok=True)
            (folder / "thesis.txt").write_text("ten years of work")
            with pytest.raises(InvalidInputError, match="save to another place"):
                index.save(folder)
            assert (folder / "thesis.txt").read_text() == "ten years of work"

    def test_what_is_not_an_index_is_refused(self, retriever: Retriever, tmp_path: Path) -> None:
        """Nothing there, no manifest, a manifest that is none, another kind of index, names that lead elsewhere."""
        with pytest.raises(KnowledgeBaseError, match="no index"):
            retriever.load(tmp_path / "nothing")
        with pytest.raises(KnowledgeBaseError, match="no index"):
            retriever.load(tmp_path)
        path = tmp_path / "index"
        retriever.build(np.eye(3, dtype=np.float32)).save(path)
        manifest: dict[str, Any] = json.loads((path / "index.json").read_text())
        name, said = next(iter(manifest["files"].items()))
        for wrong in (
            [],
            {},
            manifest | {"format": 99},
            manifest | {"index": "Foreign"},
            manifest | {"shape": [7, 3]},
            manifest | {"files": {f"../index/{name}": said}},
            manifest | {"files": {"lost": said}},
            manifest | {"files": []},
        ):
            (path / "index.json").write_text(json.dumps(wrong))
            with pytest.raises(KnowledgeBaseError):
                retriever.load(path)
        (path / "index.json").write_text("{")
        with pytest.raises(KnowledgeBaseError, match="does not describe an index"):
            retriever.load(path)

    @pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
    def test_a_damaged_file_is_named(self, retriever: Retriever, damage: str, tmp_path: Path) -> None:
        """One flipped bit in any file is enough."""
        path = tmp_path / "index"
        retriever.build(np.random.default_rng(6).normal(size=(30, 16)).astype(np.float32)).save(path)
        for file in [p for p in path.iterdir() if p.name != "index.json"]:
            whole = file.read_bytes()
            if damage == "remove":
                file.unlink()
            else:
                middle = len(whole) // 2
                flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
                file.write_bytes(flipped if damage == "flip" else whole[:-1])
            with pytest.raises(KnowledgeBaseError, match=file.name):
                retriever.load(path)
            file.write_bytes(whole)
        retriever.load(path)
