"""Evaluations by several ranks, each a process of its own: the numbers of one."""

from __future__ import annotations

import csv
import json
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.lightning.conftest import Place, Ranks

JUDGES = ("--features", "evaluator", "--score", "evaluator", "--repeats", "10")


def start(place: Place, ranks: int, out: str, *more: object, pause: float = 0.0) -> Ranks:
    arguments = ["eval", "kb", "queries.txt", *JUDGES, "--batch-size", "2", "--out", out, "--json", f"{out}.json"]
    command = {
        "arguments": [*arguments, *map(str, more)],
        "ranks": ranks,
        "folder": str(place.folder),
        "file_sizes": {},
        "pause": pause,
    }
    return Ranks(place.ask, place.folder, place.ask(command))


def finish(place: Place, ranks: int, out: str, *more: object) -> Any:
    started = start(place, ranks, out, *more)
    assert started.wait() == [0] * ranks, [started.output(r) for r in range(ranks)]
    return json.loads((place.folder / f"{out}.json").read_text())


def untimed(said: Any) -> Any:
    return {**said, "rows": [{k: v for k, v in row.items() if k != "seconds"} for row in said["rows"]]}


@pytest.fixture
def built(place: Place) -> Place:
    place.write(6)
    place.build(1, "--noises", 2)
    place.solved()
    (place.folder / "queries.txt").write_text("".join(f"query {i}\n" for i in range(5)), encoding="utf-8")
    return place


def test_two_ranks_give_the_numbers_of_one_to_the_bit(built: Place) -> None:
    alone = finish(built, 1, "alone")
    built.solved()
    together = finish(built, 2, "together")
    assert untimed(together) == untimed(alone)
    assert together["pictures"] == 10
    by_rank = Counter(rank for rank, _ in built.solved())
    assert by_rank.keys() == {0, 1}
    assert sum(by_rank.values()) == 10
    again = finish(built, 2, "together", "--logger", "csv")
    assert again == together  # seconds too
    assert built.solved() == []


def test_more_ranks_than_batches_a_logger_and_what_is_left_of_one(built: Place) -> None:
    said = finish(built, 3, "few", "--limit", 2, "--noises", 1, "--logger", "csv")
    assert said["pictures"] == 2
    assert len(built.solved()) == 2
    (log,) = Path(built.folder, "redi-logs").rglob("metrics.csv")
    with open(log, encoding="utf-8") as file:
        assert max(float(row["batches"]) for row in csv.DictReader(file) if row.get("batches")) == 1


@pytest.mark.slow  # a matter of moments, on a busy machine
def test_sigterm_ends_well_and_another_number_of_ranks_goes_on(built: Place) -> None:
    # four rounds of two ranks: whoever hears of it in the second ends before the fourth
    (built.folder / "queries.txt").write_text("".join(f"query {i}\n" for i in range(8)), encoding="utf-8")
    started = start(built, 2, "eval", pause=0.5)
    deadline = time.monotonic() + 60
    while not list(built.folder.glob("eval/batches/*/*.safetensors")):
        assert time.monotonic() < deadline, started.output()
        time.sleep(0.01)
    started.send(0, signal.SIGTERM)
    assert started.wait() == [0, 0], started.output()
    assert json.loads((built.folder / "eval.json").read_text())["stopped"] == "SIGTERM"
    first = built.solved()
    assert 0 < len(first) < 16
    said = finish(built, 1, "eval")
    assert len(first) + len(built.solved()) == 16
    assert untimed(said) == untimed(finish(built, 1, "other"))
