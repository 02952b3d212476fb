"""The storage benchmark runs whole in its quick form; what it keeps in fewer bits comes back as near as they allow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import storage
from redi import zoo


@pytest.mark.slow
def test_a_quick_look_compares_every_way(tmp_path: Path) -> None:
    file = tmp_path / "storage.json"
    assert storage.main(["--quick", "--json", str(file)], zoo.load("emoji")) == 0
    document = json.loads(file.read_text())
    served = {f["way"]: f for f in document["served"]}
    assert list(served) == [way.name for way in storage.WAYS]
    exact = served["all in float32"]
    assert exact["latent_error_difference"] == exact["frechet_difference"] == [0, 0, 0]
    for way, f in served.items():
        assert f["latent_error"] > 0
        low, high = f["latent_error_difference"][1:]
        assert low <= f["latent_error_difference"][0] <= high
        if "rank" not in way:  # to a hundredth, whatever the pictures
            assert f["latent_error"] == pytest.approx(exact["latent_error"], rel=1e-2)
    assert served["all in float16"]["bytes_row"] < 0.6 * exact["bytes_row"]
    assert [f["shape"] for f in document["gather"]] == [[8, 8, 8], [4, 64, 64]]
    assert [f["table, float16"] for f in document["stable_diffusion"]] == [6 * 32 * 1024, 9 * 32 * 1024]
    assert "| coarse:8/40 | all in float16 |" in (tmp_path / "storage.md").read_text()


def test_what_comes_back(tmp_path: Path) -> None:
    x = torch.randn(20, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    for keep, row in ((storage.cast(torch.float16), 120), (storage.int8(2), 60 + 3 * 4), (storage.int8(0), 60)):
        kept = keep(x)
        assert kept.row == row
        torch.testing.assert_close(kept.back, x, rtol=1e-2, atol=2e-2)
    for joint, row in ((False, 19 * 2 * 3), (True, 19 * 2)):  # nineteen directions span twenty rows about their mean
        kept = storage.low_rank(19, joint=joint)(x)
        assert kept.row == row
        torch.testing.assert_close(kept.back, x, rtol=1e-2, atol=1e-2)
        assert (storage.low_rank(2, joint=joint)(x).back - x).norm() > 0.1 * x.norm()
