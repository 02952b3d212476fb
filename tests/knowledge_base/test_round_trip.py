"""What was written is what is read, whatever the records, shapes, dtypes, shard sizes and order."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from redi.errors import InvalidInputError, KnowledgeBaseError
from redi.knowledge_base import KnowledgeBase, Writer, files
from redi.noise import NoiseBank
from redi.types import Record
from tests.knowledge_base.samples import config, leaves, make, records, rows, same, shapes, storages


@given(
    record=records,
    storage=storages,
    shape=shapes,
    count=st.integers(1, 13),
    shard_rows=st.integers(1, 6),
    batch=st.integers(1, 6),
    chunk=st.integers(1, 14),
    width=st.integers(0, 3),
    half=st.booleans(),
    data=st.data(),
)
def test_round_trip(
    record: Record,
    storage: str,
    shape: tuple[int, ...],
    count: int,
    shard_rows: int,
    batch: int,
    chunk: int,
    width: int,
    half: bool,
    data: st.DataObject,
) -> None:
    of = config(record, storage, sample_shape=shape)
    given_dtype = torch.float16 if half else torch.float64
    with tempfile.TemporaryDirectory() as folder:
        with Writer.open(Path(folder) / "a" / "kb", of, shard_rows) as writer:
            for first in range(0, count, batch):
                assert writer.append(rows(of, first, min(count, first + batch), width, given_dtype)) == ()
        assert len(writer.done) == count
        kb = KnowledgeBase.open(Path(folder) / "a" / "kb")
        whole = rows(of, 0, count, width, given_dtype)
        assert len(kb) == count
        assert kb.config == of
        assert kb.record == record
        assert list(kb.prompts) == list(whole.prompts)
        assert torch.equal(kb.noise_ids, whole.noise_ids)
        assert [s.rows for s in kb.manifest.shards] == [min(shard_rows, count - i) for i in range(0, count, shard_rows)]
        chunks = list(kb.chunks(chunk))
        assert [len(c) for c in chunks] == [min(chunk, count - i) for i in range(0, count, chunk)]
        at = 0
        for part in chunks:
            assert same(part, rows(of, at, at + len(part), width, given_dtype), of.dtype)
            at += len(part)
        ids = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), max_size=9)), dtype=torch.int64)
        gathered = kb.gather(ids)
        assert len(gathered) == len(ids)
        for position, i in enumerate(ids.tolist()):
            one = kb.gather(torch.tensor([i]))
            assert same(one, rows(of, i, i + 1, width, given_dtype), of.dtype)
            for name, tensor in gathered.samples.items():
                assert torch.equal(tensor[position], one.samples[name][0])
            assert gathered.prompts[position] == one.prompts[0]
        assert kb.verify().ok


def test_the_safetensors_library_reads_shards(tmp_path: Path) -> None:
    kb = make(tmp_path)
    shard = load_file(tmp_path / kb.manifest.shards[1].file)
    expected = rows(kb.config, 8, 16)
    assert set(shard) == {
        "sample.00000",
        "sample.00005",
        "sample.00040",
        "denoised.00000",
        "denoised.00005",
        "history.00005.ets.0",
        "history.00005.last_sample",
        "noise_id",
        "embedding",
    }
    assert torch.equal(shard["sample.00040"], expected.samples[40].half())
    assert torch.equal(shard["history.00005.ets.0"], expected.history[5]["ets.0"].half())
    assert torch.equal(shard["noise_id"], expected.noise_ids)
    prompts = json.loads((tmp_path / kb.manifest.shards[1].prompts_file).read_text(encoding="utf-8"))
    assert prompts == list(expected.prompts)


def test_rows_follow_the_order_of_the_manifest(tmp_path: Path) -> None:
    kb = make(tmp_path, shard_rows=6)
    shards = kb.manifest.shards
    turned = replace(kb.manifest, shards=(shards[2], shards[0], shards[3], shards[1]))
    files.write(tmp_path / "manifest.json", turned.to_bytes())
    order = [*range(12, 18), *range(6), *range(18, 20), *range(6, 12)]
    again = KnowledgeBase.open(tmp_path)
    assert again.manifest_hash != kb.manifest_hash
    assert again.verify().ok
    whole = again.gather(torch.arange(20))
    for i, original in enumerate(order):
        assert same(again.gather(torch.tensor([i])), rows(kb.config, original, original + 1), kb.config.dtype)
        assert torch.equal(whole.denoised[5][i], kb.gather(torch.tensor([original])).denoised[5][0])


def test_writing_into_a_chunk_changes_nothing_else(tmp_path: Path) -> None:
    kb = make(tmp_path, count=8)
    for chunk in kb.chunks():
        chunk.samples[0].zero_()
    assert same(next(kb.chunks()), rows(kb.config, 0, 8), kb.config.dtype)
    assert same(kb.gather(torch.arange(8)), rows(kb.config, 0, 8), kb.config.dtype)
    assert kb.verify().ok


def test_ids_out_of_range_are_refused(tmp_path: Path) -> None:
    kb = make(tmp_path)
    for ids in ([-1], [20], [0, 5, 99]):
        with pytest.raises(InvalidInputError, match=r"row ids must be 0 … 19"):
            kb.gather(torch.tensor(ids))


def test_an_unfinished_knowledge_base_opens_but_serves_nothing(tmp_path: Path) -> None:
    of = config()
    Writer.open(tmp_path, of).close()
    kb = KnowledgeBase.open(tmp_path)
    assert len(kb) == 0
    assert kb.info()["rows"] == 0
    assert kb.verify().ok
    for serve in (
        lambda: next(kb.chunks()),
        lambda: kb.gather(torch.tensor([], dtype=torch.int64)),
        lambda: kb.derive({}, lambda r: {"a": r.samples[0]}),
    ):
        with pytest.raises(KnowledgeBaseError, match="no finished rows"):
            serve()
    with Writer.open(tmp_path, of) as writer:
        writer.append(rows(of, 0, 3))
    assert len(KnowledgeBase.open(tmp_path)) == 3
    assert len(kb) == 0  # a view stays what it was


def test_the_bank_is_the_one_it_was_built_with(tmp_path: Path) -> None:
    bank = NoiseBank(seed=11, size=4, shape=(2, 3), diversity=0.25)
    of = replace(config(), noise=bank.to_json())
    Writer.open(tmp_path, of).close()
    assert KnowledgeBase.open(tmp_path).bank == bank


def test_info_says_what_is_there(tmp_path: Path) -> None:
    kb = make(tmp_path)
    kb.derive({"what": "keys"}, lambda r: {"key": r.denoised[0].flatten(1)})
    info = kb.info()
    assert json.loads(json.dumps(info, allow_nan=False)) == info
    assert info["rows"] == 20
    assert info["rows_per_noise"] == {"0": 7, "1": 7, "2": 6}
    assert info["prompts"] == 7
    assert info["entries"] == {"samples": [0, 5, 40], "denoised": [0, 5], "history": [5]}
    assert info["bytes"] == sum(p.stat().st_size for p in (tmp_path / "shards").iterdir())
    assert info["bytes_derived"] > 0
    assert [(d["recipe"], d["current"]) for d in info["derived"]] == [({"what": "keys"}, True)]
    assert "a/model" in info["summary"]


def test_the_card_states_the_facts(tmp_path: Path) -> None:
    of = config(model="evil|name\n# heading <b>")
    make(tmp_path, of)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "20 trajectories" in text
    assert "evil\\|name # heading &lt;b>" in text
    assert "coarse:8/40" in text


@pytest.mark.parametrize("count", [8, 5_000])
def test_rows_are_gathered_in_any_order_and_number(tmp_path: Path, count: int) -> None:
    kb = make(tmp_path)
    ids = torch.randint(20, (count,), generator=torch.Generator().manual_seed(count))
    gathered, one_by_one = kb.gather(ids), [kb.gather(torch.tensor([i])) for i in range(20)]
    for name, tensor in leaves(gathered).items():
        assert torch.equal(tensor, torch.cat([leaves(one_by_one[i])[name] for i in ids.tolist()])), name
    assert list(gathered.prompts) == [one_by_one[i].prompts[0] for i in ids.tolist()]
