"""The table against the parts it is made from, and the forms it is written in."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from redi.evaluation import LatentFeatures, Table, Way, evaluate, plots, words
from redi.evaluation.seen import MEASURES, Seen
from redi.intervals import bootstrap, holm, paired
from redi.knowledge_base import KnowledgeBase
from redi.metrics import frechet_distance
from tests.evaluation.conftest import QUERIES, contest

PROMPTS = (*QUERIES, "a heart", "blue apple")
REPEATS = 30


@pytest.fixture(scope="module")
def seen(pipe: Any, kb: KnowledgeBase, ways: Sequence[Way], tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    found = evaluate(pipe, contest(kb, ways, PROMPTS), tmp_path_factory.mktemp("eval"))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def table(kb: KnowledgeBase, ways: Sequence[Way], seen: list[Seen]) -> Table:
    return Table.of(contest(kb, ways, PROMPTS), seen, repeats=REPEATS)


def test_the_fine_solve_has_no_error(table: Table) -> None:
    fine = table.rows[0]
    assert fine.way.kind == "fine"
    for measure in ("frechet", "latent_error", "l2"):
        found = fine.measures[measure]
        assert found is not None
        assert (found.value, found.low, found.high) == pytest.approx((0, 0, 0), abs=1e-9)
    assert fine.measures["at_value"] is None
    assert fine.nfe == 6


def test_measures_and_intervals_are_those_of_the_library(
    table: Table, kb: KnowledgeBase, ways: Sequence[Way], seen: list[Seen]
) -> None:
    groups = contest(kb, ways, PROMPTS).groups
    assert groups == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    for row, s in zip(table.rows, seen, strict=True):
        expected = bootstrap(
            frechet_distance, s.features.double(), seen[0].features.double(), groups=groups, repeats=REPEATS
        )
        found = row.measures["frechet"]
        assert found is not None
        assert found.value == pytest.approx(expected.value, rel=1e-9, abs=1e-12)
        assert (found.low, found.high) == pytest.approx((max(expected.low, 0), expected.high), rel=1e-9, abs=1e-12)
        error, mean = row.measures["latent_error"], float(s.of("latent_error").mean())
        assert error is not None
        assert error.value == pytest.approx(mean, rel=1e-12)
        assert row.nfe == row.way.calls


def test_every_way_of_redi_meets_a_plain_solver_of_as_many_calls(
    table: Table, ways: Sequence[Way], kb: KnowledgeBase, seen: list[Seen]
) -> None:
    leaping = [w for w in ways if w.kind == "redi"]
    assert {a.way.name for a in table.against} == {w.name for w in leaping}
    by_name = dict(zip([w.name for w in ways], seen, strict=True))
    groups, raw = contest(kb, ways, PROMPTS).groups, list[float]()
    for a in table.against:
        assert (a.plain.kind, a.plain.calls) == ("plain", a.way.calls)
        mine, theirs = by_name[a.way.name].of("latent_error"), by_name[a.plain.name].of("latent_error")
        expected = paired(mine, theirs, groups)  # with as many draws
        found = a.differences["latent_error"]
        assert found is not None
        ends = (expected.interval.value, expected.interval.low, expected.interval.high)
        assert (found.value, found.low, found.high) == pytest.approx(ends, rel=1e-9)
        raw.append(expected.p)
        both = [by_name[n].features.double() for n in (a.way.name, a.plain.name)]
        distance = a.differences["frechet"]
        assert distance is not None
        gap = frechet_distance(both[0], seen[0].features) - frechet_distance(both[1], seen[0].features)
        assert distance.value == pytest.approx(gap, rel=1e-9, abs=1e-12)
    adjusted = [a.p["latent_error"] for a in table.against]
    assert adjusted == pytest.approx(holm(raw), abs=0.02)  # theirs are centred on the draws' mean
    assert all(p is not None and p > 1 / (REPEATS + 1) for p in (a.p["frechet"] for a in table.against))


def test_what_is_not_finite_is_left_out(kb: KnowledgeBase, ways: Sequence[Way], seen: list[Seen]) -> None:
    broken = list(seen)
    i = next(i for i, w in enumerate(ways) if w.kind == "redi")
    measures = seen[i].measures.clone()
    measures[:, MEASURES.index("ssim")] = torch.nan
    broken[i] = Seen(measures, torch.full_like(seen[i].features, torch.nan), seen[i].seconds)
    found = Table.of(contest(kb, ways, PROMPTS), broken, repeats=5)
    assert found.rows[i].measures["frechet"] is None
    assert found.rows[i].measures["ssim"] is None
    assert found.rows[i].measures["latent_error"] is not None
    against = next(a for a in found.against if a.way is ways[i])
    assert against.differences["frechet"] is None
    assert against.p["frechet"] is None
    assert found.rows[0].measures["lpips"] is None


def test_the_latents_in_their_principal_directions(kb: KnowledgeBase, ways: Sequence[Way], seen: list[Seen]) -> None:
    latents = [Seen(s.measures, torch.randn(10, 12).float() + i, s.seconds) for i, s in enumerate(seen)]
    test = contest(kb, ways, PROMPTS, features=LatentFeatures())
    found = Table.of(test, latents, repeats=5).rows[1].measures["frechet"]
    expected = frechet_distance(latents[1].features, latents[0].features, directions=2)  # a quarter of ten
    assert found is not None
    assert found.value == pytest.approx(expected, rel=1e-6)


def test_the_same_table_in_every_form(table: Table, tmp_path: Path) -> None:
    said = json.loads(json.dumps(table.to_json()))
    assert [r["name"] for r in said["rows"]] == [r.way.name for r in table.rows]
    read = list(csv.DictReader(io.StringIO(words.to_csv(table))))
    for line, row in zip(read, said["rows"], strict=True):
        assert float(line["nfe"]) == row["nfe"]
        assert [float(line[f"frechet{e}"]) for e in ("", "_low", "_high")] == pytest.approx(row["frechet"])
        assert (line["at_value"] == "") == (row["at_value"] is None)
        assert line["lpips"] == ""
        assert float(line["seconds_total"]) == row["seconds"]["total"]
    text = words.to_markdown(table)
    head, *_ = [line for line in text.splitlines() if line.startswith("|")]
    assert "LPIPS" not in head  # nobody measured it
    for tabular in text.split("\n\n"):
        lines = [line for line in tabular.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1
    assert all(f"| {r.way.name} |" in text for r in table.rows)
    plots.draw(table, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert min(image.size) > 400
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20
