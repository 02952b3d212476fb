"""The tables of the paper run whole in their quick form, go on where they stopped, and keep queries out of the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bundled
from benchmarks.paper import __main__ as everything
from benchmarks.paper import knowledge_bases, table2
from benchmarks.paper.common import World
from benchmarks.paper.figure4 import queries
from benchmarks.paper.settings import Settings, caption
from benchmarks.paper.ways import Way


@pytest.fixture(scope="module")
def pipe() -> Any:
    return bundled.load(compiled=False)


def settings(folder: Path, *more: str) -> Settings:
    return Settings.parse(["--out", str(folder), *more], "benchmarks.paper", None)


def test_no_caption_of_a_query_is_in_a_knowledge_base(tmp_path: Path) -> None:
    world = World(settings(tmp_path), None)
    asked = {caption(q) for q in world.queries}
    assert len(asked) == len(world.queries) == 128
    assert not asked & {caption(p) for p in knowledge_bases.train(world)}
    captions, styled = queries(world.settings)
    assert [caption(s) for s in styled] == captions
    assert not set(captions) & {caption(p) for p in knowledge_bases.train(world)}


def test_a_prompt_that_changes_into_itself_changes_nothing(tmp_path: Path, pipe: Any) -> None:
    world = World(settings(tmp_path, "--quick"), pipe)
    ways = [Way("plain", "pndm", 5), Way("switched", "pndm", 5, switch=2)]
    captions, styled = queries(world.settings)
    plain, same = world.sample(ways, {}, captions, captions)
    assert torch.equal(plain.latents, same.latents)
    (late,) = world.sample(ways[1:], {}, captions, styled)
    assert not torch.allclose(late.latents, same.latents)
    assert plain.calls == same.calls == 6  # PLMS repeats its second entry


def test_a_table_is_written_and_a_second_run_makes_no_calls(tmp_path: Path, pipe: Any, monkeypatch: Any) -> None:
    command = ["--quick", "--out", str(tmp_path)]
    assert table2.main(command, pipe) == 0
    document = json.loads((tmp_path / "table2.json").read_text())
    assert document["quick"]
    assert not document["real_pictures"]
    rows = {row["way"]: row for row in document["rows"]}
    assert {name: row["calls"] for name, row in rows.items()} == {
        "plain DPM-Solver++ 20": 20,
        "plain DPM-Solver++ 10": 10,
        "value H=1, 5:15": 10,
        "residual H=16, 5:15": 10,
        "defect H=16, coarse:10": 10,
    }
    assert rows["plain DPM-Solver++ 20"]["latent_error"] == [0, 0, 0]
    assert all(row["latent_error"][0] > 0.1 for name, row in rows.items() if "20" not in name)
    assert [c["against"] for c in document["comparisons"]] == 3 * ["plain DPM-Solver++ 10"]
    assert (tmp_path / "table2.png").stat().st_size > 10_000
    monkeypatch.setattr("benchmarks.paper.denoiser.Denoiser.__call__", None)
    assert table2.main(command, pipe) == 0
    assert json.loads((tmp_path / "table2.json").read_text()) == document


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_table_and_figure_is_written(tmp_path: Path) -> None:
    assert everything.main(["--quick", "--out", str(tmp_path)]) == 0
    for name in ("table1", "table2", "table3", "figure4", "figure6"):
        document = json.loads((tmp_path / f"{name}.json").read_text())
        assert document["command"] == f"python -m benchmarks.paper.{name} --quick"
        for row in document["rows"]:
            for low, high in (row[m][1:] for m in ("latent_error", "text_score", "frechet") if m in row):
                assert low <= high
        assert document["comparisons" if name != "figure6" else "rows"]
        assert (tmp_path / f"{name}.md").exists()
    assert {p.name for p in tmp_path.glob("*.png")} == {f"{n}.png" for n in ("table1", "table2", "figure4", "figure6")}
