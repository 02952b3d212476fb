"""Joining: every row once, whatever overlaps; other settings and damaged parts are refused; interrupted, it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redi.errors import FingerprintMismatchError, InvalidInputError, KnowledgeBaseError
from redi.knowledge_base import KnowledgeBase, Merged, Writer, merge
from tests.knowledge_base.samples import config, make, rows, same

RANGES = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), min_size=1, max_size=4)


def write(path: Path, first: int, count: int, **changed: object) -> Path:
    of = config(**changed)
    with Writer.open(path, of, 4) as writer:
        writer.append(rows(of, first, first + count))
    return path


@given(RANGES, st.integers(1, 7))
def test_every_row_is_there_once_in_the_order_it_was_met(
    tmp_path_factory: pytest.TempPathFactory, ranges: list[tuple[int, int]], shard_rows: int
) -> None:
    folder, of = tmp_path_factory.mktemp("x"), config()
    parts = [write(folder / str(i), first, count) for i, (first, count) in enumerate(ranges)]
    order = list(dict.fromkeys(i for first, count in ranges for i in range(first, first + count)))
    seen: list[tuple[int, int]] = []
    done = merge(parts, folder / "out", shard_rows=shard_rows, progress=lambda *at: seen.append(at))
    total = sum(count for _, count in ranges)
    assert done == Merged(len(order), total - len(order))
    kb = KnowledgeBase.open(folder / "out")
    assert len(kb) == len(order)
    for j, i in enumerate(order):
        assert same(kb.gather(torch.tensor([j])), rows(of, i, i + 1), of.dtype)
    assert (kb.verify().ok, kb.verify().ignored) == (True, ())
    assert not seen or seen[-1] == (total, total)
    again = merge(parts, folder / "out", shard_rows=shard_rows)
    assert again == Merged(0, total)
    assert KnowledgeBase.open(folder / "out").manifest_hash == kb.manifest_hash


def test_the_models_name_may_differ_and_nothing_else(tmp_path: Path) -> None:
    a = write(tmp_path / "a", 0, 3)
    b = write(tmp_path / "b", 3, 3, model="/scratch/somewhere/else")
    assert merge([a, b], tmp_path / "out").added == 6
    assert KnowledgeBase.open(tmp_path / "out").fingerprint.model == "a/model"
    c = write(tmp_path / "c", 3, 3, guidance=4.0, storage="float32")
    with pytest.raises(FingerprintMismatchError, match="leave out") as caught:
        merge([a, c], tmp_path / "other")
    assert set(caught.value.differences) == {"guidance", "storage"}
    assert not (tmp_path / "other").exists()


def test_banks_of_other_sizes_are_joined_into_the_largest(tmp_path: Path) -> None:
    parts = [write(tmp_path / str(n), 0, 6, noises=n) for n in (2, 4, 3)]
    expected = {
        key
        for n in (2, 4, 3)
        for of in [rows(config(noises=n), 0, 6)]
        for key in zip(of.prompts, of.noise_ids.tolist(), strict=True)
    }
    for out, order in (("up", parts), ("down", parts[::-1])):
        merge(order[:1], tmp_path / out)  # and into one that is there
        assert merge(order, tmp_path / out).added == len(expected) - 6
        kb = KnowledgeBase.open(tmp_path / out)
        assert (kb.config.noise["size"], kb.verify().ok) == (4, True)
        assert set(zip(kb.prompts, kb.noise_ids.tolist(), strict=True)) == expected


def test_what_cannot_be_joined(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", 0, 6), write(tmp_path / "b", 6, 6)
    for sources, out in (([a, b], a), ([a, a], tmp_path / "out"), ([a, tmp_path / "b" / ".." / "a"], tmp_path / "out")):
        with pytest.raises(InvalidInputError, match="different folders"):
            merge(sources, out)
    with pytest.raises(InvalidInputError, match="at least one"):
        merge([], tmp_path / "out")
    with pytest.raises(KnowledgeBaseError, match="not a"):
        merge([a, tmp_path / "nowhere"], tmp_path / "out")
    shard = b / "shards" / "00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(KnowledgeBaseError, match=r"00001\.safetensors .*sha256"):
        merge([a, b], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_interrupted_it_goes_on(tmp_path: Path) -> None:
    parts = [write(tmp_path / "a", 0, 10), write(tmp_path / "b", 10, 10)]

    def stop(seen: int, total: int) -> None:
        if seen >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(parts, tmp_path / "out", shard_rows=4, progress=stop)
    assert 8 <= len(KnowledgeBase.open(tmp_path / "out")) < 20
    merge(parts, tmp_path / "out", shard_rows=4)
    of = config()
    assert same(KnowledgeBase.open(tmp_path / "out").gather(torch.arange(20)), rows(of, 0, 20), of.dtype)


def test_a_single_one_is_copied_into_other_shards(tmp_path: Path) -> None:
    kb = make(tmp_path / "a", shard_rows=3)
    merge([kb.path], tmp_path / "out", shard_rows=100)
    assert [s.rows for s in KnowledgeBase.open(tmp_path / "out").manifest.shards] == [20]
