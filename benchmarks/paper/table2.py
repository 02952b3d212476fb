"""Table 2: DPM-Solver's 20 steps, run for fewer steps, or leapt over after the fifth.

python -m benchmarks.paper.table2 --out bench/paper
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import bundled
from benchmarks.paper import knowledge_bases, report
from benchmarks.paper.common import World
from benchmarks.paper.measures import Judge
from benchmarks.paper.settings import Settings
from benchmarks.paper.table1 import measures
from benchmarks.paper.ways import Way
from redi import Affine, Defect, Residual

VALUES = (8, 10, 13, 15)  # steps done when the leap arrives; it leaves after 5
COARSE = (8, 10, 12)


def main(argv: Sequence[str] | None = None, pipe: object = None) -> int:
    settings = Settings.parse(argv, "benchmarks.paper.table2", __doc__)
    world = World(settings, pipe or bundled.load(compiled=not settings.quick))
    kb = knowledge_bases.dpm(world)
    todo = ways(settings.quick)
    made = world.sample(todo, {"dpm": kb}, world.queries)
    judge = Judge(world, world.queries, made[0])
    rows, against = judge.table(todo, made), judge.at_equal_calls(todo, made)
    said = report.document(settings, "benchmarks.paper.table2", rows=rows, comparisons=against)
    title = "Table 2: DPM-Solver++ 2M, 20 steps"
    report.write(
        settings,
        "table2",
        title,
        said,
        [report.LEGEND, report.table(rows), report.comparison(report.AT_EQUAL_CALLS, against)],
    )
    lines = ("value H=1", "value H=2", "residual H=16", "defect H=16, 5", "defect H=16, coarse")
    series = {
        "plain DPM-Solver++": [r for r in rows if not r["leaps"]],
        **{name: [r for r in rows if r["way"].startswith(name)] for name in lines},
    }
    report.curves(settings.out / "table2.png", series, measures(settings))
    return 0


def ways(quick: bool) -> list[Way]:
    """The fine solve first."""
    plain = [
        Way(f"plain DPM-Solver++ {n}", "dpmsolver++", n, published=n if n in (20, 17, 15, 12, 10) else None)
        for n in (20, 18, 17, 16, 15, 13, 12, 11, 10, 8)
    ]
    jumps: list[Way] = []
    for value in VALUES:
        settings = {"rows": "dpm", "plan": f"jump:5:{value}/20"}
        published = {"published": 25 - value}
        jumps += [
            Way(f"value H={h}, 5:{value}", "dpmsolver++", 20, neighbors=h, **settings, **published) for h in (1, 2)
        ]
        for h in (2, 16):
            more = {"transport": Residual(), "combiner": Affine(), "neighbors": h}
            jumps.append(Way(f"residual H={h}, 5:{value}", "dpmsolver++", 20, **settings, **published, **more))
        for h in (2, 16):
            more = {"transport": Defect(), "combiner": Affine(), "neighbors": h}
            jumps.append(Way(f"defect H={h}, 5:{value}", "dpmsolver++", 20, **settings, **more))
    more = {"transport": Defect(), "combiner": Affine(), "neighbors": 16, "rows": "dpm"}
    coarse = [Way(f"defect H=16, coarse:{n}", "dpmsolver++", 20, plan=f"coarse:{n}/20", **more) for n in COARSE]
    return [plain[0], plain[-2], jumps[-6], jumps[-3], coarse[1]] if quick else [*plain, *jumps, *coarse]


if __name__ == "__main__":
    sys.exit(main())
