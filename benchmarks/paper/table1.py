"""Table 1: PNDM's 50 steps, run for fewer steps, or leapt over by what 1 or 2 neighbours did.

python -m benchmarks.paper.table1 --out bench/paper
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import bundled
from benchmarks.paper import knowledge_bases, report
from benchmarks.paper.common import World
from benchmarks.paper.measures import Judge
from benchmarks.paper.settings import Settings
from benchmarks.paper.ways import Way
from redi import Affine, Residual

VALUES = (20, 30, 40)  # of 50; 10 of the 50 are done before the leap
LONG = 250


def main(argv: Sequence[str] | None = None, pipe: object = None) -> int:
    settings = Settings.parse(argv, "benchmarks.paper.table1", __doc__)
    world = World(settings, pipe or bundled.load(compiled=not settings.quick))
    kb = knowledge_bases.pndm(world)
    todo = ways(settings.quick)
    made = world.sample(todo, {"pndm": kb}, world.queries)
    judge = Judge(world, world.queries, made[0])
    rows, against = judge.table(todo, made), judge.at_equal_calls(todo, made)
    said = report.document(settings, "benchmarks.paper.table1", rows=rows, comparisons=against)
    title = "Table 1: PNDM, 50 steps"
    report.write(
        settings,
        "table1",
        title,
        said,
        [report.LEGEND, report.table(rows), report.comparison(report.AT_EQUAL_CALLS, against)],
    )
    series = {
        "plain PNDM": [r for r in rows if r["solver"] == "pndm" and not r["leaps"]],
        **{
            name: [r for r in rows if r["way"].startswith(name)] for name in ("value H=1", "value H=2", "residual H=16")
        },
    }
    report.curves(settings.out / "table1.png", series, measures(settings))
    return 0


def measures(settings: Settings) -> list[str]:
    """What is plotted."""
    return [*(["frechet_real"] if settings.data else []), "frechet", "latent_error", "text_score"]


def ways(quick: bool) -> list[Way]:
    """The fine solve first."""
    plain = [Way(f"plain PNDM {n}", "pndm", n, published=n) for n in (50, 40, 30, 20)]
    long = Way(f"plain DDIM {LONG}", "ddim", LONG, published=LONG)
    jumps: list[Way] = []
    for value in VALUES:
        settings = {"rows": "pndm", "plan": f"jump:10:{value}/50", "published": 60 - value}
        jumps += [Way(f"value H={h}, 10:{value}", "pndm", 50, neighbors=h, **settings) for h in (1, 2)]
        for h in (2, 16):
            more = {"transport": Residual(), "combiner": Affine(), "neighbors": h}
            jumps.append(Way(f"residual H={h}, 10:{value}", "pndm", 50, **settings, **more))
    return [plain[0], plain[-1], jumps[-4], jumps[-1]] if quick else [*plain, *jumps, long]


if __name__ == "__main__":
    sys.exit(main())
