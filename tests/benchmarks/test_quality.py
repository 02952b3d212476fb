"""The frontier and what decides it run whole in their quick forms; what is read off curves is what curves say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bundled
from benchmarks.quality import __main__ as command
from benchmarks.quality import lab, plain, studies, where
from benchmarks.quality.frontier import matching


@pytest.fixture(scope="module")
def pipe() -> Any:
    return bundled.load(compiled=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality")


def test_the_frontier(folder: Path, pipe: Any) -> None:
    file = folder / "quality.json"
    assert command.main(["--quick", "--json", str(file)], pipe) == 0
    said = json.loads(file.read_text())
    points = said["points"]
    assert {p["kind"] for p in points} == {"fine", "plain", "redi", "redi otherwise", "without rows"}
    for p in points:
        assert {"method", "nfe", "frechet", "latent_error", "text_score", "seconds"} <= set(p)
        low, high = p["latent_error_interval"]
        assert low <= p["latent_error"] <= high
        assert (p["latent_error"] == 0) == (p["kind"] == "fine")
    assert {p["nfe"] for p in points if p["kind"] == "redi"} == {4, 8}
    assert {row["nfe"] for row in said["against"]} == {4, 8}
    assert said["command"] == "python -m benchmarks.quality frontier --quick"
    assert (folder / "quality.png").stat().st_size > 10_000
    assert "| 4 | latent L2 |" in (folder / "quality.md").read_text()


def test_a_second_run_makes_no_calls(folder: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    command.main(["noises", "--quick", "--json", str(folder / "quality.json")], pipe)
    found = json.loads((folder / "quality-noises.json").read_text())
    monkeypatch.setattr(pipe.unet, "forward", lambda *_, **__: pytest.fail("a model call"))
    command.main(["noises", "--quick", "--json", str(folder / "quality.json")], pipe)
    assert json.loads((folder / "quality-noises.json").read_text()) == found
    errors = {(p["way"], p["eta"]): p["latent_error"][0] for p in found["points"]}
    assert len(set(errors.values())) == len(errors)  # other noises are other queries


@pytest.mark.slow
@pytest.mark.parametrize("study", studies.STUDIES)
def test_every_study(study: str, folder: Path, pipe: Any) -> None:
    assert command.main([study, "--quick", "--json", str(folder / "quality.json")], pipe) == 0
    assert json.loads((folder / f"quality-{study}.json").read_text())["points"]


def test_a_study_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["nonsense"])
    assert "there is no study nonsense" in capsys.readouterr().err


def test_calls_to_match_are_read_off_the_curve() -> None:
    halving = {n: 2.0**-n for n in (4, 6, 8, 12)}
    assert matching(halving, 2.0**-7) == pytest.approx(7)
    assert matching(halving, 2.0**-8) == pytest.approx(8)
    assert matching(halving, 1.0) == 4  # the least that was run
    assert matching(halving, 1e-9) is None


@pytest.mark.parametrize("guidance", [1.5, 3.0, 6.0])
def test_coarse_steps_are_those_that_a_pipeline_is_served(pipe: Any, guidance: float) -> None:
    rows = plain.solver(plain.FINE, pipe.scheduler)
    for calls in lab.BUDGETS:
        ours = plain.solver(lab.coarse(calls, guidance), pipe.scheduler)
        assert ours.identity() == rows.for_coarse_steps(lab.STEPS, calls, guidance).identity()


def test_rows_that_halve_the_error_have_that_exponent() -> None:
    points = [{"rows": n, "calls": 5, "latent_error": [n**-0.25, 0, 0]} for n in (100, 1000, 10_000)]
    found = studies.curve(points, 5)
    assert found["exponent"] == pytest.approx(0.25)
    assert found["latent error at 100,000 rows"] == pytest.approx(1e5**-0.25)


def test_places_are_moved_to_where_the_error_is_least() -> None:
    wanted = [0, 3, 17, 31]
    error = lambda places: sum(abs(a - b) for a, b in zip(places, wanted, strict=True))  # noqa: E731
    assert where.moved([0, 10, 20, 30], error, most=40) == wanted
    assert where.moved([0, 10, 20, 30], error, most=1) == [0, 7, 17, 30]


def test_places_move_together_where_one_alone_would_be_worse() -> None:
    uneven = lambda places: 10 * abs(places[2] - places[1] - 9) + abs(places[1] - 14)  # noqa: E731
    assert where.moved([0, 10, 19], uneven, most=40) == [0, 14, 23]


def test_every_spacing_of_every_family_is_a_solver(pipe: Any) -> None:
    for family, spacings in plain.FAMILIES.items():
        grids = [plain.solver(f"{family}-{s}", pipe.scheduler).schedule(8).timesteps.tolist() for s in spacings]
        assert len({tuple(g) for g in grids}) == len(spacings)
