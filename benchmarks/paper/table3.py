"""Table 3: neighbours found by the trajectory's beginning, or by the prompt's embedding alone.

python -m benchmarks.paper.table3 --out bench/paper
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import bundled
from benchmarks.paper import knowledge_bases, report
from benchmarks.paper.common import World
from benchmarks.paper.measures import Judge
from benchmarks.paper.settings import Settings
from benchmarks.paper.ways import Way
from redi import Affine, Defect, Residual

PLANS = {"pndm": "jump:10:30/50", "dpm": "coarse:10/20"}


def main(argv: Sequence[str] | None = None, pipe: object = None) -> int:
    settings = Settings.parse(argv, "benchmarks.paper.table3", __doc__)
    world = World(settings, pipe or bundled.load(compiled=not settings.quick))
    rows_of = {"pndm": knowledge_bases.pndm(world), "dpm": knowledge_bases.dpm(world)}
    rows: list[dict[str, Any]] = []
    compared: list[dict[str, Any]] = []
    for fine, pairs in groups(settings.quick):
        todo = [way for pair in pairs for way in pair]
        reference, *made = world.sample([fine, *todo], rows_of, world.queries)
        judge = Judge(world, world.queries, reference)
        rows += judge.table(todo, made)
        named = [(w.name, m) for w, m in zip(todo, made, strict=True)]
        compared += judge.compare(list(zip(named[::2], named[1::2], strict=True)))
    said = report.document(settings, "benchmarks.paper.table3", rows=rows, comparisons=compared)
    words = "Paired differences between the two keys, on the same prompts and noises."
    tables = [report.LEGEND, report.table(rows), report.comparison(words, compared)]
    report.write(settings, "table3", "Table 3: what neighbours are found by", said, tables)
    return 0


def groups(quick: bool) -> list[tuple[Way, list[tuple[Way, Way]]]]:
    """The fine solve, and pairs of ways that differ in their key alone."""
    value = [{"neighbors": h} for h in (1, 2)]
    residual = {"transport": Residual(), "combiner": Affine(), "neighbors": 16}
    pndm = [
        both(f"{name}, 10:30", "pndm", 50, "pndm", "sample", published=30, **more)
        for name, more in (("value H=1", value[0]), ("value H=2", value[1]), ("residual H=16", residual))
    ]
    dpm = [
        both(
            f"defect H={h}, coarse:10", "dpmsolver++", 20, "dpm", "denoised",
            transport=Defect(), combiner=Affine(), neighbors=h,
        )
        for h in (1, 16)
    ]  # fmt: skip
    found = [(Way("PNDM 50", "pndm", 50), pndm), (Way("DPM-Solver++ 20", "dpmsolver++", 20), dpm)]
    return [(fine, pairs[:1]) for fine, pairs in found] if quick else found


def both(name: str, solver: str, steps: int, rows: str, key: str, **more: Any) -> tuple[Way, Way]:
    """The same way with a key of the trajectory, and with the prompt's."""
    first, second = (
        Way(f"{name}, by {k}", solver, steps, rows=rows, plan=PLANS[rows], key=k, **more) for k in (key, "prompt")
    )
    return first, second


if __name__ == "__main__":
    sys.exit(main())
