"""JSON, markdown and plots of the tables."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
from matplotlib.figure import Figure

import redi
from benchmarks.bundled import GUIDANCE, precision
from benchmarks.paper.measures import COLUMNS
from benchmarks.paper.settings import Settings

DIGITS: Final = {"frechet_real": 2, "latent_error": 2, "frechet_latents": 2}
LEGEND: Final = (
    "Values with 95 % bootstrap intervals over captions. *Calls* are model evaluations per picture as they were "
    "counted; *NFE published* is how the paper counts them for the row it has. *Fréchet to real*: evaluator features, "
    "to pictures by people of captions never seen, which is the paper's measure with its network replaced by the "
    "bundled evaluator; *Fréchet to fine*: the same features, to the fine solve of the same prompts and noises; *same, "
    "latents*: of latents, in 64 principal directions of the fine solve's; *latent L2* and *SSIM*: picture by picture "
    "to the fine solve; *image–text*: the evaluator's cosine. Smaller is better but for the last two."
)

AT_EQUAL_CALLS: Final = (
    "Paired differences to the same solver run plainly at as many calls, on the same prompts and noises."
)


def document(settings: Settings, module: str, **found: Any) -> dict[str, Any]:
    """What is written: results with the command, the settings and the machine they came from."""
    shown = [f"--{k} {getattr(settings, k)}" for k in ("rows", "queries", "noises")]
    return {
        "command": " ".join(["python -m", module, *(["--quick"] if settings.quick else shown)]),
        "quick": settings.quick,
        "prompts_in_knowledge_base": settings.rows,
        "queries": settings.queries,
        "noises": settings.noises,
        "guidance": GUIDANCE,
        "seed": settings.seed,
        "real_pictures": settings.data is not None,
        **found,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "precision": str(precision()).removeprefix("torch."),
        "versions": {
            "python": platform.python_version(),
            "redi": redi.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }


def write(settings: Settings, name: str, title: str, said: Mapping[str, Any], tables: Sequence[str]) -> None:
    """`name`.json and `name`.md in the folder of results."""
    (settings.out / f"{name}.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    text = "\n\n".join([f"# {title}", f"`{said['command']}`", *tables]) + "\n"
    (settings.out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text, file=sys.stderr)


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] = COLUMNS, *, published: bool = True) -> str:
    """Rows of measures as markdown."""
    names = [c for c in columns if any(c in r for r in rows)]
    heads = ["", *(["NFE published"] if published else []), "calls", *(columns[c] for c in names)]
    lines = [
        [
            r["way"],
            *([str(r["calls_as_published"] or "–")] if published else []),
            str(r["calls"]),
            *(cell(r, c) for c in names),
        ]
        for r in rows
    ]
    return markdown(heads, lines)


def comparison(words: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Paired differences as markdown, under what is compared."""
    real = "frechet_real" in rows[0]
    heads = ["", "against", "calls", "latent L2, difference", "p", "image–text, difference", "p"]
    heads += ["Fréchet to real, difference"] * real
    lines = [
        [
            r["way"],
            r["against"],
            str(r["calls"]),
            cell(r, "latent_error"),
            f"{r['latent_error_p']:.2g}",
            cell(r, "text_score"),
            f"{r['text_score_p']:.2g}",
            *[cell(r, "frechet_real")] * real,
        ]
        for r in rows
    ]
    signs = "Negative distances are nearer; p-values are Holm-adjusted."
    return f"{words} {signs}\n\n{markdown(heads, lines)}"


def cell(row: Mapping[str, Any], measure: str) -> str:
    """A value with its interval."""
    if measure not in row:
        return "–"
    digits = DIGITS.get(measure, 3)
    value, low, high = (f"{x:.{digits}f}" for x in row[measure])
    return f"{value} [{low}, {high}]"


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *lines])


def curves(
    path: Path,
    series: Mapping[str, Sequence[Mapping[str, Any]]],
    measures: Sequence[str],
    *,
    x: str = "calls",
    label: str = "model calls per picture",
) -> None:
    """One panel per measure, one line per series, intervals as bars."""
    figure = Figure(figsize=(4.2 * len(measures), 4.2), layout="constrained")
    panels = figure.subplots(1, len(measures), squeeze=False).ravel()
    for axes, measure in zip(panels, measures, strict=True):
        draw(axes, series, measure, x)
        axes.set(xlabel=label, ylabel=COLUMNS[measure])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)


def draw(axes: Any, series: Mapping[str, Sequence[Mapping[str, Any]]], measure: str, x: str) -> None:
    """The lines of one panel."""
    for name, rows in series.items():
        # the fine solve itself is no point of a logarithmic axis
        points = sorted((r[x], *r[measure]) for r in rows if measure in r and abs(r[measure][0]) > 1e-9)
        if not points:
            continue
        at, value, low, high = zip(*points, strict=True)
        bars = [[v - a for v, a in zip(value, low, strict=True)], [b - v for v, b in zip(value, high, strict=True)]]
        style = "--" if name.startswith("plain") else "-"
        axes.errorbar(at, value, yerr=bars, fmt=f"o{style}", capsize=2, markersize=4, linewidth=1.2, label=name)
    if measure not in ("text_score", "ssim", "frechet_real"):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
