"""Builds by several ranks: the same rows as by one, whatever happens to the ranks, the disk, and the folder."""

from __future__ import annotations

import random
import signal
import time

import pytest
import torch

from redi.knowledge_base import KnowledgeBase
from tests.lightning.conftest import Key, Place, Ranks

SMALL = ("--batch-size", 2, "--shard-rows", 4)


def until_shards(started: Ranks, count: int) -> None:
    """Wait for so many finished shards."""
    deadline = time.monotonic() + 60
    while len(list(started.folder.glob("kb/shards/*.prompts.json"))) < count:
        assert time.monotonic() < deadline, started.output()
        assert started.running(), started.output()
        time.sleep(0.005)


def on_disk(place: Place) -> dict[str, bytes]:
    """Every shard that is finished, by its name: listed, or with a note."""
    shards = place.folder / "kb" / "shards"
    listed = {s.name for s in place.kb.manifest.shards} if (place.folder / "kb" / "manifest.json").exists() else set()
    noted = {p.name.partition(".")[0] for p in shards.glob("*.finished.json")}
    return {name: (shards / f"{name}.safetensors").read_bytes() for name in listed | noted}


def by_key(kb: KnowledgeBase) -> dict[Key, dict[str, torch.Tensor]]:
    rows = kb.gather(torch.arange(len(kb)))
    keys = zip(rows.prompts, rows.noise_ids.tolist(), strict=True)
    leaves = {
        **{f"sample {e}": x for e, x in rows.samples.items()},
        **{f"denoised {e}": x for e, x in rows.denoised.items()},
        "embedding": rows.embeddings,
    }
    return {key: {name: x[i] for name, x in leaves.items()} for i, key in enumerate(keys)}


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_rows_do_not_depend_on_the_number_of_ranks_nor_on_the_batches(place: Place, ranks: int) -> None:
    place.write(7)
    place.build(1, "--noises", 3, "--batch-size", 5, "--shard-rows", 256, kb="alone")
    place.solved()
    place.build(ranks, "--noises", 3, "--batch-size", 2, "--shard-rows", 3)
    place.require_whole(7, 3)
    solved = place.solved()
    assert len(solved) == 21
    assert {rank for rank, _ in solved} == set(range(ranks))
    alone, together = by_key(KnowledgeBase.open(place.folder / "alone")), by_key(place.kb)
    assert alone.keys() == together.keys()
    for key, leaves in alone.items():
        for name, x in leaves.items():  # float32 kernels differ by batch size
            torch.testing.assert_close(
                together[key][name], x, rtol=1e-4, atol=5e-5, msg=lambda m, at=f"{key} {name}": f"{at}: {m}"
            )
    assert (place.result["rows"], place.result["rows_new"], place.result["stopped"]) == (21, 21, None)


def test_fewer_rows_than_ranks_none_left_and_more_prompts_later(place: Place) -> None:
    place.write(2)
    place.build(3)
    place.require_whole(2)
    before = place.kb.manifest_hash
    place.build(3)
    assert place.kb.manifest_hash == before
    assert place.result["rows_new"] == 0
    assert len(place.solved()) == 2
    place.write(3)
    place.build(2)
    place.require_whole(3)
    assert [key for _, key in place.solved()] == [("prompt 2", 0)]


# The slow ones are as many again and more, so that a rare order of events has its chance.
SEEDS = [pytest.param(seed, marks=[] if seed < 3 else [pytest.mark.slow]) for seed in range(20)]


@pytest.mark.parametrize("seed", SEEDS)
def test_killed_at_any_moment_and_continued(place: Place, seed: int) -> None:
    draw, rows = random.Random(seed), 40
    victim, ranks = seed % 2, draw.choice([2, 2, 3])
    place.write(rows)
    started = place.start(ranks, *SMALL, pause=0.02)
    until_shards(started, draw.randrange(0, 6))
    time.sleep(draw.random() * 0.1)
    started.send(victim, signal.SIGKILL)
    if not (place.folder / "kb" / "manifest.json").exists():  # they wait for one who never came: launchers end them
        for rank in range(ranks):
            started.send(rank, signal.SIGKILL)
    codes = started.wait()  # those that live notice by themselves, without a launcher
    assert codes[victim] == -signal.SIGKILL
    assert all(code != 0 for code in codes), [started.output(r) for r in range(ranks)]
    finished, first = on_disk(place), place.solved()
    assert len({key for _, key in first}) == len(first)
    place.build(draw.choice([1, 2]), *SMALL)
    place.require_whole(rows)
    again = place.solved()
    kept = place.kb.manifest.shards
    shards = place.folder / "kb" / "shards"
    assert all((shards / f"{name}.safetensors").read_bytes() == content for name, content in finished.items())
    assert finished.keys() <= {s.name for s in kept}
    held = sum(s.rows for s in kept if s.name in finished)
    assert len(again) == rows - held  # what was finished is not solved again
    solved_twice = {key for _, key in first} & {key for _, key in again}
    for rank in range(ranks):
        lost = [key for r, key in first if r == rank and key in solved_twice]
        assert len(lost) < 4 + 2  # a shard in flight, and the batch that was to fill it


@pytest.mark.parametrize("who", ["first", "second", "all"])
def test_sigterm_ends_well_and_the_same_command_resumes(place: Place, who: str) -> None:
    place.write(40)
    started = place.start(2, *SMALL, pause=0.05)
    until_shards(started, 1)
    for rank in {"first": [0], "second": [1], "all": [0, 1]}[who]:
        started.send(rank, signal.SIGTERM)
    assert started.wait() == [0, 0], started.output()
    found = place.keys()
    first = place.solved()
    assert set(found) == {key for _, key in first}  # the shard in hand was finished
    assert len(found) < 40
    assert place.kb.verify().ok
    assert not place.kb.verify().ignored
    if who != "second":
        assert "stopped by SIGTERM" in started.output()
        assert place.result["stopped"] == "SIGTERM"
    place.build(2, *SMALL)
    place.require_whole(40)
    assert len(place.solved()) == 40 - len(first)


def test_a_full_disk_is_said_and_nothing_is_lost(place: Place) -> None:
    place.write(6)
    place.build(2, *SMALL)
    before = on_disk(place)
    size = max(map(len, before.values()))
    place.write(30)
    for full in (0, 1):
        place.solved()
        started = place.start(2, *SMALL, file_sizes={full: size // 2})
        codes = started.wait()
        assert all(code != 0 for code in codes), codes
        assert "File too large" in started.output(full)
        assert "finished rows are safe" in started.output(full)
        assert place.kb.verify().ok
        assert before.items() <= on_disk(place).items()
    place.build(2, *SMALL)
    place.require_whole(30)


def test_a_second_build_of_the_same_folder_is_refused_and_readers_see_it_whole(place: Place) -> None:
    place.write(60)
    started = place.start(2, *SMALL, pause=0.03)
    until_shards(started, 2)
    (place.folder / "hold").touch()  # in the middle of a batch
    for ranks in (1, 2):
        second = place.start(ranks, *SMALL)
        assert second.wait() == [2] * ranks
        assert f"is being written by process {started.pids[0]} on" in second.output()
    (place.folder / "hold").unlink()
    seen = [0]
    while started.running():
        kb = place.kb
        assert kb.verify().ok
        seen.append(len(kb))
        assert len(kb.prompts) == seen[-1] >= seen[-2]
    assert started.wait() == [0, 0]
    place.require_whole(60)
    assert len(set(seen)) > 3  # it grew under our eyes
