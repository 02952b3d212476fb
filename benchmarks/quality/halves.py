"""What half calls give: steps whose unconditional half is left to the rows, and the step that this leaves room for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from benchmarks.paper.settings import Settings
from benchmarks.paper.ways import Way
from benchmarks.quality.lab import STEPS, Lab, coarse, evenly, measured, one_noise, served
from redi import KnowledgeBase, Plan, zoo

BUDGETS: Final = (4, 5, 6, 8)
SCALES: Final = (3.0, 6.0)
RIVALS: Final[Mapping[str, Sequence[int]]] = {
    "deis-karras": (4, 5, 6, 8, 10, 12, 16),
    "deis-linspace": (4, 5, 6, 8, 10),
    "unipc-karras": (10, 12, 16),
}
"""The plain solvers that `frontier` finds best, and at how many calls."""


def halves(settings: Settings, pipe: Any) -> dict[str, Any]:
    """Whole calls, the first one halved, the first two halved and a step more, and the same steps with whole calls."""
    budgets, scales = (BUDGETS[:1], SCALES[:1]) if settings.quick else (BUDGETS, SCALES)
    points: list[dict[str, Any]] = []
    against: list[dict[str, Any]] = []
    plans: dict[str, str] = {}
    for scale in scales:
        lab = one_noise(settings, pipe, guidance=scale)
        kb = rows(lab)
        ways = [way for n in budgets for way in tried(n, scale)]
        calls = [(name, n) for name, counts in RIVALS.items() for n in (counts[:1] if settings.quick else counts)]
        ways += [Way(f"plain {name} {n}", name, n) for name, n in calls]
        judge, made = measured(lab, ways, {"rows": kb}, lab.queries)
        points += [{**p, "guidance": scale} for p in judge.table(ways, made)]
        by_name = {w.name: (w.name, m) for w, m in zip(ways, made, strict=True)}
        pairs = [(by_name[f"half calls {n}"], by_name[f"whole calls {n}"]) for n in budgets]
        against += [{**c, "way": f"{c['way']}, guidance {scale:g}"} for c in judge.compare(pairs)]
        plans |= {f"{w.name}, guidance {scale:g}": str(w.plan) for w in ways if w.plan}
    return {"points": points, "against": against, "plans": plans}


def tried(calls: int, guidance: float) -> list[Way]:
    """What is compared at so many calls; of the last two one makes half a call less, and one a call more."""

    def way(name: str, plan: Plan) -> Way:
        return served(calls, name, guidance=guidance, plan=str(plan), solver=coarse(plan.steps, guidance))

    whole = Plan.placed(calls, STEPS, guidance=guidance)
    half = Plan.placed(calls, STEPS, guidance=guidance, halved=True)
    at, more = ([s.start for s in plan.segments] for plan in (whole, half))
    return [
        way("whole calls", whole),
        way("half calls", half),
        way("the first one halved", Plan.of(at, STEPS, [0])),
        way("half calls made whole", Plan.of(more, STEPS)),
    ]


def rows(lab: Lab) -> KnowledgeBase:
    """Rows of the lab's guidance with every entry, and what the model says without a prompt early on."""
    early = [f"{at}h" if at <= STEPS // 4 else f"{at}" for at in range(STEPS)]
    plans = [f"at:{','.join(early)}/{STEPS}", evenly(STEPS // 2)]
    prompts = zoo.prompts("emoji", "train")[: min(1024, lab.settings.rows)]
    return lab.build(f"halves-{lab.guidance:g}", "dpmsolver++-karras", plans, prompts)
