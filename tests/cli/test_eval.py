"""`redi eval`: a table in every form, with plain solvers of equal cost; resumed without a call; refused in one line."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from redi.cli import main
from redi.evaluation.examiner import Examiner
from tests.cli.conftest import Redi


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows of the bundled model."""
    folder = tmp_path_factory.mktemp("kb") / "kb"
    code = main(["build", "emoji", "train", str(folder), "--limit", "12", "--plan", "coarse:2/6,jump:1:4/6"])
    assert code == 0
    return folder


def test_the_bundled_model_from_end_to_end_and_again_without_a_call(
    redi: Redi, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "eval"
    arguments = ("eval", own, "heldout", "--limit", "6", "--out", out, "--repeats", "20", "--batch-size", "4")
    more = ("--plans", "coarse:2/6", "jump:1:4/6", "--transports", "defect", "value", "--baselines", "unipc", "ddim:3")
    done = redi(*arguments, *more, "--json", tmp_path / "result.json")
    assert done.code == 0, done.err
    said = json.loads((out / "table.json").read_text())
    assert json.loads((tmp_path / "result.json").read_text()) == {**said, "stopped": None}
    kinds = {r["name"]: r["kind"] for r in said["rows"]}
    fine, *others = said["rows"]
    assert (fine["kind"], fine["nfe"], fine["latent_error"]) == ("fine", 6, [0, 0, 0])
    calls = {r["name"]: r["nfe"] for r in others}
    assert calls["coarse:2/6 defect"] == 2
    assert calls["jump:1:4/6 defect"] == 4
    assert calls["jump:1:4/6 value"] == 3
    for plain in ("dpmsolver++-karras", "unipc"):  # the rows' own, and what was asked for, at each of these
        assert [calls[f"{plain}:{n}"] for n in (2, 3, 4)] == [2, 3, 4]
    assert calls["ddim:3"] == 3
    assert {(a["way"], a["calls"]) for a in said["against"]} == {(w, c) for w, c in calls.items() if kinds[w] == "redi"}
    assert done.err.count("left out coarse:2/6 value: plan coarse:2/6 calls the model at every leap") == 1
    assert {p.name for p in out.iterdir()} == {"batches", "plot.png", "table.csv", "table.json", "table.md"}
    assert "coarse:2/6 defect − unipc:2" in done.out
    assert all(r["lpips"] is None for r in said["rows"]) or "LPIPS" not in done.err

    def never(self: Any, batch: Any) -> Any:
        raise AssertionError("a finished batch was drawn again")

    monkeypatch.setattr(Examiner, "__call__", never)
    again = redi(*arguments, *more)
    assert again.code == 0, again.err
    assert json.loads((out / "table.json").read_text()) == said  # seconds too: they are those measured


def test_sigterm_keeps_what_is_done_and_the_same_command_goes_on(
    redi: Redi, kb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_text("a star\nred cat\ngreen dog\n")
    out, see, seen = tmp_path / "eval", Examiner.__call__, list[Any]()

    def once(self: Any, batch: Any) -> Any:
        seen.append(batch)
        if len(seen) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return see(self, batch)

    monkeypatch.setattr(Examiner, "__call__", once)
    given = ("eval", kb, tmp_path / "p.txt", "--out", out, "--batch-size", "2", "--plans", "coarse:3/8", "--repeats", 5)
    judges = ("--features", "latents", "--score", "evaluator")
    done = redi(*given, *judges, "--json", "-")
    assert done.code == 0, done.err
    assert done.json == {"stopped": "SIGTERM", "batches_done": 1, "batches": 3}
    assert "stopped by SIGTERM with 1 of 3 batches; the same command resumes" in done.err
    assert not (out / "table.json").exists()
    assert redi(*given, *judges).code == 0
    assert len(seen) == 3
    assert json.loads((out / "table.json").read_text())["pictures"] == 6


def test_own_prompts_are_noted_and_missing_networks_named(redi: Redi, kb: Path, prompts: Path, tmp_path: Path) -> None:
    given = ("eval", kb, prompts, "--limit", "2", "--noises", "1", "--plans", "coarse:3/8", "--repeats", "3")
    done = redi(*given, "--neighbors", "1", "3", "--out", tmp_path / "eval")
    assert done.code == 0, done.err
    assert "2 of 2 prompts are the knowledge base's own" in done.err
    names = [r["name"] for r in json.loads((tmp_path / "eval" / "table.json").read_text())["rows"]]
    assert {"coarse:3/8 H=1", "coarse:3/8 H=3"} <= set(names)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--plans", "coarse:9"), "cannot read plan 'coarse:9'"),
        (("--plans", "coarse:3/7"), "nothing to evaluate"),
        (("--transports", "teleport"), "no transport 'teleport'"),
        (("--combiners", "mean"), "no combiner 'mean'"),
        (("--retrievers", "oracle"), "no retriever 'oracle'"),
        (("--keys", "colour"), "no key 'colour'"),
        (("--neighbors", "0"), "--neighbors must be at least 1"),
        (("--baselines", "euler:x"), "expected NAME:STEPS"),
        (("--baselines", "warp:3"), "no solver 'warp'"),
        (("--noises", "3"), "has rows of 2"),
        (("--features", "vgg"), "no --features 'vgg'"),
        (("--score", "clip:nowhere"), "not on this machine"),
        (("--limit", "1"), "at least 2 are needed"),
        (("--repeats", "0"), "--repeats must be at least 1"),
        (("--devices", "2", "--device", "cpu"), "is one device"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    redi: Redi, kb: Path, prompts: Path, tmp_path: Path, more: tuple[str, ...], says: str
) -> None:
    done = redi("eval", kb, prompts, "--out", tmp_path / "eval", *more)
    assert done.code == 2
    error = [line for line in done.err.splitlines() if "error" in line]
    assert len(error) == 1
    assert says in error[0]
    assert not (tmp_path / "eval").exists()
