"""Whatever happens to the files is found, named, and never unpickled."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from redi.errors import KnowledgeBaseError
from redi.knowledge_base import KnowledgeBase, Writer, files, verify
from redi.knowledge_base.manifest import Manifest
from redi.knowledge_base.tensorfile import TensorFile
from tests.knowledge_base.samples import config, make, rows

SHARD, PROMPTS = "shards/00001.safetensors", "shards/00001.prompts.json"
FILES = ["config.json", "manifest.json", SHARD, PROMPTS, "shards/00000.safetensors", "shards/00002.prompts.json"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "kb"
    make(path)
    return path


@contextmanager
def copied(whole: Path) -> Generator[Path, None, None]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(whole, Path(folder) / "kb"))


def named(path: Path) -> dict[str, str]:
    report = verify(path)
    assert report.ok == (not report.problems)
    return {p.file: p.what for p in report.problems}


def opens(path: Path) -> str:
    try:
        KnowledgeBase.open(path)
    except KnowledgeBaseError as e:
        return str(e)
    return ""


@given(file=st.sampled_from(FILES), data=st.data())
@settings(max_examples=60)
def test_a_flipped_bit_anywhere_is_named(whole: Path, file: str, data: st.DataObject) -> None:
    with copied(whole) as path:
        content = bytearray((path / file).read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= 1 << data.draw(st.integers(0, 7))
        (path / file).write_bytes(content)
        assert set(named(path)) == {file}
        if not file.startswith("shards/"):
            assert file in opens(path)
        if file.endswith(".prompts.json"):
            with pytest.raises(KnowledgeBaseError, match=file):
                _ = KnowledgeBase.open(path).prompts


@given(file=st.sampled_from(FILES), data=st.data())
@settings(max_examples=40)
def test_a_truncated_or_extended_file_is_named_when_opened(whole: Path, file: str, data: st.DataObject) -> None:
    with copied(whole) as path:
        content = (path / file).read_bytes()
        cut = data.draw(st.integers(0, len(content) - 2))  # a JSON file may lose its last newline
        changed = content[:cut] if data.draw(st.booleans()) else content + b"x" * (cut + 1)
        (path / file).write_bytes(changed)
        assert file in opens(path)
        assert set(named(path)) == {file}


@given(st.sets(st.sampled_from(FILES), min_size=1))
def test_all_missing_files_are_named_at_once(whole: Path, gone: set[str]) -> None:
    with copied(whole) as path:
        for file in gone:
            (path / file).unlink()
        said = opens(path)
        if {"config.json", "manifest.json"} <= gone:
            assert "not a knowledge base" in said
        else:
            expected = {"manifest.json"} | (gone & {"config.json"}) if "manifest.json" in gone else gone
            assert {f for f in FILES if f"{f}: missing" in said} == expected
            assert set(named(path)) == expected


def test_no_knowledge_base_at_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(KnowledgeBaseError, match=r"not a (folder|knowledge base)"):
            KnowledgeBase.open(path)
        with pytest.raises(KnowledgeBaseError, match=r"not a (folder|knowledge base)"):
            verify(path)


def test_foreign_files(whole: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", config(guidance=4.0))
    with copied(whole) as path:  # the same sizes: only the hash tells
        shutil.copy(path / "shards/00000.safetensors", path / SHARD)
        assert opens(path) == ""
        assert "sha256" in named(path)[SHARD]
    with copied(whole) as path:
        shutil.copy(other.path / "config.json", path / "config.json")
        assert "config.json: is not the one manifest.json was written with" in opens(path)
        assert set(named(path)) == {"config.json"}
    with copied(whole) as path:
        (path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
        assert "config.json" in opens(path)


def forge(path: Path, change: Callable[[Manifest], Manifest]) -> None:
    """A manifest that is in order as far as its checksum goes."""
    manifest, _ = Manifest.read(path / "manifest.json")
    files.write(path / "manifest.json", change(manifest).to_bytes())


@pytest.mark.parametrize(
    "name",
    ["../../x", "/etc/passwd", "..", "", "00001/../00001", "00001\n", "0", "١٢٣٤٥", "00001.safetensors", "a" * 999],
)
def test_a_manifest_cannot_name_other_places(whole: Path, name: str) -> None:
    with copied(whole) as path:
        (path.parent / "x.safetensors").write_bytes((path / SHARD).read_bytes())
        forge(path, lambda m: replace(m, shards=(replace(m.shards[0], name=name), *m.shards[1:])))
        said = opens(path)
        assert "manifest.json: shard: a name is 5 to 9 digits" in said
        assert set(named(path)) == {"manifest.json"}


def test_a_manifest_that_promises_what_cannot_be(whole: Path) -> None:
    for change, said in [
        (lambda m: replace(m, shards=(*m.shards, m.shards[0])), "listed twice"),
        (lambda m: replace(m, layout=dict(m.layout) | {"extra": (2, 3)}), "extra is not recorded"),
        (lambda m: replace(m, layout={}), "sample.00000 is missing"),
        (lambda m: replace(m, layout=dict(m.layout) | {"sample.00000": (6,)}), "has shape (6,)"),
        (lambda m: replace(m, config="0" * 64), "is not the one manifest.json was written with"),
    ]:
        with copied(whole) as path:
            forge(path, change)
            assert said in opens(path)
            assert not verify(path).ok
    with copied(whole) as path:  # more rows than there are: sizes do not tell, headers do
        forge(path, lambda m: replace(m, shards=(replace(m.shards[0], rows=9), *m.shards[1:])))
        with pytest.raises(KnowledgeBaseError, match=r"00000\.safetensors.*not as promised"):
            next(KnowledgeBase.open(path).chunks())
        assert set(named(path)) == {"shards/00000.safetensors", "shards/00000.prompts.json"}


@pytest.mark.parametrize("file", [*FILES[:4], "shards"])
def test_links_are_refused(whole: Path, file: str) -> None:
    with copied(whole) as path:
        (path / file).rename(path.parent / "elsewhere")
        (path / file).symlink_to(path.parent / "elsewhere")
        assert f"{file}: is a link" in opens(path)
        assert set(named(path)) == {file}


def test_what_is_no_file_is_not_waited_for(whole: Path) -> None:
    with copied(whole) as path:
        (path / SHARD).unlink()
        os.mkfifo(path / SHARD)  # reading it would hang
        (path / PROMPTS).unlink()
        (path / PROMPTS).mkdir()
        said = opens(path)
        assert f"{SHARD}: is not a plain file" in said
        assert f"{PROMPTS}: is not a plain file" in said


class Bomb:
    def __init__(self, fuse: Path) -> None:
        self.fuse = fuse

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.fuse,))


def disguise(path: Path, file: str, content: bytes) -> None:
    """Put other content in the place of a listed file, and have the manifest vouch for it."""
    (path / file).write_bytes(content)
    (at,) = (i for i, _ in enumerate(Manifest.read(path / "manifest.json")[0].shards) if f"{i:05d}" in file)
    size, digest = len(content), files.digest(content)
    new = (
        {"bytes": size, "sha256": digest}
        if file.endswith("tensors")
        else {"prompts_bytes": size, "prompts_sha256": digest}
    )
    forge(
        path,
        lambda m: replace(m, shards=tuple(replace(s, **new) if i == at else s for i, s in enumerate(m.shards))),
    )


def test_a_pickle_in_disguise_is_refused_unopened(whole: Path, tmp_path: Path) -> None:
    fuse = tmp_path / "boom"
    torch.save({"sample.00000": Bomb(fuse)}, tmp_path / "zip")
    assert zipfile.is_zipfile(tmp_path / "zip")
    pickles = [pickle.dumps(Bomb(fuse), protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for content in [(tmp_path / "zip").read_bytes(), *pickles]:
        for file in (SHARD, PROMPTS):
            with copied(whole) as path:
                disguise(path, file, content)
                kb = KnowledgeBase.open(path)
                with pytest.raises(KnowledgeBaseError, match=file):
                    list(kb.chunks())
                with pytest.raises(KnowledgeBaseError, match=file):
                    kb.gather(torch.tensor([9]))
                assert set(named(path)) == {file}
    assert not fuse.exists()
    pickle.loads(pickles[0])
    assert fuse.exists()  # the bomb would have worked


def test_numbers_that_are_not_finite_and_rows_twice_are_found(whole: Path) -> None:
    with copied(whole) as path:
        content = bytearray((path / SHARD).read_bytes())
        entry = TensorFile(path / SHARD).entries["denoised.00005"]
        content[entry.start : entry.start + 2] = b"\x00\x7c"  # +∞ in half precision
        disguise(path, SHARD, bytes(content))
        assert named(path) == {SHARD: "denoised.00005 not finite"}
    with copied(whole) as path:
        disguise(path, SHARD, (path / "shards/00000.safetensors").read_bytes())
        disguise(path, PROMPTS, (path / "shards/00000.prompts.json").read_bytes())
        assert "occurs twice" in named(path)[SHARD]
    with copied(whole) as path:
        content = bytearray((path / SHARD).read_bytes())
        entry = TensorFile(path / SHARD).entries["noise_id"]
        content[entry.start] = 3
        disguise(path, SHARD, bytes(content))
        assert "not of a bank of 3" in named(path)[SHARD]


def test_unlisted_files_are_ignored_but_mentioned(whole: Path) -> None:
    with copied(whole) as path:
        (path / "shards/00003.safetensors").write_bytes(b"in flight")
        (path / "shards/00003.safetensors.tmp").write_bytes(b"in flight")
        report = verify(path)
        assert report.ok
        assert report.ignored == ("shards/00003.safetensors", "shards/00003.safetensors.tmp")
        with Writer.open(path, config(), 8) as writer:
            writer.append(rows(config(), 20, 21))
        report = verify(path)
        assert report.ok
        assert report.rows == 21
        assert not report.ignored


def test_progress_reaches_the_end(whole: Path) -> None:
    told: list[tuple[int, int]] = []
    report = KnowledgeBase.open(whole).verify(lambda done, total: told.append((done, total)))
    assert told[-1] == (report.bytes, report.bytes)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert report.to_json()["ok"] is True


def _reads(path: Path) -> dict[str, torch.Tensor] | None:
    """What the safetensors library makes of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        return None


def _bits(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    return {n: (t.dtype, tuple(t.shape), t.reshape(-1).view(torch.uint8).numpy().tobytes()) for n, t in tensors.items()}


_tensors = st.dictionaries(
    st.sampled_from(["a", "b.0", "ü", ""]),
    st.tuples(
        st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8]),
        st.lists(st.integers(0, 3), max_size=2),
    ).map(lambda d: torch.arange(math.prod(d[1])).reshape(d[1]).to(d[0])),
    min_size=1,
)


@given(_tensors, st.data())
@settings(max_examples=150)
def test_headers_are_read_as_the_safetensors_library_reads_them_or_refused(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("header") / "x.safetensors"
    content = bytearray(save(tensors, {"format": "pt"}))
    path.write_bytes(content)
    assert _bits(TensorFile(path).tensors) == _bits(tensors)
    header = 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, header - 1))] = data.draw(st.sampled_from(b'0123456789[]{},:"FIB\xff'))
    path.write_bytes(content)
    try:
        ours = TensorFile(path).tensors
    except KnowledgeBaseError as e:
        assert str(path) in str(e)  # noqa: PT017
        return
    theirs = _reads(path)
    assert theirs is not None
    assert _bits(ours) == _bits(theirs)


@given(st.binary(max_size=64).filter(lambda b: b.strip() != b"{}"), st.booleans())
def test_noise_is_no_tensor_file(tmp_path_factory: pytest.TempPathFactory, noise: bytes, sized: bool) -> None:
    path = tmp_path_factory.mktemp("noise") / "x.safetensors"
    path.write_bytes((len(noise).to_bytes(8, "little") if sized else b"") + noise)
    with pytest.raises(KnowledgeBaseError, match=r"x\.safetensors"):
        TensorFile(path)
