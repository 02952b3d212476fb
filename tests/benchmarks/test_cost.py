"""What a knowledge base is said to weigh its files weigh, and what it is said to take is what `redi info` says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import cost
from redi.backends import Exact
from redi.cli.info import cost as informed

pytest.importorskip("faiss", reason="faiss is not installed")

SHAPE = (4, 17, 16)  # more numbers than AXES_FROM, as real latents have


def files(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> cost.Sizes:
    return cost.measured(tmp_path_factory.mktemp("weighed"), 16, SHAPE)


def test_the_line_meets_real_files(sizes: cost.Sizes, tmp_path: Path) -> None:
    kb = cost.write(tmp_path / "kb", 40, 2, SHAPE)
    weighed = cost.weigh(kb, Exact())
    foretold = sizes.of(40, 2, 1088)
    for part, name in (("rows", "rows"), ("table", "table"), ("index", "Exact")):
        assert foretold[part] == pytest.approx(weighed[name], rel=0.02), part
    assert foretold["all"] == pytest.approx(files(kb.path), rel=0.02)


def test_the_line_of_principal_directions_goes_on(sizes: cost.Sizes, tmp_path: Path) -> None:
    assert sizes.directions.at(9000) == pytest.approx(cost.directions(tmp_path / "index", 9000, 1088), rel=0.01)
    assert sizes.of(1 << 20, 2, 1088)["index"] == pytest.approx(2 * sizes.directions.at(1 << 20))


def test_calls_are_those_that_info_counts(tmp_path: Path) -> None:
    said = informed(cost.write(tmp_path / "kb", 3, 2, SHAPE))
    account = cost.account(6)
    assert said["model_calls"] == account.model_calls == 6 * 40
    assert [{k: v for k, v in plan.items() if k in account.to_json()} for plan in said["plans"]] == [account.to_json()]


def test_hours_are_calls_over_the_given_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c" / "cost.json"
    assert cost.main(["--calls-per-second", "20", "--quick", "--json", str(file)], SHAPE) == 0
    lines = json.loads(file.read_text())["lines"]
    assert [(line["noises"], line["rows_per_noise"]) for line in lines] == [
        (m, n) for m in cost.NOISES for n in cost.ROWS
    ]
    for line in lines:
        assert line["model_calls"] == 40 * line["rows_per_noise"] * line["noises"]
        assert line["hours"] * 20 * 3600 == pytest.approx(line["model_calls"])
        assert (line["break_even"] - 1) * line["saved"] < line["model_calls"] <= line["break_even"] * line["saved"]
        # 17 entries in half precision, an embedding, and little else
        row = line["bytes"]["rows"] / (line["rows_per_noise"] * line["noises"])
        assert 2 * (17 * 1088 + cost.EMBEDDING) < row < 2 * (17 * 1088 + cost.EMBEDDING) + 1000
    assert file.with_suffix(".md").read_text() in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cost.main(["--calls-per-second", "0"])
