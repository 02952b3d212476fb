"""`redi merge`: parts of one work list, built apart, are what one build of all of it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from redi.knowledge_base import KnowledgeBase, verify
from tests.cli.conftest import PROMPTS, Redi


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, model: Path) -> list[Path]:
    from redi.cli import main

    folder = tmp_path_factory.mktemp("parts")
    for i, texts in enumerate((PROMPTS[:4], PROMPTS[2:])):  # two of them twice
        (folder / f"{i}.txt").write_text("\n".join(texts))
        arguments = ["build", model, folder / f"{i}.txt", folder / str(i), "--plan", "coarse:2/3"]
        assert main([str(a) for a in arguments]) == 0
    return [folder / "0", folder / "1"]


def test_parts_are_joined(redi: Redi, parts: list[Path], tmp_path: Path) -> None:
    done = redi("merge", *parts, tmp_path / "out", "--json", "-")
    assert done.code == 0, done.err
    assert (done.json["rows"], done.json["added"], done.json["repeated"]) == (7, 7, 2)
    assert "2 rows were there already" in done.err
    assert KnowledgeBase.open(tmp_path / "out").prompts == PROMPTS
    assert verify(tmp_path / "out").ok
    pictures = redi("generate", tmp_path / "out", "red apple", "--out", tmp_path / "pictures")
    assert pictures.code == 0, pictures.err


def test_what_does_not_belong_together_is_refused_in_a_line(
    redi: Redi, parts: list[Path], kb: Path, tmp_path: Path
) -> None:
    for arguments, says in (
        ((parts[0], kb, tmp_path / "out"), "plans"),
        ((*parts, parts[0]), "different folders"),
        ((tmp_path, tmp_path / "out"), "not a knowledge base"),
        ((parts[0],), "required: out"),
        ((*parts, tmp_path / "out", "--shard-rows", "0"), "--shard-rows"),
    ):
        done = redi("merge", *arguments)
        assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
        assert says in done.err
    assert not (tmp_path / "out").exists()
