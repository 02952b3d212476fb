"""What half calls give: steps whose unconditional half is left to the rows, and the step that this leaves room for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

from benchmarks import bundled
from benchmarks.paper import report
from benchmarks.paper.settings import Settings
from benchmarks.paper.ways import Way
from benchmarks.quality.frontier import MEASURES, envelope, matching, point
from benchmarks.quality.lab import STEPS, Lab, at, called, measured, one_noise, served
from redi import Plan
from redi.places import HALVED_UP_TO

COMPARED: Final = ("whole calls", "half calls")
BUDGETS: Final = (4, 5, 6, 8)
SCALES: Final = (1.5, 3.0, 4.5, 6.0)
RIVALS: Final[Mapping[str, Sequence[int]]] = {
    "deis-karras": (4, 5, 6, 8, 10, 12, 16),
    "deis-linspace": (4, 5, 6, 8, 10),
    "unipc-karras": (10, 12, 16),
}
"""The plain solvers that `frontier` finds best, and at how many calls."""


def halves(settings: Settings, pipe: Any) -> dict[str, Any]:
    """Whole calls, the first one halved, the first two halved and a step more, and the same steps with whole calls.

    At the scale that the other studies have from every noise, at others from one. Besides, noise of nobody's bank, for
    which a plan of half calls is the plain solver's steps and a call more.
    """
    budgets, scales = (BUDGETS[:1], SCALES[:1]) if settings.quick else (BUDGETS, SCALES)
    points: list[dict[str, Any]] = []
    against: list[dict[str, Any]] = []
    plans: dict[str, str] = {}
    strangers: list[dict[str, Any]] = []
    for scale in scales:
        lab = (Lab if scale == bundled.GUIDANCE else one_noise)(settings, pipe, guidance=scale)
        kb = lab.rows(f"halves-{scale:g}", min(1024, settings.rows))
        ways = [way for n in budgets for way in tried(n, scale)]
        calls = [(name, n) for name, counts in RIVALS.items() for n in (counts[:1] if settings.quick else counts)]
        ways += [Way(f"plain {name} {n}", name, n) for name, n in calls]
        judge, made = measured(lab, ways, {"rows": kb}, lab.queries)
        points += [{**p, "guidance": scale} for p in judge.table(ways, made)]
        by_name = {w.name: (w.name, m) for w, m in zip(ways, made, strict=True)}
        whole, half = ([by_name[f"{name} {n}"] for n in budgets] for name in COMPARED)
        pairs = list(zip(half, whole, strict=True))
        against += [{**c, "way": f"{c['way']}, guidance {scale:g}"} for c in judge.compare(pairs)]
        plans |= {f"{w.name}, guidance {scale:g}": str(w.plan) for w in ways if w.plan}
        if scale <= max(HALVED_UP_TO.values()):
            more, compared = strange(one_noise(settings, pipe, guidance=scale, away=1.0), {"rows": kb}, budgets)
            strangers += more
            against += compared
    return {
        "points": points,
        "against": against,
        "plans": plans,
        "matched": matched(points),
        "strangers": strangers,
    }


def strange(
    lab: Lab, rows: Mapping[str, Any], budgets: Sequence[int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """From noise of nobody's bank: what a plan of half calls serves, against plain solvers of as many calls.

    No row helps, so all calls are whole ones, one more, and the solver takes its steps from place to place alone.
    """
    ours = [made_whole(n, lab.guidance, f"half calls' places {n + 1}", neighbors=0) for n in budgets]
    others = [Way(f"plain {name} {n + 1}", name, n + 1) for name in ("deis-karras", "deis-linspace") for n in budgets]
    judge, made = measured(lab, [*ours, *others], rows, lab.queries)
    mine = {m.calls: (w.name, m) for w, m in zip(ours, made, strict=False)}
    pairs = [(mine[m.calls], (w.name, m)) for w, m in zip(others, made[len(ours) :], strict=True)]
    said = f", guidance {lab.guidance:g}, strangers"
    points = [{**p, "way": p["way"] + said} for p in judge.table([*ours, *others], made)]
    return points, [{**c, "way": c["way"] + said} for c in judge.compare(pairs)]


def matched(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of whole and half calls the measures, and how many calls the best plain solver needs for the same."""
    found: list[dict[str, Any]] = []
    for scale in dict.fromkeys(p["guidance"] for p in points):
        there = [point(p) for p in points if p["guidance"] == scale]
        for measure in ("frechet", *MEASURES):
            plain = {n: value for n, (_, value) in envelope(there, measure).items()}
            for p in there:
                if p["method"] in COMPARED:
                    needed = matching(plain, p[measure])
                    found.append(
                        {
                            "guidance": scale,
                            "measure": measure,
                            "way": f"{p['method']} {p['nfe']}",
                            "calls": p["nfe"],
                            "value": p[measure],
                            "times the calls": needed and needed / p["nfe"],
                        }
                    )
    return found


def tables(found: Mapping[str, Any]) -> list[str]:
    """What plain solvers need, every point, and what was compared."""
    heads = ["guidance", "measure", "way", "value", "plain calls for the same, × calls"]
    rows_ = [
        [f"{m['guidance']:g}", report.COLUMNS[m["measure"]], m["way"], f"{m['value']:.3g}", times(m["times the calls"])]
        for m in found["matched"]
    ]
    points = [{**p, "way": f"{p['way']}, guidance {p['guidance']:g}"} for p in found["points"]] + found["strangers"]
    compared = report.comparison("Paired differences on the same prompts and noises.", found["against"])
    return [report.markdown(heads, rows_), report.table(points, published=False), compared]


def times(count: float | None) -> str:
    return f"{count:.2f}" if count else "more than were tried"


def tried(calls: int, guidance: float) -> list[Way]:
    """What is compared at so many calls; of the last two one makes half a call less, and one a call more."""
    whole = served(calls, COMPARED[0], guidance=guidance)
    first = str(Plan.of(called(str(whole.plan)), STEPS, [0]))
    return [
        whole,
        served(calls, COMPARED[1], guidance=guidance, halved=True),
        dataclasses.replace(whole, name=f"the first one halved {calls}", plan=first),
        made_whole(calls, guidance, f"half calls made whole {calls}"),
    ]


def made_whole(calls: int, guidance: float, name: str, **changes: Any) -> Way:
    """The steps of half calls, with whole ones."""
    half = served(calls, name, guidance=guidance, halved=True, **changes)
    return dataclasses.replace(half, name=name, plan=at(called(str(half.plan))))
