"""Several ranks write one knowledge base: shards of their own, listed by the first, adopted if their rank is lost."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redi.errors import FingerprintMismatchError, KnowledgeBaseError
from redi.knowledge_base import KnowledgeBase, Writer
from redi.knowledge_base.writer import Ticket
from tests.knowledge_base.samples import config, make, rows, same


def together(path: Path, ranks: int, shard_rows: int = 3) -> list[Writer]:
    first = Writer.open(path, config(), shard_rows, ranks=ranks)
    ticket = first.ticket()
    return [first, *(Writer.join(path, config(), ticket, r, ranks, shard_rows) for r in range(1, ranks))]


def keys(path: Path) -> list[tuple[str, int]]:
    kb = KnowledgeBase.open(path)
    return sorted(zip(kb.prompts, kb.noise_ids.tolist(), strict=True))


def expected(first: int, stop: int) -> list[tuple[str, int]]:
    of = rows(config(), first, stop)
    return sorted(zip(of.prompts, of.noise_ids.tolist(), strict=True))


def shard_files(path: Path) -> set[str]:
    return {p.name for p in (path / "shards").iterdir()}


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=12))
def test_whatever_the_order_of_the_ranks_every_row_is_there_once(
    tmp_path_factory: pytest.TempPathFactory, ranks: int, turns: list[tuple[int, int]]
) -> None:
    path, of, at = tmp_path_factory.mktemp("kb"), config(), 0
    writers = together(path, ranks)
    for turn, count in turns:
        writers[turn % ranks].append(rows(of, at, at + count))
        at += count
        assert len(KnowledgeBase.open(path)) <= at  # a reader may look at any time
    for writer in reversed(writers):
        writer.flush()
    writers[0].list_finished([name for w in writers for name in w.written])
    for writer in reversed(writers):
        writer.close()
    assert keys(path) == expected(0, at)
    assert KnowledgeBase.open(path).verify().ok
    if at:
        assert len(shard_files(path)) == 2 * len(KnowledgeBase.open(path).manifest.shards)  # no note is left


def test_only_the_first_lists(tmp_path: Path) -> None:
    first, second = together(tmp_path, 2)
    second.append(rows(config(), 0, 3))
    assert len(second.written) == 1
    assert len(KnowledgeBase.open(tmp_path)) == 0
    with pytest.raises(KnowledgeBaseError, match="only the first rank lists"):
        second.list_finished()
    first.append(rows(config(), 3, 6))  # a shard of its own: a good moment to list the others' too
    assert keys(tmp_path) == expected(0, 6)
    second.close()
    first.close()


def test_what_a_lost_rank_finished_is_adopted(tmp_path: Path) -> None:
    first, second = together(tmp_path, 2)
    first.append(rows(config(), 0, 2))
    second.append(rows(config(), 6, 13))  # two shards, and a row that is in flight
    first._lock.release()  # as when the processes were killed
    second._lock.release()
    before = {p: p.read_bytes() for p in (tmp_path / "shards").glob("*.safetensors")}
    with Writer.open(tmp_path, config(), 3) as writer:
        assert sorted(writer.done) == expected(6, 12)
        assert writer.skipped == 0
        writer.append(rows(config(), 0, 13))
        assert writer.skipped == 6
    assert keys(tmp_path) == expected(0, 13)
    kb = KnowledgeBase.open(tmp_path)
    assert kb.verify().ok
    assert not kb.verify().ignored
    assert all(p.read_bytes() == content for p, content in before.items())


def test_what_a_lost_rank_finished_is_adopted_by_a_build_with_more_noises(tmp_path: Path) -> None:
    first, second = together(tmp_path, 2)
    second.append(rows(config(), 0, 6))
    first._lock.release()
    second._lock.release()
    larger = config(noises=4)
    writer = Writer.open(tmp_path, larger, 3, ranks=2)
    assert sorted(writer.done) == expected(0, 6)
    beside = Writer.join(tmp_path, larger, writer.ticket(), 1, 2, 3)
    beside.append(replace(rows(config(), 6, 7), noise_ids=torch.tensor([3])))
    beside.flush()
    writer.list_finished(beside.written)
    beside.close()
    writer.close()
    kb = KnowledgeBase.open(tmp_path)
    assert (len(kb), kb.config.noise["size"], kb.verify().ok) == (7, 4, True)


@pytest.mark.parametrize("victim", ["safetensors", "prompts.json", "finished.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
def test_what_is_damaged_is_not_adopted(tmp_path: Path, victim: str, harm: str) -> None:
    first, second = together(tmp_path, 2)
    second.append(rows(config(), 0, 6))
    first._lock.release()
    second._lock.release()
    file = tmp_path / "shards" / f"{second.written[0]}.{victim}"
    content = bytearray(file.read_bytes())
    if harm == "gone":
        file.unlink()
    elif harm == "cut":
        file.write_bytes(content[:-2])  # JSON without its last newline would be the same JSON
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with Writer.open(tmp_path, config(), 3) as writer:
        assert sorted(writer.done) == expected(3, 6)
        writer.append(rows(config(), 0, 6))
    assert keys(tmp_path) == expected(0, 6)
    report = KnowledgeBase.open(tmp_path).verify()
    assert (report.ok, report.ignored) == (True, ())


def test_rows_that_two_shards_hold_are_listed_once(tmp_path: Path) -> None:
    """As when machines that do not see each other's locks wrote the same rows."""
    make(tmp_path / "a", config(), 6, shard_rows=6)
    other = make(tmp_path / "b", config(), 9, shard_rows=9)
    name = "00007"
    for part in ("safetensors", "prompts.json"):
        shutil.copy(tmp_path / f"b/shards/00000.{part}", tmp_path / f"a/shards/{name}.{part}")
    listed = KnowledgeBase.open(tmp_path / "a").manifest
    alone = replace(listed, shards=(replace(other.manifest.shards[0], name=name),))
    (tmp_path / f"a/shards/{name}.finished.json").write_bytes(alone.to_bytes())
    with Writer.open(tmp_path / "a", config(), 6) as writer:
        assert writer.skipped == 6
        assert sorted(writer.done) == expected(0, 9)
    kb = KnowledgeBase.open(tmp_path / "a")
    assert [s.rows for s in kb.manifest.shards] == [6, 3]
    assert (kb.verify().ok, kb.verify().ignored) == (True, ())
    assert same(kb.gather(torch.arange(9)), rows(config(), 0, 9), config().dtype)


def test_while_a_rank_lives_nobody_else_begins(tmp_path: Path) -> None:
    first, second = together(tmp_path, 2)
    second.require_first()
    with pytest.raises(KnowledgeBaseError, match="is being written by process"):
        Writer.open(tmp_path, config())
    first.close()
    with pytest.raises(KnowledgeBaseError, match="by ranks of an earlier build"):
        Writer.open(tmp_path, config())
    with pytest.raises(KnowledgeBaseError, match=r"rank 0 .* has ended before its time"):
        second.require_first()
    second.append(rows(config(), 0, 1))
    second.close()
    with Writer.open(tmp_path, config()) as writer:
        assert len(writer.done) == 1


def test_a_folder_that_is_not_shared_is_seen_at_once(tmp_path: Path) -> None:
    first = Writer.open(tmp_path / "mine", config(), ranks=2)
    (tmp_path / "other").mkdir()
    Writer.open(tmp_path / "other", config()).close()
    ticket = first.ticket()
    elsewhere = Ticket("1 on another", ticket.first, ticket.layout)
    for path, given_ticket in ((tmp_path / "none", ticket), (tmp_path / "other", elsewhere)):
        with pytest.raises(KnowledgeBaseError, match="redi merge"):
            Writer.join(path, config(), given_ticket, 1, 2, 256)
    with pytest.raises(FingerprintMismatchError, match="same model"):
        Writer.join(tmp_path / "mine", config(guidance=4.0), ticket, 1, 2, 256)
    first.close()
    Writer.open(tmp_path / "mine", config()).close()  # those who failed hold nothing


def test_a_shard_that_is_said_to_be_finished_must_be_seen(tmp_path: Path) -> None:
    first, second = together(tmp_path, 2)
    second.append(rows(config(), 0, 3))
    (tmp_path / "shards" / f"{second.written[0]}.safetensors").unlink()
    with pytest.raises(KnowledgeBaseError, match=f"shards {second.written[0]}, which other ranks finished"):
        first.list_finished(second.written)
    second.close()
    first.close()
