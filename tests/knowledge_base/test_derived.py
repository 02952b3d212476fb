"""Derived tables: computed once, bound to the manifest, rebuilt rather than trusted."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from redi.errors import InvalidInputError, KnowledgeBaseError
from redi.knowledge_base import Derived, KnowledgeBase, Writer, verify
from redi.types import Rows
from tests.knowledge_base.samples import config, make, rows

RECIPE = {"plan": "coarse:8/40", "called": [True, False], "ridge": 0.1, "floor": -float("inf")}


class Counted:
    """Keys and defects of rows, and how many rows were asked for."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, given: Rows) -> Mapping[str, Tensor]:
        self.rows += len(given)
        return {
            "key.0": given.denoised[0].float().flatten(1),
            "defect": torch.stack([given.samples[40] - given.samples[0], given.samples[5]], 1),
            "id": given.noise_ids,
            "wide": given.denoised[5].double(),
            "short": given.denoised[5].bfloat16(),
        }


def right(table: Derived, of: KnowledgeBase) -> bool:
    expected = Counted()(of.gather(torch.arange(len(of))))
    return (
        table.names == tuple(sorted(expected))
        and len(table) == len(of)
        and all(torch.equal(table[n], t) and table[n].dtype == t.dtype for n, t in expected.items())
    )


@given(st.integers(1, 25), st.integers(1, 9))
def test_the_same_table_whatever_the_chunks(
    tmp_path_factory: pytest.TempPathFactory, chunk_rows: int, shard_rows: int
) -> None:
    kb = make(tmp_path_factory.mktemp("kb"), count=11, shard_rows=shard_rows)
    assert right(kb.derive(RECIPE, Counted(), chunk_rows), kb)


def test_computed_once(tmp_path: Path) -> None:
    kb, compute = make(tmp_path), Counted()
    first = kb.derive(RECIPE, compute)
    again = KnowledgeBase.open(tmp_path).derive(dict(reversed(RECIPE.items())), compute)
    assert compute.rows == 20
    assert first.path == again.path
    assert again.path is not None
    assert again.path.parent == tmp_path / "derived"
    assert right(again, kb)
    assert again.recipe == first.recipe
    other = kb.derive(RECIPE | {"ridge": 0.2}, compute)
    assert compute.rows == 40
    assert other.path != first.path
    assert {d.name for d in (tmp_path / "derived").iterdir()} == {first.path.name, other.path.name}


def test_gather(tmp_path: Path) -> None:
    kb = make(tmp_path)
    table = kb.derive(RECIPE, Counted())
    ids = torch.tensor([[3, 19, 0], [7, 7, 8]])
    for name in table.names:
        assert torch.equal(table.gather(name, ids), table[name][ids])
    gathered = table.gather("defect", ids)
    gathered.zero_()
    assert right(table, kb)
    for bad in ([[-1]], [[20]]):
        with pytest.raises(InvalidInputError, match=r"row ids must be 0 … 19"):
            table.gather("defect", torch.tensor(bad))
    with pytest.raises(InvalidInputError, match="expected one of defect"):
        table.gather("defects", ids)


def test_after_growth_it_is_computed_again_and_the_old_one_goes(tmp_path: Path) -> None:
    kb, compute = make(tmp_path), Counted()
    old = kb.derive(RECIPE, compute)
    with Writer.open(tmp_path, kb.config) as writer:
        writer.append(rows(kb.config, 20, 23))
    grown = KnowledgeBase.open(tmp_path)
    assert [d["current"] for d in grown.info()["derived"]] == [False]
    new = grown.derive(RECIPE, compute)
    assert compute.rows == 43
    assert right(new, grown)
    assert old.path is not None
    assert not old.path.exists()
    assert right(old, kb)  # whoever has it mapped still has it
    again = kb.derive(RECIPE, compute)  # an old view gets its own table and leaves the new one alone
    assert right(again, kb)
    assert new.path is not None
    assert new.path.exists()


@pytest.mark.parametrize("file", ["table.safetensors", "recipe.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "add", "gone", "empty", "link", "folder"])
def test_a_damaged_table_is_computed_again(tmp_path: Path, file: str, how: str) -> None:
    kb, compute = make(tmp_path / "kb"), Counted()
    folder = kb.derive(RECIPE, compute).path
    assert folder is not None
    path = folder / file
    content = path.read_bytes()
    path.unlink()
    match how:
        case "flip":
            for at in range(0, len(content), 97):
                path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
                assert not verify(kb.path).ok
                if at % (97 * 10) == 0:
                    before = compute.rows
                    assert right(kb.derive(RECIPE, compute), kb)
                    assert compute.rows == before + 20
            path.write_bytes(content[:50] + b"\xff" + content[51:])
        case "cut":
            path.write_bytes(content[:-7])
        case "add":
            path.write_bytes(content + b" x")
        case "empty":
            path.write_bytes(b"")
        case "link":
            (tmp_path / "elsewhere").write_bytes(content)
            path.symlink_to(tmp_path / "elsewhere")
        case "folder":
            path.mkdir()
        case _:
            pass
    (problem,) = verify(kb.path).problems
    assert problem.file == f"derived/{folder.name}"
    assert "delete this folder" in problem.what
    before = compute.rows
    assert right(kb.derive(RECIPE, compute), kb)
    assert compute.rows == before + 20
    assert verify(kb.path).ok
    kb.derive(RECIPE, compute)
    assert compute.rows == before + 20


def test_a_table_of_another_knowledge_base_is_not_served(tmp_path: Path) -> None:
    kb, other = make(tmp_path / "a"), make(tmp_path / "b", config(guidance=9.0), count=12)
    mine, theirs = kb.derive(RECIPE, Counted()).path, other.derive(RECIPE, Counted()).path
    assert mine is not None
    assert theirs is not None
    shutil.rmtree(mine)
    shutil.copytree(theirs, mine)
    assert right(kb.derive(RECIPE, Counted()), kb)


def test_rows_that_come_out_not_finite_are_named(tmp_path: Path) -> None:
    kb = make(tmp_path)

    def compute(given: Rows) -> dict[str, Tensor]:
        key = given.denoised[0].float().flatten(1)
        key[given.noise_ids == 2, 0] = float("nan")
        return {"key": key}

    with pytest.raises(InvalidInputError, match=r"'key' is not finite in 2 rows: 2, 5$"):
        kb.derive(RECIPE, compute, chunk_rows=7)
    assert not list((tmp_path / "derived").iterdir())
    assert right(kb.derive(RECIPE, Counted()), kb)


def test_what_compute_owes(tmp_path: Path) -> None:
    kb = make(tmp_path)
    calls = iter(range(100))
    bad = {
        "first dimension": lambda r: {"a": r.samples[0][:1]},
        "named by letters": lambda r: {"../a": r.samples[0]},
        "needs tensors": lambda r: {},
        "alike in every chunk": lambda r: {f"a{next(calls)}": r.samples[0]},
    }
    for said, compute in bad.items():
        with pytest.raises(InvalidInputError, match=said):
            kb.derive(RECIPE, compute, chunk_rows=5)
    with pytest.raises(InvalidInputError, match=r"recipe\.f must be JSON"):
        kb.derive({"f": print}, Counted())
    assert not list((tmp_path / "derived").iterdir())


def test_a_recipe_with_other_types_is_another_recipe(tmp_path: Path) -> None:
    kb, compute = make(tmp_path), Counted()
    recipes = [{"a": 1}, {"a": "1"}, {"a": [1]}, {"a": None}, {"b": 1}, {}]
    assert len({kb.derive(r, compute).path for r in recipes}) == len(recipes)
    assert kb.derive({"a": (1,)}, compute).path == kb.derive({"a": [1]}, compute).path
    assert compute.rows == 20 * len(recipes)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs POSIX users")
def test_a_folder_that_cannot_be_written_serves_from_memory() -> None:
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kb"
        kb, compute = make(path), Counted()
        Path(folder).chmod(0o755)
        path.chmod(0o555)
        try:
            if root:  # whom no mode stops
                os.seteuid(65534)
            table = kb.derive(RECIPE, compute)
            assert table.path is None
            assert right(table, kb)
            assert torch.equal(table.gather("id", torch.tensor([[4]])), torch.tensor([[1]]))
            with pytest.raises(KnowledgeBaseError, match=r"cannot be written \(Permission denied\)"):
                Writer.open(path, kb.config)
        finally:
            if root:
                os.seteuid(0)
            path.chmod(0o755)
        assert not (path / "derived").exists()


def test_leftovers_of_the_dead_are_removed_and_of_the_living_are_not(tmp_path: Path) -> None:
    kb = make(tmp_path)
    for name, age in (("old", 2 * 24 * 3600), ("new", 60)):
        folder = tmp_path / "derived" / f"{name}.tmp"
        folder.mkdir(parents=True)
        (folder / "table.safetensors").write_bytes(b"half")
        then = time.time() - age
        for path in (folder / "table.safetensors", folder):
            os.utime(path, (then, then))
    kb.derive(RECIPE, Counted())
    assert sorted(p.name for p in (tmp_path / "derived").glob("*.tmp")) == ["new.tmp"]
    assert verify(tmp_path).ok


def test_a_linked_folder_is_refused(tmp_path: Path) -> None:
    kb = make(tmp_path / "kb")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "kb" / "derived").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KnowledgeBaseError, match="is a link"):
        kb.derive(RECIPE, Counted())
    assert not list((tmp_path / "elsewhere").iterdir())
