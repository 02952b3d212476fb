"""The benchmark's pictures: recall against latency, and where approximate search begins to pay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

COLOURS: Final = {"exact": "black", "faiss": "tab:blue", "hnsw": "tab:orange", "scann": "tab:green"}
_COST: Final = "processor ms per query"
ENOUGH: Final = 0.99  # recall that an approximate setting must have to stand against the exact one


def kind(row: dict[str, Any]) -> str:
    return str(row["retriever"]).partition(":")[0]


def _ms(row: dict[str, Any], batch: int) -> float:
    """Median processor time of a call, which other work on the machine distorts least."""
    return row[f"batch {batch}"]["cpu_p50_ms"]


def pareto(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Recall@2 by id against what a single query costs, a panel per set of keys; the front is joined."""
    done = [r for r in rows if r["status"] == "ok"]
    sets = sorted({(r["data"], r["rows"], r["dimension"]) for r in done}, key=lambda s: (s[2], s[0], s[1]))
    if not sets:
        return
    columns = min(3, len(sets))
    height = -(-len(sets) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * height + 0.6), layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False).ravel()
    for panel in panels[len(sets) :]:
        panel.set_visible(False)
    for axes, (data, n, d) in zip(panels, sets, strict=False):
        these = [r for r in done if (r["data"], r["rows"]) == (data, n)]
        for name, colour in COLOURS.items():
            mine = [r for r in these if kind(r) == name]
            axes.plot(
                [_ms(r, 1) for r in mine],
                [r["recall"]["recall@2"] for r in mine],
                "*" if name == "exact" else "o",
                color=colour,
                markersize=11 if name == "exact" else 5,
                label=name,
            )
        front = sorted((_ms(r, 1), r["recall"]["recall@2"]) for r in these)
        best = [p for i, p in enumerate(front) if all(p[1] > earlier[1] for earlier in front[:i])]
        axes.plot(*zip(*best, strict=True), color="grey", linewidth=0.8, zorder=0)
        synthetic = ", synthetic" if these[0]["synthetic"] else ""
        axes.set_title(f"{data}{synthetic}: {n:,} × {d:,}", fontsize=9)
        axes.set(xlabel=_COST, ylabel="recall@2", ylim=(min([0.9, *(p[1] - 0.02 for p in front)]), 1.01))
        _log(axes, "x")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(COLOURS))
    figure.savefig(path, dpi=130)


def crossover(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Cost of a query against rows, a panel per dimension: exact search, and the fastest setting with recall ≥ 0.99."""
    done = [r for r in rows if r["status"] == "ok" and r["synthetic"]]
    dimensions = sorted({r["dimension"] for r in done})
    if not dimensions:
        return
    figure = Figure(figsize=(4.6 * len(dimensions), 3.8), layout="constrained")
    panels = figure.subplots(1, len(dimensions), squeeze=False)[0]
    for axes, d in zip(panels, dimensions, strict=True):
        for batch, style in ((1, "-"), (8, "--"), (64, ":")):
            for name, line in curves([r for r in done if r["dimension"] == d], batch).items():
                axes.plot(
                    *np.array(line).T,
                    style,
                    marker="o",
                    color=COLOURS["exact" if name == "exact" else "faiss"],
                    markersize=4,
                    label=f"{name}, batch {batch}",
                )
        axes.set(title=f"d = {d:,} (synthetic)", xlabel="rows", ylabel=_COST)
        _log(axes, "xy")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 if len(panels) == 1 else 3)
    figure.savefig(path, dpi=130)


def _log(axes: Any, which: str) -> None:
    """Logarithmic axes whose marks are plain numbers."""
    for name in which:
        axis = getattr(axes, f"{name}axis")
        getattr(axes, f"set_{name}scale")("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def curves(rows: Sequence[dict[str, Any]], batch: int) -> dict[str, list[tuple[float, float]]]:
    """(n, ms per query) of exact search and of the fastest approximate setting that finds enough."""
    result: dict[str, list[tuple[float, float]]] = {}
    for n in sorted({r["rows"] for r in rows}):
        for name in ("exact", "approximate"):
            took = [
                _ms(r, batch) / batch
                for r in rows
                if r["rows"] == n
                and f"batch {batch}" in r
                and (kind(r) == "exact") == (name == "exact")
                and r["recall"]["recall@2"] >= ENOUGH
            ]
            if took:
                result.setdefault(name, []).append((n, min(took)))
    return result
