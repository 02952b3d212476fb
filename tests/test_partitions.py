"""Indexes beside a table: built once, found again, never of other rows, never trusted when damaged."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from redi.backends import Exact, Faiss, Index, Keys, Retriever, Stored
from redi.backends.exact import ExactIndex
from redi.engine import ReDiEngine
from redi.errors import ReDiError
from redi.knowledge_base import KnowledgeBase
from redi.partitions import PartitionKeys, indexes, open_partition
from redi.plan import Plan
from redi.solvers import DiffusersSolver
from redi.testing.retriever import in_fork
from tests.worlds import Curved, World, world

PLAN = Plan.coarse(4, 12)


@dataclass(frozen=True)
class Counted(Retriever):
    """Exact search that remembers what it was made to do."""

    index_type: ClassVar[type[Index]] = ExactIndex
    done: ClassVar[list[str]] = []

    def _build(self, keys: Keys) -> Index:
        self.done.append("build")
        return Exact()._build(keys)

    def _load(self, folder: Path, keys: Stored | None) -> Index:
        self.done.append("load")
        return Exact()._load(folder, keys)


@pytest.fixture
def w(tmp_path: Path) -> World:
    Counted.done.clear()
    return world(
        tmp_path / "kb", DiffusersSolver.from_config("DPMSolverMultistepScheduler", {}), PLAN, Curved(), noises=3
    )


def found(kb: KnowledgeBase, retriever: Retriever | None) -> np.ndarray:
    """Ids of the five rows nearest to row 0's key under each noise."""
    table = ReDiEngine.serving(kb, PLAN, retriever=retriever)[0].table
    ids, _ = table.search(table.derived["key.0"][[0, 0, 0]].float(), torch.arange(3), 0, 5)
    return ids.numpy()


def test_an_index_is_built_once_and_found_again(w: World) -> None:
    first = found(w.kb, Counted())
    assert Counted.done == ["build"] * 3
    again = found(KnowledgeBase.open(w.kb.path), Counted())
    assert Counted.done == ["build"] * 3 + ["load"] * 3
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, found(w.kb, None))
    [kept] = [i for i in indexes(w.kb.path) if i["retriever"] == "Counted()"]
    assert kept["partitions"] == 3
    assert kept["bytes"] > 0


@pytest.mark.parametrize("damage", ["flip", "other rows", "another noise's", "another recipe's", "rubbish", "missing"])
def test_what_is_not_the_index_of_these_rows_is_built_again(w: World, damage: str) -> None:
    before = found(w.kb, Counted())
    places = sorted(p.parent for p in w.kb.path.glob("derived/*/indexes/*/*/index.json"))
    assert len(places) == 3
    match damage:
        case "flip":
            file = places[0] / "norms.npy"
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        case "other rows":  # as whole as can be, but bound to another table
            shutil.rmtree(places[0])
            index = Exact().build(np.random.default_rng(0).normal(size=(8, 32)).astype(np.float32))
            index.save(places[0], bound_to="0" * 32, with_keys=False)
        case "another noise's":  # of the same table and of as many rows
            shutil.rmtree(places[0])
            shutil.copytree(places[1], places[0])
        case "another recipe's":
            found(w.kb, Exact(chunk_bytes=1 << 16))
            [other] = [r for r in w.kb.path.glob("derived/*/indexes/*/retriever.json") if "65536" in r.read_text()]
            shutil.rmtree(places[0])
            shutil.copytree(other.parent / places[0].name, places[0])
        case "rubbish":
            (places[0] / "index.json").write_text("{")
        case _:
            shutil.rmtree(places[0])
    Counted.done.clear()
    np.testing.assert_array_equal(found(w.kb, Counted()), before)
    assert sorted(Counted.done) == ["build", "load", "load"]
    Counted.done.clear()
    found(w.kb, Counted())
    assert Counted.done == ["load"] * 3, "it was not kept"


def test_keys_of_scattered_rows_are_those_rows(tmp_path: Path) -> None:
    table = torch.randn(20, 3, dtype=torch.float16)
    scattered = PartitionKeys(table, torch.tensor([1, 4, 5, 19]))
    together = PartitionKeys(table, torch.arange(4, 9))
    for keys in (scattered, together):
        expected = table[keys.ids].numpy()
        assert keys.shape == expected.shape
        np.testing.assert_array_equal(np.concatenate(list(keys.chunks())), expected)
        np.testing.assert_array_equal(keys[np.array([3, 0])], expected[[3, 0]])
    [whole] = together.chunks()
    assert np.shares_memory(whole, table.numpy()), "rows that lie together were copied"
    Exact().build(whole).save(tmp_path / "index", with_keys=False)
    index = Exact().load(tmp_path / "index", keys=together.stored())
    assert isinstance(index, ExactIndex)
    assert np.shares_memory(index.keys.numpy(), table.numpy()), "a loaded index copied them"
    assert scattered.stored() is scattered


def test_a_retriever_that_cannot_be_named_is_not_kept(w: World) -> None:
    class Nameless(Retriever):
        index_type = ExactIndex

        def _build(self, keys: Keys) -> Index:
            return Exact()._build(keys)

        def _load(self, folder: Path, keys: Stored | None) -> Index:
            raise ReDiError("never asked")

    np.testing.assert_array_equal(found(w.kb, Nameless()), found(w.kb, None))
    assert not [i for i in indexes(w.kb.path) if "Nameless" in i["retriever"]]


def test_many_may_build_the_same_index_at_once(w: World) -> None:
    """Readers, writers and those who delete what they could not read: everybody is served, and one index stays."""
    expected = found(w.kb, Counted())
    table = ReDiEngine.serving(w.kb, PLAN, retriever=Counted())[0].table
    query, ids = table.derived["key.0"][0].float().numpy()[None], torch.arange(8)

    def serve(turn: int) -> np.ndarray:
        if turn % 5 == 0:
            shutil.rmtree(next(w.kb.path.glob("derived/*/indexes/*/key.0-0"), w.kb.path / "none"), ignore_errors=True)
        return open_partition(table.derived, "key.0", 0, ids, Counted()).index.search(query, 5).ids[0]

    with ThreadPoolExecutor(8) as pool:
        for answer in pool.map(serve, range(200)):
            np.testing.assert_array_equal(answer, expected[0])
    assert not list(w.kb.path.glob("derived/*/indexes/*/.*")), "a temporary folder was left behind"


def test_a_full_disk_keeps_nobody_from_searching(w: World) -> None:
    resource = pytest.importorskip("resource", reason="this system does not limit the size of files")
    pytest.importorskip("faiss", reason="faiss is not installed")
    expected = found(w.kb, Exact())  # the table is there, the index is not

    def child() -> bool:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
        return np.array_equal(found(w.kb, Faiss()), expected)

    assert in_fork(child)
    assert not [i for i in indexes(w.kb.path) if "Faiss" in i["retriever"] and i["partitions"]]
