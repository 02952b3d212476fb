"""What is damaged can be taken out, and costs nothing else; folders that were copied or edited are as good as whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redi.errors import KnowledgeBaseError
from redi.knowledge_base import KnowledgeBase, Writer, drop_damaged, verify
from redi.types import Rows
from tests.knowledge_base.samples import config, make, rows, same

SHARDS = ["00000", "00001", "00002"]
DAMAGES = ["flipped", "truncated", "missing", "link", "folder", "empty"]


def spoil(file: Path, how: str) -> None:
    content = file.read_bytes()
    match how:
        case "flipped":
            file.write_bytes(content[:-2] + bytes([content[-2] ^ 4]) + content[-1:])
        case "truncated":
            file.write_bytes(content[:-3])
        case "empty":
            file.write_bytes(b"")
        case _:
            file.unlink()
    if how == "link":
        (file.parents[2] / "elsewhere").write_bytes(content)
        file.symlink_to(file.parents[2] / "elsewhere")
    if how == "folder":
        file.mkdir()


def everything(kb: KnowledgeBase) -> Rows:
    return kb.gather(torch.arange(len(kb)))


def in_order(kb: KnowledgeBase) -> Rows:
    """All rows in the order of the endless sequence they are from."""
    of = [int(p.split()[1].rstrip(",")) * 3 + n for p, n in zip(kb.prompts, kb.noise_ids.tolist(), strict=True)]
    return kb.gather(torch.tensor(of).argsort())


@given(
    st.dictionaries(
        st.tuples(st.sampled_from(SHARDS), st.sampled_from(["safetensors", "prompts.json"])),
        st.sampled_from(DAMAGES),
        min_size=1,
    )
)
@settings(max_examples=15)
def test_only_damaged_shards_go_and_a_build_fills_them_again(
    tmp_path_factory: pytest.TempPathFactory, damages: dict[tuple[str, str], str]
) -> None:
    path, of = tmp_path_factory.mktemp("repair") / "kb", config()
    make(path, of)  # 8, 8 and 4 rows
    for (shard, part), how in damages.items():
        spoil(path / "shards" / f"{shard}.{part}", how)
    lost = {shard for shard, _ in damages}
    kept = [i for i in range(20) if SHARDS[i // 8] not in lost]
    dropped = drop_damaged(path)
    assert set(dropped.shards) == lost
    assert dropped.rows == 20 - len(kept)
    assert {p.file for p in dropped.found.problems} == {f"shards/{shard}.{part}" for shard, part in damages}
    report = verify(path)
    assert (report.ok, report.rows, report.ignored) == (True, len(kept), ())
    with Writer.open(path, of, 8) as writer:
        assert len(writer.done) == len(kept)
        writer.append(rows(of, 0, 20))
        assert writer.skipped == len(kept)
    kb = KnowledgeBase.open(path)
    assert kb.verify().ok
    assert same(in_order(kb), rows(of, 0, 20), of.dtype)
    if "link" in damages.values():
        assert (path.parent / "elsewhere").exists()  # what a link led to is not ours


def test_what_is_whole_stays_as_it_is(tmp_path: Path) -> None:
    before = make(tmp_path).manifest_hash
    dropped = drop_damaged(tmp_path)
    assert (dropped.shards, dropped.rows, dropped.found.ok) == ((), 0, True)
    assert KnowledgeBase.open(tmp_path).manifest_hash == before


def test_a_damaged_table_goes_alone(tmp_path: Path) -> None:
    kb = make(tmp_path)
    tables = [kb.derive({"a": i}, lambda r: {"x": r.samples[0]}).path for i in range(2)]
    assert tables[0] is not None
    spoil(tables[0] / "table.safetensors", "flipped")
    dropped = drop_damaged(tmp_path)
    assert (dropped.shards, len(dropped.found.problems)) == ((), 1)
    assert [p is not None and p.exists() for p in tables] == [False, True]
    assert KnowledgeBase.open(tmp_path).manifest_hash == kb.manifest_hash


@pytest.mark.parametrize("file", ["config.json", "manifest.json"])
@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_without_configuration_or_manifest_nothing_is_deleted(tmp_path: Path, file: str, how: str) -> None:
    make(tmp_path)
    spoil(tmp_path / "shards" / "00001.safetensors", "flipped")
    spoil(tmp_path / file, how)
    before = {p: p.read_bytes() for p in (tmp_path / "shards").iterdir()}
    with pytest.raises(KnowledgeBaseError, match=rf"{file} damaged, without which no shard can be trusted"):
        drop_damaged(tmp_path)
    assert {p: p.read_bytes() for p in (tmp_path / "shards").iterdir()} == before
    with pytest.raises(KnowledgeBaseError, match="is not a folder"):
        drop_damaged(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_nothing_is_taken_out_while_another_writes(tmp_path: Path) -> None:
    make(tmp_path)
    spoil(tmp_path / "shards" / "00001.safetensors", "flipped")
    with (
        Writer.open(tmp_path, config()),
        pytest.raises(KnowledgeBaseError, match=f"is being written by process {os.getpid()}"),
    ):
        drop_damaged(tmp_path)
    assert drop_damaged(tmp_path).shards == ("00001",)


def test_a_crash_while_it_is_taken_out_leaves_what_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    spoil(tmp_path / "shards" / "00001.safetensors", "flipped")

    def crash(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", crash)
        with pytest.raises(KnowledgeBaseError, match="No space left"):
            drop_damaged(tmp_path)
    report = verify(tmp_path)
    assert (report.ok, report.rows) == (True, 12)
    Writer.open(tmp_path, config()).close()
    assert not verify(tmp_path).ignored


def test_the_error_of_a_damaged_shard_says_what_to_do(tmp_path: Path) -> None:
    make(tmp_path)
    spoil(tmp_path / "shards" / "00001.safetensors", "truncated")
    with pytest.raises(KnowledgeBaseError, match=r"redi verify .* --drop, and build on"):
        Writer.open(tmp_path, config())
    spoil(tmp_path / "config.json", "flipped")
    with pytest.raises(KnowledgeBaseError, match="restore these files, or build it anew"):
        KnowledgeBase.open(tmp_path)


@pytest.mark.parametrize("first", ["manifest.json", "shards"])
def test_a_copy_made_during_a_build_is_whole_or_says_what_is_missing(tmp_path: Path, first: str) -> None:
    """Copying takes its time, and the build goes on meanwhile."""
    source, copy, of = tmp_path / "kb", tmp_path / "copy", config()
    with Writer.open(source, of, 4) as writer:
        writer.append(rows(of, 0, 6))  # one shard, and two rows in memory
        copy.mkdir()
        names = sorted((p.name for p in source.iterdir()), key=lambda name: (name != first, name))
        for name in names:
            (shutil.copytree if (source / name).is_dir() else shutil.copy)(source / name, copy / name)
            writer.append(rows(of, len(writer.done) + 2, len(writer.done) + 6))  # another shard
    if first == "shards":
        with pytest.raises(KnowledgeBaseError, match=r"00001\.safetensors: missing"):
            KnowledgeBase.open(copy)
        assert drop_damaged(copy).rows > 0
    assert verify(copy).ok
    kb = KnowledgeBase.open(copy)
    assert same(in_order(kb), rows(of, 0, len(kb)), of.dtype)
    with Writer.open(copy, of, 4) as writer:
        writer.append(rows(of, 0, 10))
    assert same(in_order(KnowledgeBase.open(copy)), rows(of, 0, 10), of.dtype)
    assert verify(copy).ok
    assert not verify(copy).ignored


@pytest.mark.parametrize("when", [0.0, 4e9])
def test_clocks_do_not_matter(tmp_path: Path, when: float) -> None:
    """A clock that went backwards, or files from the future."""
    of = config()
    with Writer.open(tmp_path, of, 4) as writer:
        writer.append(rows(of, 0, 10))
    before = KnowledgeBase.open(tmp_path).derive({"a": 1}, lambda r: {"x": r.samples[0]})
    for file in [tmp_path, *tmp_path.rglob("*")]:
        os.utime(file, (when, when))
    kb = KnowledgeBase.open(tmp_path)
    assert verify(tmp_path).ok
    again = kb.derive({"a": 1}, lambda r: pytest.fail("it is there"))
    assert torch.equal(again["x"], before["x"])
    with Writer.open(tmp_path, of, 4) as writer:
        writer.append(rows(of, 0, 12))
        assert writer.skipped == 10
    assert same(everything(KnowledgeBase.open(tmp_path)), rows(of, 0, 12), of.dtype)
