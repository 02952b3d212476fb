"""Quality against model calls: every plain solver with its best spacing, redi, and redi's steps without its rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.paper import report
from benchmarks.paper.common import Made
from benchmarks.paper.measures import DIRECTIONS, Judge
from benchmarks.paper.settings import Settings, spread
from benchmarks.paper.ways import Way
from benchmarks.quality import plain
from benchmarks.quality.lab import BUDGETS, Lab, fine, served
from redi import zoo
from redi.metrics import frechet_distance, latent_error
from redi.places import HALVED_UP_TO

MEASURES = {"frechet_latents": "Fréchet distance to the fine solve (latents)", "latent_error": "latent error (L2)"}


def study(
    settings: Settings,
    pipe: Any,
    families: Sequence[str] = tuple(plain.FAMILIES),
    budgets: Sequence[int] = BUDGETS,
    tuning: int = 128,
    turns: int = 3,
) -> dict[str, Any]:
    """Points, and what follows from them.

    Args:
        settings: how much.
        pipe: from `bundled.load`.
        families: plain solvers.
        budgets: model calls.
        tuning: prompts on which the plain solvers' spacings are chosen.
        turns: of the timings.
    """
    lab = Lab(settings, pipe)
    if settings.quick:
        families, budgets, tuning, turns = ("ddim", "dpmsolver++", "deis"), (4, 8), 4, 1
    chosen, tried = tune(lab, families, budgets, tuning)
    kb = lab.rows("rows", settings.rows)
    ways = [fine(), *chosen, *(served(n) for n in budgets)]
    ways += [served(n, "redi, half calls", halved=True) for n in budgets if n in HALVED_UP_TO]
    ways += [served(n, "redi, H = 256", neighbors=256) for n in budgets]
    ways += [served(n, "without rows", neighbors=0) for n in budgets]
    made = lab.sample(ways, {"rows": kb}, lab.queries)
    judge = Judge(lab, lab.queries, made[0])
    times = lab.seconds(ways, {"rows": kb}, turns)
    points = [point(row) | {"seconds": s} for row, s in zip(judge.table(ways, made), times, strict=True)]
    return {
        "points": points,
        "against": against(points, budgets),
        "significance": significance(judge, ways, made),
        "tried": tried,
        "rows": len(kb),
    }


def tune(
    lab: Lab, families: Sequence[str], budgets: Sequence[int], count: int
) -> tuple[list[Way], list[dict[str, Any]]]:
    """For every solver and budget the spacings of least Fréchet distance and of least latent error, on train prompts.

    The prompts come after those of the rows, from one noise. Every spacing that was tried is told.
    """
    much = lab.settings
    side = Lab(dataclasses.replace(much, noises=1), lab.pipe, lab.guidance)
    prompts = spread(zoo.prompts("emoji", "train")[12_032:], count)
    runs = list(plain.runs(side, families, budgets))
    ways = [fine(), *(Way(f"{name} {calls}", name, steps) for _, name, calls, steps in runs)]
    reference, *made = (m.latents[0] for m in side.sample(ways, {}, prompts))
    tried: list[dict[str, Any]] = []
    for (family, name, calls, steps), x in zip(runs, made, strict=True):
        distance = frechet_distance(x.flatten(1), reference.flatten(1), directions=min(DIRECTIONS, count // 2))
        error = latent_error(x, reference)
        tried.append(
            {"family": family, "name": name, "nfe": calls, "steps": steps, "frechet": distance, "error": error}
        )
    best: dict[str, Way] = {}
    for measure in ("frechet", "error"):
        for family in families:
            for calls in budgets:
                able = [t for t in tried if t["family"] == family and t["nfe"] == calls]
                if able and math.isfinite(min(t[measure] for t in able)):
                    t = min(able, key=lambda t: t[measure])
                    best[f"{t['name']} {calls}"] = Way(f"plain {t['name']} {calls}", t["name"], t["steps"])
    return list(best.values()), tried


def point(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of measures as one flat object, intervals apart."""
    method = row["way"].rpartition(" ")[0] or row["way"]
    if row["leaps"]:
        kind = method if method in ("redi", "without rows") else "redi otherwise"
    else:
        kind = "fine" if method == "fine" else "plain"
    measures = {name: row[name] for name in ("frechet", "frechet_latents", "latent_error", "ssim", "text_score")}
    return {
        "method": method,
        "kind": kind,
        "nfe": row["calls"],
        **{name: value for name, (value, _, _) in measures.items()},
        **{f"{name}_interval": [low, high] for name, (_, low, high) in measures.items()},
    }


def against(points: Sequence[Mapping[str, Any]], budgets: Sequence[int]) -> list[dict[str, Any]]:
    """How redi stands to the best plain solver of each budget, and how many calls that would need to come as near."""
    found: list[dict[str, Any]] = []
    for calls in budgets:
        ours = [p for p in points if p["kind"] == "redi" and p["nfe"] == calls]
        if not ours:
            continue
        row: dict[str, Any] = {"nfe": calls}
        for measure in ("frechet", "frechet_latents", "latent_error"):
            best = envelope(points, measure)
            name, value = best[calls]
            matched = matching({n: v for n, (_, v) in best.items()}, ours[0][measure])
            row[measure] = {
                "redi": ours[0][measure],
                "best plain": value,
                "solver": name,
                "ratio": ours[0][measure] / value,
                "plain calls to match": matched,
                "times the calls": matched and matched / calls,
            }
        found.append(row)
    return found


def envelope(points: Sequence[Mapping[str, Any]], measure: str) -> dict[int, tuple[str, float]]:
    """Calls → the best plain solver's name and value, judged on the very queries it is compared on."""
    best: dict[int, tuple[str, float]] = {}
    for p in points:
        if p["kind"] == "plain" and p[measure] < best.get(p["nfe"], ("", math.inf))[1]:
            best[p["nfe"]] = (p["method"].removeprefix("plain "), p[measure])
    return dict(sorted(best.items()))


def matching(curve: Mapping[int, float], value: float) -> float | None:
    """Where a falling curve reaches a value, its logarithm taken as linear between budgets; None if it does not."""
    previous: tuple[int, float] | None = None
    for calls, found in curve.items():
        if found <= value:
            if previous is None:
                return float(calls)
            n, v = previous
            return n + (calls - n) * math.log(v / value) / math.log(v / found)
        previous = (calls, found)
    return None


def significance(judge: Judge, ways: Sequence[Way], made: Sequence[Made]) -> list[dict[str, Any]]:
    """How redi stands against each plain solver at as many calls: paired, Holm-adjusted over all of them."""
    ours = {m.calls: (w.name, m) for w, m in zip(ways, made, strict=True) if w.name.startswith("redi ")}
    plainly = [(w.name, m) for w, m in zip(ways, made, strict=True) if not w.plan and w.name != "fine"]
    return judge.compare([(ours[m.calls], (name, m)) for name, m in plainly if m.calls in ours])


def tables(found: Mapping[str, Any]) -> list[str]:
    """The comparison, and every point, as markdown."""
    heads = ["calls", "measure", "redi", "best plain", "its solver", "redi / plain", "plain calls to match", "× calls"]
    lines: list[list[str]] = []
    for row in found["against"]:
        for measure in ("frechet", *MEASURES):
            m = row[measure]
            need, times = m["plain calls to match"], m["times the calls"]
            beyond = f"> {BUDGETS[-1]}"
            lines.append(
                [
                    str(row["nfe"]),
                    report.COLUMNS[measure],
                    f"{m['redi']:.3g}",
                    f"{m['best plain']:.3g}",
                    m["solver"],
                    f"{m['ratio']:.2f}",
                    f"{need:.1f}" if need else beyond,
                    f"{times:.2f}" if times else "–",
                ]
            )
    names = ("frechet", "frechet_latents", "latent_error", "ssim", "text_score")
    shown = [
        [p["method"], str(p["nfe"]), *(cell(p, n) for n in names)]
        for p in sorted(found["points"], key=lambda p: (p["nfe"], p["frechet_latents"]))
    ]
    every = report.markdown(["method", "calls", *(report.COLUMNS[n] for n in names)], shown)
    return [report.markdown(heads, lines), "## Every point", every]


def cell(p: Mapping[str, Any], measure: str) -> str:
    low, high = p[f"{measure}_interval"]
    return f"{p[measure]:.3f} [{low:.3f}, {high:.3f}]"


def plot(found: Mapping[str, Any], path: Any) -> None:
    """One panel a measure: each plain solver thin, their best dashed, redi bold."""
    points = found["points"]
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for axes, (measure, label) in zip(figure.subplots(1, 2), MEASURES.items(), strict=True):
        for family in dict.fromkeys(family_of(p) for p in points if p["kind"] == "plain"):
            mine = [p for p in points if p["kind"] == "plain" and family_of(p) == family]
            line = {n: min(p[measure] for p in mine if p["nfe"] == n) for n in sorted({p["nfe"] for p in mine})}
            axes.plot(*zip(*line.items(), strict=True), "o-", markersize=3, linewidth=1, alpha=0.55, label=family)
        best = {n: v for n, (_, v) in envelope(points, measure).items()}
        axes.plot(*zip(*best.items(), strict=True), "k--", linewidth=1.5, label="best plain solver, tuned")
        ours = {p["nfe"]: p for p in sorted(points, key=lambda p: p["nfe"]) if p["kind"] == "redi"}
        ends = [[max(1e-9, abs(p[measure] - e)) for e in p[f"{measure}_interval"]] for p in ours.values()]
        axes.errorbar(
            list(ours),
            [p[measure] for p in ours.values()],
            yerr=list(zip(*ends, strict=True)),
            fmt="o-",
            color="crimson",
            linewidth=2.5,
            capsize=3,
            label="redi",
        )
        axes.set(xlabel="model calls per picture", ylabel=label, yscale="log", xscale="log")
        axes.set_xticks(sorted({p["nfe"] for p in points if p["kind"] != "fine"}))
        axes.get_xaxis().set_major_formatter("{x:.0f}")
        axes.minorticks_off()
        least = min(min(best.values()), min(p[measure] for p in ours.values()))
        axes.set_ylim(least / 2, 4 * max(best.values()))
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(path, dpi=150)


def family_of(p: Mapping[str, Any]) -> str:
    return p["method"].removeprefix("plain ").partition("-")[0]
