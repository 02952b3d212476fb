"""`redi info` and `redi verify`: the figures add up, and damage is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from redi.knowledge_base import KnowledgeBase
from tests.cli.conftest import Redi


def test_what_it_cost_and_when_it_pays(redi: Redi, kb: Path, tmp_path: Path) -> None:
    done = redi("info", kb, "--json", tmp_path / "i.json")
    assert done.code == 0, done.err
    said = json.loads((tmp_path / "i.json").read_text())
    assert (said["rows"], said["prompts"]) == (14, 7)
    assert said["cost"]["model_calls"] == 14 * 8
    assert [(p["plan"], p["nfe"], p["saved"], p["break_even"]) for p in said["cost"]["plans"]] == [
        ("coarse:3/8", 3, 5, 23),  # 112 / 5, rounded up
        ("coarse:4/8", 4, 4, 28),
    ]
    for words in ("14 of 7 prompts", "112 model calls (8 a row)", "23 pictures", "guidance 7.5", "size 2"):
        assert words in done.out


@pytest.mark.parametrize(
    ("solver", "per_row", "full", "nfe"),
    # PLMS calls its second entry twice, Heun every step but the last; a build stops where the jump arrives, at step 6
    [("pndm", 7, 9, 5), ("euler", 6, 8, 5), ("heun", 12, 15, 7)],
)
def test_a_build_for_jumps_stops_at_the_value(
    redi: Redi, model: Path, prompts: Path, tmp_path: Path, solver: str, per_row: int, full: int, nfe: int
) -> None:
    kb = tmp_path / "kb"
    arguments = ("build", model, prompts, kb, "--solver", solver, "--plan", "jump:2:6/8", "--limit", "2")
    assert redi(*arguments).code == 0
    cost = redi("info", kb, "--json", "-").json["cost"]
    assert cost["calls_per_row"] == per_row
    assert (cost["plans"][0]["nfe_full"], cost["plans"][0]["nfe"]) == (full, nfe)
    made = redi("generate", kb, "cat", "--out", tmp_path / "x", "--json", "-").json
    assert (made["nfe_full"], made["nfe"]) == (full, nfe)  # what was foretold is what happens


def test_indexes_are_built_ahead_and_listed(redi: Redi, kb: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kb"
    shutil.copytree(kb, folder)
    done = redi("index", folder, "--retriever", "exact:chunk_bytes=65536", "--json", "-")
    assert done.code == 0, done.err
    assert [s["plan"] for s in done.json["served"]] == ["coarse:3/8", "coarse:4/8"]
    assert [i["noise_id"] for i in done.json["served"][0]["indexes"]] == [0, 1]
    listed = redi("info", folder, "--json", "-").json["indexes"]
    assert listed == done.json["indexes"]
    assert [i["partitions"] for i in listed if "65536" in i["retriever"]] == [2, 2]
    assert "chunk_bytes=65536" in redi("info", folder).out
    assert redi("verify", folder).code == 0
    assert redi("index", folder, "--retriever", "annoy").code == 2


def test_a_whole_one_is_whole(redi: Redi, kb: Path) -> None:
    done = redi("verify", kb, "--json", "-")
    assert done.code == 0
    assert (done.json["ok"], done.json["rows"], done.json["problems"]) == (True, 14, [])


def test_damage_is_named_and_ends_with_1(redi: Redi, kb: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kb"
    shutil.copytree(kb, folder)
    shard = next(iter(sorted((folder / "shards").glob("*.safetensors"))))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    done = redi("verify", folder, "--json", tmp_path / "v.json")
    assert done.code == 1
    assert f"shards/{shard.name}" in done.out
    assert "damaged, 1 problem" in done.out
    said = json.loads((tmp_path / "v.json").read_text())
    assert [p["file"] for p in said["problems"]] == [f"shards/{shard.name}"]
    shard.write_bytes(data[:-1])
    assert redi("verify", folder).code == 1
    done = redi("info", folder)
    assert done.code == 2
    assert "truncated" in done.err
    assert len(done.err.splitlines()) == 1


def test_a_damaged_shard_is_taken_out_and_the_same_build_fills_it(
    redi: Redi, model: Path, prompts: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "my knowledge – été"
    build = (
        "build",
        model,
        prompts,
        folder,
        "--plan",
        "coarse:2/3",
        "--shard-rows",
        "3",
        "--json",
        tmp_path / "b.json",
    )
    assert redi(*build).code == 0
    before = sorted(KnowledgeBase.open(folder).prompts)
    shard = folder / "shards" / "00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-9])
    done = redi(*build)
    assert done.code == 2
    assert "00001.safetensors: truncated" in done.err
    assert f"redi verify {folder} --drop" in done.err
    assert redi("verify", folder).code == 1
    done = redi("verify", folder, "--drop", "--json", tmp_path / "v.json")
    assert done.code == 0, done.err
    said = json.loads((tmp_path / "v.json").read_text())
    assert (said["dropped"], said["rows_dropped"], said["ok"]) == (["00001"], 3, False)
    assert redi("verify", folder).code == 0
    assert redi(*build).code == 0
    assert json.loads((tmp_path / "b.json").read_text())["rows_new"] == 3
    assert sorted(KnowledgeBase.open(folder).prompts) == before


def test_a_folder_of_something_else(redi: Redi, tmp_path: Path) -> None:
    for command in ("info", "verify"):
        done = redi(command, tmp_path)
        assert (done.code, len(done.err.splitlines())) == (2, 1)
