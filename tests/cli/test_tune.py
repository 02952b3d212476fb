"""`redi tune`: what it says, what it keeps, and that `redi generate --max-error` goes by it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from redi.knowledge_base import KnowledgeBase
from redi.tuned import Tunings
from tests.cli.conftest import Redi

NEW = ("a face", "noto", "heart", "a red dog", "blue", "cat, noto style", "green star", "apple")


@pytest.fixture
def own(kb: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kb, tmp_path / "own"))


def test_every_plan_is_tuned_and_served(redi: Redi, own: Path, tmp_path: Path) -> None:
    done = redi("tune", own, "--max-error", "1000", "--json", tmp_path / "t.json")
    assert done.code == 0, done.err
    assert "coarse:3/8" in done.out
    assert "at most 1000 of the plain solver's error: coarse:3/8" in done.out  # the cheapest
    assert "give --prompts" in done.err
    assert set(Tunings.read(KnowledgeBase.open(own)).plans) == {"coarse:3/8", "coarse:4/8"}
    out = tmp_path / "pictures"
    done = redi("generate", own, "dog", "--out", out, "--max-error", "1000", "--json", tmp_path / "g.json")
    assert done.code == 0, done.err
    assert "3 model calls instead of 8" in done.out
    # nothing is expected to be without any error: the plain solver draws, and the picture is there
    done = redi("generate", own, "green dog", "--out", out, "--max-error", "0", "--steps", "4")
    assert done.code == 0, done.err
    assert "learnt from" not in done.out


@pytest.mark.slow
def test_held_out_prompts_measure_the_coverage(redi: Redi, own: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "new.txt"
    prompts.write_text("\n".join(NEW) + "\n")
    done = redi("tune", own, "--nfe", "3", "--prompts", prompts, "--json", "-")
    assert done.code == 0, done.err
    (plan,) = done.json["plans"].values()
    assert plan["validation"]["prompts"] == len(NEW)
    assert 0 <= plan["validation"]["coverage"] <= 1


def test_a_jump_beside_a_coarse_plan_is_not_asked_for_its_error(
    redi: Redi, model: Path, prompts: Path, tmp_path: Path
) -> None:
    kb = tmp_path / "kb"
    assert redi("build", model, prompts, kb, "--plan", "jump:2:5/8,coarse:4/8").code == 0
    assert redi("tune", kb).code == 0
    done = redi("generate", kb, "dog", "--out", tmp_path / "o", "--max-error", "1000")
    assert done.code == 0, done.err
    assert "4 model calls instead of 8" in done.out


def test_refusals(redi: Redi, own: Path, kb: Path, tmp_path: Path) -> None:
    for arguments, said in (
        (("--nfe", "7"), "there is no coarse plan of 7 model calls; there is: 3 (coarse:3/8), 4 (coarse:4/8)"),
        (("--max-error", "nan"), "--max-error must be a number of at least 0"),
        (("--rows", "1"), "--rows must be at least 2"),
        (("--plan", "coarse:3/8,coarse:4/8"), "--plan takes one plan"),
    ):
        done = redi("tune", own, *arguments)
        assert (done.code, said in done.err) == (2, True), done.err
    assert not Tunings.read(KnowledgeBase.open(own)).plans
    done = redi("generate", own, "dog", "--out", tmp_path / "o", "--max-error", "0.5")
    assert done.code == 2
    assert "redi tune" in done.err
