"""What decides the frontier, one study each: places, choices, rows, noise, guidance, captions, fine solve."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.paper import report
from benchmarks.paper.measures import Judge
from benchmarks.paper.settings import Settings, spread
from benchmarks.paper.ways import Way
from benchmarks.quality import halves, plain, where
from benchmarks.quality.lab import BUDGETS, coarse, evenly, measured, one_noise, scaled, served
from redi import NNLS, Affine, Combiner, Kriging, LeastSquares, Nearest, zoo

COMPARED: Final = ("frechet_latents", "latent_error", "text_score")
PLAINLY: Final[Mapping[int, str]] = {5: "deis-linspace", 8: "deis-karras", 16: "unipc-karras"}
"""The best plain solver of a budget as `frontier` finds it."""
USUAL: Final = "as it is"
AWAY: Final = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
SIZES: Final = (100, 300, 1000, 3000)  # and all
RIVALS: Final = {
    "deis-karras": 0,
    "deis-linspace": 0,
    "dpmsolver++-linspace": 0,
    "unipc-karras": 12,
    "dpmsolver++3-karras": 12,
}
"""The plain solvers that `frontier` finds best, and one that suits strong guidance; from how many calls."""
SCALES: Final = (1.5, 3.0, 4.5, 6.0, 7.5)
GPU_HOURS_BUY: Final = 100_000  # rows: the size to which the rows' curve is extrapolated


@final
@dataclass(frozen=True)
class Equal(Combiner):
    """The mean: what neighbours have in common."""

    def weights(self, keys: Float[Tensor, "b k d"], query: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        """1/k each."""
        return torch.full(keys.shape[:2], 1 / keys.shape[1])


@final
@dataclass(frozen=True)
class Study:
    """One question.

    Args:
        measure: rows of measures with what was varied, under `points`, and what follows from them.
        tables: of what was measured, as markdown.
        plot: of the same.
    """

    measure: Callable[[Settings, Any], dict[str, Any]]
    tables: Callable[[Mapping[str, Any]], list[str]]
    plot: Callable[[Mapping[str, Any], Path], None]


def budgets(settings: Settings) -> tuple[int, ...]:
    """Calls that studies look at."""
    return (5,) if settings.quick else (5, 8, 16)


# --- choices --------------------------------------------------------------------------------------------------------


def choices(settings: Settings, pipe: Any) -> dict[str, Any]:
    """One thing changed at a time."""
    lab = one_noise(settings, pipe)
    kb = lab.rows("rows", settings.rows, settings.noises)
    ways = [way for n in budgets(settings) for way in changed(n)]
    judge, made = measured(lab, ways, {"rows": kb}, lab.queries)
    points = judge.table(ways, made)
    usual = {m.calls: (w.name, m) for w, m in zip(ways, made, strict=True) if w.name.startswith(USUAL)}
    pairs = [((w.name, m), usual[m.calls]) for w, m in zip(ways, made, strict=True) if w.name != usual[m.calls][0]]
    return {"points": points, "against": judge.compare(pairs), "rows": len(kb)}


def changed(calls: int) -> list[Way]:
    """Everything that is tried with so many calls; neighbours are found once, by what the first call predicts."""

    def way(name: str, **changes: Any) -> Way:
        return served(calls, name, **changes)

    combiners = [
        *(Affine(r) for r in (0.1, 1.0, 10.0)),
        LeastSquares(),
        NNLS(),
        *(Kriging(g) for g in (0.03, 0.3, 1.0)),
    ]
    solvers = ("deis-karras", plain.FINE, "dpmsolver++3-karras", "unipc-karras")
    return [
        way(USUAL),
        *(way(repr(c), combiner=c) for c in combiners),
        way("Nearest, H = 1", combiner=Nearest(), neighbors=1),
        *(way(f"H = {h}", neighbors=h) for h in (4, 16, 256, 1024)),
        way("equal weights of all rows", combiner=Equal(), neighbors=1 << 20),
        way("without rows", neighbors=0),
        *(way(f"coarse steps of {s}", solver=s) for s in solvers if s != coarse(calls)),
        way("found by the prompt", key="prompt"),
        way("found at the first two leaps", retrieve_at=(0, 1)),
        way("found at every leap", retrieve_at=tuple(range(calls))),
        way("places evenly spread", plan=evenly(calls)),
    ]


# --- rows -----------------------------------------------------------------------------------------------------------


def rows(settings: Settings, pipe: Any) -> dict[str, Any]:
    """How the error falls with the rows of a noise, and where that leads."""
    lab = one_noise(settings, pipe)
    kb = lab.rows("rows", settings.rows, settings.noises)
    sizes = [n for n in ((6,) if settings.quick else SIZES) if n < settings.rows]
    ways = [served(n, f"{most} rows,", most=most) for n in budgets(settings) for most in sizes]
    ways += [served(n, f"{settings.rows} rows,") for n in budgets(settings)]
    ways += [served(n, "no rows,", neighbors=0) for n in budgets(settings)]
    judge, made = measured(lab, ways, {"rows": kb}, lab.queries)
    points = judge.table(ways, made)
    for p in points:
        p["rows"] = 0 if p["way"].startswith("no") else int(p["way"].split()[0])
    return {"points": points, "curves": [curve(points, n) for n in budgets(settings)]}


def curve(points: Sequence[Mapping[str, Any]], calls: int) -> dict[str, Any]:
    """Least squares of log error = log a − c log rows, and what it says of more rows."""
    known = sorted((p["rows"], p["latent_error"][0]) for p in points if p["calls"] == calls and p["rows"])
    if len(known) < 3:
        return {"calls": calls}
    sizes, errors = np.array(known).T
    slope, level = np.polyfit(np.log(sizes), np.log(errors), 1)
    return {
        "calls": calls,
        "exponent": -float(slope),
        "last exponent": float(np.log(errors[-2] / errors[-1]) / np.log(sizes[-1] / sizes[-2])),
        f"latent error at {GPU_HOURS_BUY:,} rows": float(np.exp(level + slope * math.log(GPU_HOURS_BUY))),
    }


# --- distance from the bank -----------------------------------------------------------------------------------------


def noises(settings: Settings, pipe: Any) -> dict[str, Any]:
    """Queries that start from √(1 − η²) · bank + η · fresh."""
    kb = one_noise(settings, pipe).rows("rows", settings.rows, settings.noises)
    points: list[dict[str, Any]] = []
    compared: list[dict[str, Any]] = []
    for away in (0.0, 1.0) if settings.quick else AWAY:
        lab = one_noise(settings, pipe, away=away)
        ways = [w for n in budgets(settings) for w in (served(n), served(n, "without rows", neighbors=0), plainly(n))]
        judge, made = measured(lab, ways, {"rows": kb}, lab.queries)
        points += [{**p, "eta": away} for p in judge.table(ways, made)]
        pairs = [((f"redi η={away:g}", made[i]), ("best plain", made[i + 2])) for i in range(0, len(ways), 3)]
        pairs += [((f"redi η={away:g}", made[i]), ("without rows", made[i + 1])) for i in range(0, len(ways), 3)]
        compared += judge.compare(pairs)
    return {"points": points, "against": compared, "rows": len(kb)}


def plainly(calls: int) -> Way:
    """The best plain solver of a budget."""
    return Way(f"plain {PLAINLY[calls]} {calls}", PLAINLY[calls], calls)


# --- guidance -------------------------------------------------------------------------------------------------------


def guidance(settings: Settings, pipe: Any) -> dict[str, Any]:
    """A knowledge base for each scale: is redi ever worse than a plain solver of as many calls?"""
    points: list[dict[str, Any]] = []
    compared: list[dict[str, Any]] = []
    calls = (5,) if settings.quick else BUDGETS
    for scale in (1.5,) if settings.quick else SCALES:
        for away in (0.0, 1.0):
            lab = one_noise(settings, pipe, guidance=scale, away=away)
            others = [Way(f"plain {s} {n}", s, n) for n in calls for s in RIVALS if n >= RIVALS[s]]
            # from noise of nobody's bank the pipeline is the plain solver: no row can be near
            alone: dict[str, Any] = {"neighbors": 0} if away else {}
            ours = [served(n, guidance=scale, **alone) for n in calls]
            ways = [*ours, *others]
            judge, made = measured(lab, ways, {"rows": scaled(lab)}, lab.queries)
            said = {"guidance": scale, "bank": not away}
            points += [{**p, **said} for p in judge.table(ways, made)]
            mine = {m.calls: (w.name, m) for w, m in zip(ours, made, strict=False)}
            pairs = [(mine[m.calls], (w.name, m)) for w, m in zip(others, made[len(ours) :], strict=True)]
            compared += [{**row, **said} for row in judge.compare(pairs)]
    return {"points": points, "against": compared, "worse": worse(compared)}


def worse(compared: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where a plain solver was nearer to the fine solve, and where that is significant."""
    return [dict(row) for row in compared if row["latent_error"][0] > 0 and row["latent_error_p"] < 0.05]


# --- captions -------------------------------------------------------------------------------------------------------


def seen(settings: Settings, pipe: Any) -> dict[str, Any]:
    """Captions that the rows have in other styles, beside captions that they have not."""
    lab = one_noise(settings, pipe)
    kb = lab.rows("rows", settings.rows, settings.noises)
    points: list[dict[str, Any]] = []
    known = spread(zoo.prompts("emoji", "train")[12_032:], len(lab.queries))
    for name, prompts in {"unseen": lab.queries, "seen": known}.items():
        ways = [w for n in budgets(settings) for w in (served(n), plainly(n))]
        judge, made = measured(lab, ways, {"rows": kb}, prompts)
        points += [{**p, "captions": name} for p in judge.table(ways, made)]
    return {"points": points, "rows": len(kb)}


# --- the fine solve -------------------------------------------------------------------------------------------------


def teacher(settings: Settings, pipe: Any) -> dict[str, Any]:
    """How far the solvers that rows could come from are from a solve of 200 steps."""
    lab = one_noise(dataclasses.replace(settings, queries=min(64, settings.queries)), pipe)
    truth = Way("200 steps", plain.FINE, 20 if settings.quick else 200)
    names = ("dpmsolver++", plain.FINE, "unipc-karras", "deis-karras")
    ways = [Way(f"{name} {n}", name, n) for name in names for n in ((8,) if settings.quick else (20, 40, 80))]
    made = lab.sample([truth, *ways], {}, lab.queries)
    return {"points": Judge(lab, lab.queries, made[0]).table(ways, made[1:])}


# --- shown ----------------------------------------------------------------------------------------------------------


def plain_tables(found: Mapping[str, Any]) -> list[str]:
    """Every point, with what was varied; what was compared; what follows."""
    extra = [n for n in ("guidance", "bank", "eta", "captions") if n in found["points"][0]]
    shown = [{**p, "way": ", ".join([p["way"], *(f"{n} {p[n]}" for n in extra)])} for p in found["points"]]
    tables = [report.table(shown, published=False)]
    if against := found.get("against"):
        tables.append(report.comparison("Paired differences on the same prompts and noises.", against))
    tables += [str(line) for line in found.get("curves", ())]
    if "worse" in found:
        count = f"{len(found['worse'])} of {len(found['against'])}"
        tables.append(f"Significantly worse than a plain solver of as many calls: {count}.")
    return tables


def lines(by: str, label: str) -> Callable[[Mapping[str, Any], Path], None]:
    """A plot of the compared measures over what was varied, a line for each kind and budget."""

    def plot(found: Mapping[str, Any], path: Path) -> None:
        series: dict[str, list[Mapping[str, Any]]] = {}
        for p in found["points"]:
            series.setdefault(f"{kind(p)}, {p['calls']} calls", []).append(p)
        report.curves(path, series, COMPARED, x=by, label=label)

    return plot


def kind(p: Mapping[str, Any]) -> str:
    """A point's series, without what the axis shows."""
    if "rows" in p:
        return "redi"
    said = [f"{n}: {p[n]}" for n in ("bank", "captions") if n in p]
    return ", ".join([p["way"].rpartition(" ")[0] or p["way"], *said])


STUDIES: Final[Mapping[str, Study]] = {
    "grids": Study(where.grids, plain_tables, lines("calls", "model calls per picture")),
    "places": Study(where.places, plain_tables, lines("calls", "model calls per picture")),
    "choices": Study(choices, plain_tables, lines("calls", "model calls per picture")),
    "rows": Study(rows, plain_tables, lines("rows", "rows of the noise")),
    "noises": Study(noises, plain_tables, lines("eta", "η, distance from the bank's noise")),
    "guidance": Study(guidance, plain_tables, lines("guidance", "guidance scale")),
    "halves": Study(halves.halves, halves.tables, lines("calls", "model calls per picture")),
    "seen": Study(seen, plain_tables, lines("calls", "model calls per picture")),
    "teacher": Study(teacher, plain_tables, lines("calls", "steps")),
}
