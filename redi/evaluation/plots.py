"""The evaluation's picture: distance to the fine solve against model calls, and where the time goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from redi.errors import MissingExtraError
from redi.evaluation.seen import STAGES
from redi.evaluation.table import Row, Table
from redi.evaluation.words import TITLES

_SHOWN: Final = ("frechet", "latent_error", "score")
_PLAIN: Final = ("#777777", "#aaaaaa", "#555555", "#bbbbbb")
_REDI: Final = ("#127a4c", "#c2571a", "#1f5fa8", "#8a3ab0", "#b02a4c", "#6b7a12")


def draw(table: Table, path: Path) -> None:
    """Write the picture as PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "eval") from None
    ways = [r for r in table.rows if r.way.kind != "fine"]
    figure: Any = Figure(figsize=(14, 4.6 + 0.28 * len(table.rows)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[4.6, 0.9 + 0.28 * len(table.rows)])
    for panel, measure in zip(above.subplots(1, len(_SHOWN)), _SHOWN, strict=True):
        _against_calls(panel, ways, measure)
        if measure == "score" and (fine := table.rows[0].measures["score"]) is not None:
            panel.axhline(fine.value, color="black", linewidth=0.8, linestyle=":")
            panel.axhspan(fine.low, fine.high, color="black", alpha=0.06, linewidth=0)
    handles, labels = above.axes[0].get_legend_handles_labels()
    above.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8)
    _stages(below.subplots(), table.rows)
    figure.savefig(path, format="png", dpi=110)


def _against_calls(panel: Any, rows: Sequence[Row], measure: str) -> None:
    solvers = list(dict.fromkeys(_solver(r) for r in rows if r.way.kind == "plain"))
    for i, solver in enumerate(solvers):
        these = sorted((r for r in rows if r.way.kind == "plain" and _solver(r) == solver), key=lambda r: r.nfe)
        _points(panel, these, measure, solver, _PLAIN[i % len(_PLAIN)], "o-")
    for i, row in enumerate(r for r in rows if r.way.kind == "redi"):
        _points(panel, [row], measure, row.way.name, _REDI[i % len(_REDI)], "D")
    if measure != "score" and any((m := r.measures[measure]) is not None and m.value > 0 for r in rows):
        panel.set_yscale("log")
    panel.set_xlabel("model calls per picture")
    panel.set_title(TITLES[measure], fontsize=10)
    panel.grid(alpha=0.25)


def _points(panel: Any, rows: Sequence[Row], measure: str, label: str, colour: str, form: str) -> None:
    there = [(r.nfe, m) for r in rows if (m := r.measures[measure]) is not None]
    if there:
        ends = [[m.value - m.low for _, m in there], [m.high - m.value for _, m in there]]
        spread = [[max(e, 0.0) for e in side] for side in ends]
        where = ([n for n, _ in there], [m.value for _, m in there])
        panel.errorbar(*where, yerr=spread, fmt=form, color=colour, label=label, capsize=3, markersize=5)


def _stages(panel: Any, rows: Sequence[Row]) -> None:
    names, left = [r.way.name for r in rows], [0.0] * len(rows)
    parts = [s for s in STAGES if s != "total"]
    for stage in (*parts, "rest"):
        widths = [
            1000
            * (max(r.seconds["total"] - sum(r.seconds[s] for s in parts), 0.0) if stage == "rest" else r.seconds[stage])
            for r in rows
        ]
        panel.barh(names, widths, left=left, label=stage)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    panel.invert_yaxis()
    panel.tick_params(labelsize=8)
    panel.set_xlabel("wall ms of the denoising loop per picture")
    panel.legend(fontsize=8, ncols=3)


def _solver(row: Row) -> str:
    return row.way.name.rpartition(":")[0]
