"""A table as people and spreadsheets read it: lines for a terminal, CSV, Markdown. Nothing is computed here."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Final

from redi.evaluation.seen import STAGES
from redi.evaluation.table import COLUMNS, COMPARED, Against, Row, Table
from redi.intervals import Interval

TITLES: Final = {
    "frechet": "Fréchet",
    "latent_error": "latent error",
    "at_value": "at value",
    "l2": "pixel L2",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "score": "image–text",
}
"""Measure → how its column is headed."""
_CHOICES: Final = ("plan", "transport", "combiner", "retriever", "key", "neighbors")
_NO: Final = "–"


def results(table: Table) -> list[tuple[str, ...]]:
    """Every way: calls, milliseconds, and the measures that there are, with their intervals."""
    there = [c for c in COLUMNS if any(r.measures[c] for r in table.rows)]
    head = ("", "calls", "ms a picture", *(TITLES[c] for c in there))
    return [
        head,
        *(
            (r.way.name, f"{r.nfe:g}", f"{1000 * r.seconds['total']:.3g}", *(_interval(r.measures[c]) for c in there))
            for r in table.rows
        ),
    ]


def stages(table: Table) -> list[tuple[str, ...]]:
    """Every way: milliseconds per picture in each stage, and the share of pictures that leapt."""
    parts = [s for s in STAGES if s != "total"]
    lines = [("ms a picture", *parts, "rest", "leapt")]
    for r in table.rows:
        rest = r.seconds["total"] - sum(r.seconds[s] for s in parts)
        leapt = _NO if r.leapt is None else f"{r.leapt:.0%}"
        lines.append((r.way.name, *(_ms(r.seconds[s]) for s in parts), _ms(max(rest, 0.0)), leapt))
    return lines


def comparisons(table: Table) -> list[tuple[str, ...]]:
    """What redi is beyond the plain solvers of the same number of calls: differences, their intervals, and p-values."""
    there = [c for c in COMPARED if any(a.differences[c] for a in table.against)]
    return [
        ("redi minus a plain solver", "calls", *(TITLES[c] for c in there)),
        *(
            (f"{a.way.name} − {a.plain.name}", f"{a.way.calls:g}", *(_difference(a, c) for c in there))
            for a in table.against
        ),
    ]


def to_markdown(table: Table) -> str:
    """All three tables, and what they were measured on."""
    about = table.about
    said = (
        f"{about['pictures']} pictures of {about['prompts']} prompts from {about['noises']} starting noises; knowledge "
        f"base of {about['knowledge_base_rows']} rows of {about['model']}, guidance {about['guidance']:g}; "
        f"batches of {about['batch_size']}."
    )
    how = (
        f"Fréchet distance {about['frechet_is']}; image–text score: {about['score_is']}; all else is measured against "
        "the fine solve's picture of the same prompt and noise. In brackets 95 % intervals over prompts; p-values are "
        f"{about['p_values_are']}. Times are {about['seconds_are']}."
    )
    parts = [said, _markdown(results(table))]
    parts += [_markdown(comparisons(table))] if table.against else []
    return "\n\n".join([*parts, _markdown(stages(table)), how]) + "\n"


def to_csv(table: Table) -> str:
    """A line for each way, one column for every number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    measures = [f"{c}{end}" for c in COLUMNS for end in ("", "_low", "_high")]
    writer.writerow(
        ["name", "kind", "solver", "steps", *_CHOICES, "nfe", "leapt", *(f"seconds_{s}" for s in STAGES), *measures]
    )
    for r in table.rows:
        w = r.way
        numbers = [x for c in COLUMNS for x in _three(r.measures[c])]
        writer.writerow(
            [w.name, w.kind, str(w.solver), w.steps, *(w.choices[c] for c in _CHOICES), r.nfe, r.leapt]
            + [r.seconds[s] for s in STAGES]
            + numbers
        )
    return out.getvalue()


def best_plain(table: Table, row: Row) -> Against | None:
    """Of the plain solvers at as many calls as a way of redi makes, the one nearest to the fine solve."""
    those = [a for a in table.against if a.way is row.way]
    errors = {r.way.name: r.measures["latent_error"] for r in table.rows}

    def error(a: Against) -> float:
        found = errors[a.plain.name]
        return float("inf") if found is None else found.value

    return min(those, key=error, default=None)


def _markdown(lines: Sequence[tuple[str, ...]]) -> str:
    head, *rest = lines
    rule = ("---", *("---:" for _ in head[1:]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rest))


def _interval(x: Interval | None) -> str:
    return _NO if x is None else f"{_short(x.value)} [{_short(x.low)}, {_short(x.high)}]"


def _difference(a: Against, column: str) -> str:
    x, p = a.differences[column], a.p[column]
    return _NO if x is None or p is None else f"{_short(x.value, '+')} [{_short(x.low)}, {_short(x.high)}], p {p:.2g}"


def _short(x: float, sign: str = "") -> str:
    """Three digits; what rounding left of a zero is one."""
    return "0" if abs(x) < 1e-9 else format(x, f"{sign}.3g").replace("-", "−")


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g}"


def _three(x: Interval | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if x is None else (x.value, x.low, x.high)
