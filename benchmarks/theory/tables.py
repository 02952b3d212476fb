"""Markdown and the plot of what was found."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

from benchmarks.paper.report import markdown
from benchmarks.theory.bounds import BOUNDS

LEGEND: Final = (
    "Rank correlations are Spearman's, with 95 % bootstrap intervals over captions. *Cells, raw* and *calibrated*: of "
    "mean bound with mean error over the cells of the ablation; *samples*: over single pictures of all cells; "
    "*within*: over the pictures of one cell, median and quartiles over cells. *Held*: share of pictures whose error "
    "is no larger than the raw bound; *bound / error*: geometric mean. *Coverage*: share within what the calibration "
    "says 90 % stay within, and *bias* its expected error over the measured one. Calibrated on train prompts that are "
    "in no row, everything here measured on captions never seen."
)


def norms(found: Mapping[str, Any]) -> str:
    """Constants over the schedule."""
    heads = ["entry", "L, mean", "L, largest", "μ, mean", "μ, largest", "‖∂D/∂x̄‖, mean", "K, mean"]
    by = found["norms"]
    lines = [
        [
            e,
            f"{by['L'][e][1]:.2f}",
            f"{by['L'][e][2]:.2f}",
            f"{by['mu'][e][1]:.2f}",
            f"{by['mu'][e][2]:.2f}",
            f"{by['D'][e][1]:.2f}",
            f"{by['K'][e][1]:.2f}",
        ]
        for e in by["L"]
    ]
    return markdown(heads, lines)


def correlations(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every transport and bound."""
    heads = ["transport", "bound", "cells", "cells, raw", "cells, calibrated", "samples", "within", "held"]
    heads += ["bound / error", "coverage", "bias"]
    lines = [
        [
            r["transport"],
            BOUNDS[r["bound"]],
            str(r["cells"]),
            "{:.2f} [{:.2f}, {:.2f}]".format(*r["raw"]),
            "{:.2f} [{:.2f}, {:.2f}]".format(*r["calibrated"]),
            f"{r['samples']:.2f}",
            "{:.2f} [{:.2f}, {:.2f}]".format(*r["within"]),
            f"{100 * r['held']:.0f} %",
            f"{r['ratio']:.3g}",
            f"{100 * r['coverage']:.0f} %",
            f"{r['bias']:.2f}",
        ]
        for r in rows
    ]
    return markdown(heads, lines)


def trusts(rows: Sequence[Mapping[str, Any]]) -> str:
    """Medians over the cells of each plan."""
    heads = ["plan", "nearest distance", "mean square between rows", "`Trust`"]
    lines: list[list[str]] = []
    for plan in dict.fromkeys(r["plan"] for r in rows):
        mine = [r for r in rows if r["plan"] == plan]
        known = [r["trust"] for r in mine if "trust" in r]
        lines.append(
            [
                f"`{plan}`",
                f"{statistics.median(r['distance'] for r in mine):.2f}",
                f"{statistics.median(r['mean'] for r in mine):.2f}",
                f"{statistics.median(known):.2f}" if known else "–",
            ]
        )
    return markdown(heads, lines)


def every(found: Mapping[str, Any]) -> list[str]:
    """All tables."""
    return [
        LEGEND,
        "## Constants along the fine solve",
        "Of D − x̄ in λ, for the guided model in float32; *K*: by how much D differs for another prompt, over the same "
        "at entry 0.",
        norms(found),
        "## Error at the value (of corrected plans: at the end)",
        correlations(found["value"]),
        "## Error of jumps at the end",
        correlations(found["end"]),
        "## Telling near from far within a cell of a corrected plan",
        "Rank correlation with the error, median over H and rows.",
        trusts(found["trust"]),
    ]


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Bound against measured, one colour a transport: as the theorem has it, and calibrated."""
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    panels = {
        "theorem": "$e^{\\int L}\\,\\epsilon$, as the theorem has it",
        "expected": "calibrated on train prompts",
    }
    points = found["points"]
    for axes, (name, label) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for transport in dict.fromkeys(p["transport"] for p in points):
            mine = [p for p in points if p["transport"] == transport and name in p]
            axes.plot(
                [p[name] for p in mine], [p["error"] for p in mine], "o", markersize=3, alpha=0.6, label=transport
            )
        low, high = min(p["error"] for p in points), max(p["error"] for p in points)
        axes.plot([low, high], [low, high], "k--", linewidth=1, label="equal")
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("measured latent error (mean of a cell)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(path, dpi=120)
