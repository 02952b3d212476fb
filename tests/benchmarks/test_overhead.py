"""The overhead benchmark runs and writes what it says it does; what it measures is no test's business."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.overhead import main


@pytest.mark.slow
def test_a_quick_look_writes_every_clock(tmp_path: Path) -> None:
    assert main(["--quick", "--pipelines", "emoji", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "overhead.json").read_text())
    assert document["quick"]
    assert [f["batch"] for f in document["figures"]] == [1, 2]
    for figure in document["figures"]:
        assert figure["model_seconds"] > 0
        assert figure["kept"] > 0
        assert {"retrieval", "gather", "combine", "total"} <= set(figure["stages"])
    assert (tmp_path / "overhead.md").read_text().count("\n") == 4
