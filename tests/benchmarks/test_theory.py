"""Bounds next to errors run whole in their quick form, go on where they stopped, and keep test prompts apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bundled
from benchmarks.paper.settings import Settings, caption
from benchmarks.theory import __main__ as command
from benchmarks.theory.world import TheoryWorld
from redi import zoo


def test_no_prompt_of_the_test_is_in_the_rows_or_the_calibration(tmp_path: Path) -> None:
    world = TheoryWorld(Settings(tmp_path, tmp_path, 1024, 128, 1, 0, None, False), None)
    rows = zoo.prompts("emoji", "train")[:1024]
    assert not set(world.fresh) & set(rows)
    tested = {caption(q) for q in world.queries}
    assert not tested & {caption(p) for p in (*world.fresh, *rows)}


@pytest.mark.slow
def test_the_quick_form_and_a_second_run_without_model_calls(tmp_path: Path, monkeypatch: Any) -> None:
    pipe = bundled.load(compiled=False)
    file = tmp_path / "theory.json"
    assert command.main(["--quick", "--json", str(file)], pipe) == 0
    said = json.loads(file.read_text())
    assert {r["transport"] for r in said["value"]} == {
        "value",
        "residual",
        "defect, jump",
        "defect, every step",
        "all",
    }
    for row in (*said["value"], *said["end"]):
        assert all(-1 <= r <= 1 for r in (*row["raw"], *row["calibrated"], row["samples"], *row["within"]))
    assert all(p["error"] > 0 and p["mean"] > 0 for p in said["points"])
    assert (tmp_path / "theory.png").stat().st_size > 10_000
    monkeypatch.setattr(pipe.unet, "forward", lambda *_, **__: pytest.fail("a model call"))
    command.main(["--quick", "--json", str(file)], pipe)
    again = json.loads(file.read_text())
    assert again["points"] == said["points"]
