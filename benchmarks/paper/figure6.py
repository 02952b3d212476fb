"""Figure 6: what the size of the knowledge base, the length of the leap, its beginning and the neighbours do.

python -m benchmarks.paper.figure6 --out bench/paper
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

from benchmarks import bundled
from benchmarks.paper import knowledge_bases, report
from benchmarks.paper.common import World
from benchmarks.paper.measures import Judge
from benchmarks.paper.settings import Settings
from benchmarks.paper.ways import Way
from redi import Affine, Defect, Residual

PNDM: Final = Way("", "pndm", 50, rows="pndm", plan="jump:10:30/50", neighbors=2)
DPM: Final = Way("", "dpmsolver++", 20, rows="dpm", plan="jump:5:10/20", neighbors=2)
OWN: Final = {"neighbors": 16, "combiner": Affine()}
BASES: Final[Mapping[str, Way]] = {
    "value, PNDM": PNDM,
    "residual, PNDM": replace(PNDM, transport=Residual(), **OWN),
    "value, DPM-Solver++": DPM,
    "defect, DPM-Solver++": replace(DPM, transport=Defect(), **OWN),
}
"""The settings that one is changed of at a time; H = 2 is the paper's."""
SIZES: Final = (64, 192, 512)  # and all
NEIGHBORS: Final = (1, 2, 4, 8, 16)
GAPS: Final = {"pndm": (5, 10, 20, 30, 35), "dpmsolver++": (2, 3, 5, 8, 10)}
KEYS: Final = {"pndm": (2, 5, 10, 15, 25), "dpmsolver++": (1, 3, 5, 8, 12)}
LABELS: Final = {
    "size": "prompts in the knowledge base",
    "gap": "length of the leap k − v (of 50, or of 20)",
    "key": "steps done before the leap",
    "neighbors": "H",
}
MEASURES: Final = ("frechet", "latent_error")


def main(argv: Sequence[str] | None = None, pipe: object = None) -> int:
    settings = Settings.parse(argv, "benchmarks.paper.figure6", __doc__)
    world = World(settings, pipe or bundled.load(compiled=not settings.quick))
    rows_of = {"pndm": knowledge_bases.pndm(world), "dpm": knowledge_bases.dpm(world)}
    queries = world.queries[: bundled.BATCH]
    rows: list[dict[str, Any]] = []
    for solver in GAPS:
        bases = {name: base for name, base in BASES.items() if base.solver == solver}
        points = [p for name, base in bases.items() for p in sweeps(name, base, settings)]
        fine = Way("fine solve", solver, PNDM.steps if solver == "pndm" else DPM.steps)
        reference, *made = world.sample([fine, *(way for _, _, way in points)], rows_of, queries)
        judge = Judge(world, queries, reference)
        for (sweep, at, _), measured in zip(points, judge.table([w for _, _, w in points], made), strict=True):
            rows.append({"sweep": sweep, "at": at, **measured})
    said = report.document(settings, "benchmarks.paper.figure6", rows=rows)
    said["queries"] = len(queries)
    tables = [
        f"## {LABELS[sweep]}\n\n" + report.table([r for r in rows if r["sweep"] == sweep], published=False)
        for sweep in LABELS
    ]
    report.write(settings, "figure6", "Figure 6: what changes the leap", said, [report.LEGEND, *tables])
    plot(rows, settings.out / "figure6.png")
    return 0


def sweeps(name: str, base: Way, settings: Settings) -> list[tuple[str, int, Way]]:
    """(sweep, where in it, way) for every setting around a base."""
    step = base.steps
    key, value = (10, 30) if base.solver == "pndm" else (5, 10)
    found = [("size", n, replace(base, most=n)) for n in SIZES if n < settings.rows] + [("size", settings.rows, base)]
    found += [("gap", g, replace(base, plan=f"jump:{key}:{key + g}/{step}")) for g in GAPS[base.solver]]
    found += [("key", k, replace(base, plan=f"jump:{k}:{k + value - key}/{step}")) for k in KEYS[base.solver]]
    found += [("neighbors", h, replace(base, neighbors=h)) for h in NEIGHBORS]
    if settings.quick:
        seen = [next(p for p in found if p[0] == sweep) for sweep in LABELS]
        found = [*seen, ("size", 8, replace(base, most=8))]
    return [(sweep, at, replace(way, name=f"{name}, {at}")) for sweep, at, way in found]


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A column of panels for each sweep, a line for each base."""
    figure = Figure(figsize=(4 * len(LABELS), 3.1 * len(MEASURES) + 0.5), layout="constrained")
    panels = figure.subplots(len(MEASURES), len(LABELS), squeeze=False)
    for line, measure in zip(panels, MEASURES, strict=True):
        for axes, (sweep, label) in zip(line, LABELS.items(), strict=True):
            series = {
                name: [r for r in rows if r["sweep"] == sweep and r["way"].startswith(f"{name},")] for name in BASES
            }
            report.draw(axes, series, measure, "at")
            axes.set(xlabel=label, ylabel=report.COLUMNS[measure])
            if sweep in ("size", "neighbors"):
                axes.set_xscale("log", base=2)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
