"""The build benchmark runs whole in its quick form and judges what it measured; how fast is no test's business."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import build


@pytest.mark.slow
@pytest.mark.timeout(900)  # minutes on two cores that other tests use as well
def test_a_quick_look_measures_every_part(tmp_path: Path) -> None:
    assert build.main(["--quick", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "build.json").read_text())
    measured = document["measured"]
    assert {"in_turn", "naive", "redi", "one_rank", "two_ranks", "open", "fetch"} <= set(measured)
    for name in ("naive", "redi", "one_rank", "two_ranks"):
        for turn in measured[name]:
            assert min(turn["rows_per_s"], turn["processor_s"], turn["bytes_per_row"], turn["peak_mb"]) > 0
    assert min(measured["in_turn"][0][f"{name}_wall_s"] for name in ("redi", "naive", "naive_pictures")) > 0
    figures = {f["name"]: f for f in document["figures"]}
    assert figures["bytes per row, redi to the naive loop"]["reached"]
    # both ranks' processors count: half of the work cannot take two thirds of the time
    assert figures["processor time, one rank of a thread to two"]["value"] < 1.5


def test_ratios_are_medians_over_turns_that_were_measured_together() -> None:
    def turns(*rates: float) -> list[dict[str, float]]:
        return [{"rows_per_s": r, "processor_s": 1 / r, "bytes_per_row": 1.0, "peak_mb": 1.0} for r in rates]

    def together(**seconds: float) -> dict[str, float]:
        return {f"{name}_{what}_s": s for name, s in seconds.items() for what in ("wall", "processor")}

    measured = {
        "in_turn": [
            together(redi=1, naive=2, naive_pictures=1),
            together(redi=10, naive=30, naive_pictures=10),
            together(redi=2, naive=3, naive_pictures=2),
        ],
        "naive": turns(1),
        "redi": turns(1),
        "one_rank": turns(1, 1, 1),
        "two_ranks": turns(1.9, 1.9, 1.9),
        "redi_twice_the_rows": turns(1),
        "naive_twice_the_rows": turns(1),
        "open": [{"ms": 1.0, "mb": 2.0}],
        "fetch": [{"ms": 0.7}],
    }
    figures = {f.name: f for f in build.judge(measured)}
    latents = figures["rows/s, redi to the naive loop that ends with latents"]
    assert (latents.value, latents.reached) == (2, True)  # of 2, 3 and 1.5
    assert figures["processor time, the naive loop to redi"].value == pytest.approx(2)
    assert figures["rows/s, two ranks of a thread to one"].reached
    assert not figures["ms to fetch 8 rows of 3 × 32 KiB, warm"].reached
    assert figures["rows/s, redi to the naive loop that ends with pictures"].reached is None
