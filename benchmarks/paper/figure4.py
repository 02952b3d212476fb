"""Figures 4 and 5: rows without styles serve queries with styles (the paper's §4.3).

    python -m benchmarks.paper.figure4 --out bench/paper

Every row is a caption alone. A query runs to the leap with its caption alone, and from where the leap arrives with
caption and style.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from benchmarks import bundled
from benchmarks.paper import knowledge_bases, report
from benchmarks.paper.common import Made, World
from benchmarks.paper.measures import COLUMNS, Judge
from benchmarks.paper.settings import Settings, caption
from benchmarks.paper.ways import Way
from redi import Affine, Residual, zoo
from redi.intervals import bootstrap, holm, paired
from redi.metrics import agreement

STYLES: Final = ("fluent high contrast", "serenity pixel", "twemoji")
KEY, VALUE, STEPS = 3, 10, 50
LEAP: Final = Way(
    "value H=1, 3:10", "pndm", STEPS, rows="free", plan=f"jump:{KEY}:{VALUE}/{STEPS}", switch=VALUE, published=43
)
SHOWN: Final = (
    Way("caption alone, 50 steps", "pndm", STEPS),
    Way("plain, 50 steps", "pndm", STEPS),
    Way("plain, equal calls", "pndm", STEPS + KEY - VALUE),
    Way("style from step 10, no leap", "pndm", STEPS, switch=VALUE),
    LEAP,
    replace(LEAP, name="value H=2, 3:10", neighbors=2),
    replace(LEAP, name="residual H=16, 3:10", neighbors=16, transport=Residual(), combiner=Affine()),
)
STYLED: Final = {"text_score": COLUMNS["text_score"], "style": "style probability", "accuracy": "style recognised"}
MEASURES: Final = {**STYLED, "layout": "layout", **{k: COLUMNS[k] for k in ("frechet", "latent_error")}}
LEGEND: Final = (
    "Values with 95 % bootstrap intervals over captions; three styles, each with every caption. *Image–text*: the "
    "evaluator's cosine to caption and style; *style probability* and *style recognised*: what the evaluator's "
    "classifier of 11 styles gives the style asked for, and how often it is its first; *layout*: SSIM in grey to the "
    "picture of the caption alone from the same noise; *Fréchet to fine* and *latent L2*: to the plain solver's 50 "
    "steps with the style from the beginning."
)


def main(argv: Sequence[str] | None = None, pipe: object = None) -> int:
    settings = Settings.parse(argv, "benchmarks.paper.figure4", __doc__)
    world = World(settings, pipe or bundled.load(compiled=not settings.quick))
    rows_of = {"free": knowledge_bases.style_free(world)}
    captions, styled = queries(settings)
    free, *others = SHOWN
    each = captions[: len(captions) // len(STYLES)]
    (once,) = world.sample([free], {}, each)
    alone = replace(once, latents=once.latents.repeat(1, len(STYLES), 1, 1, 1))
    plain = [w for w in others if w.switch is None]
    mixed = [w for w in others if w.switch is not None]
    made = [*world.sample(plain, {}, styled), *world.sample(mixed, rows_of, captions, styled)]
    judge, neutral = Judge(world, styled, made[0]), Judge(world, captions, alone)
    rows = [row(judge, neutral, way, m) for way, m in zip(tqdm([*plain, *mixed], desc="measuring"), made, strict=True)]
    unstyled = row(judge, neutral, free, alone)
    drawn = {
        "score_to_own_caption": float(neutral.reference.scores.mean()),
        "score_to_other_captions": float(shuffled(neutral)),
    }
    against = compare(judge, neutral, dict(zip((w.name for w in others), made, strict=True)))
    said = report.document(
        settings,
        "benchmarks.paper.figure4",
        styles=STYLES,
        captions_alone=drawn,
        rows=[unstyled, *rows],
        comparisons=against,
    )
    words = (
        f"Pictures of captions alone show them: image–text score {drawn['score_to_own_caption']:.3f} with their own "
        f"caption, {drawn['score_to_other_captions']:.3f} with another one."
    )
    tables = [LEGEND, report.table([unstyled, *rows], MEASURES), words, comparison(against)]
    report.write(settings, "figure4", "Figures 4 and 5: styles by rows without styles", said, tables)
    grid(settings.out / "figure4.png", judge, neutral, [free, *plain, *mixed], [alone, *made], captions, styled)
    return 0


def queries(settings: Settings) -> tuple[list[str], list[str]]:
    """Captions and styled prompts, equally many: all captions in one style after the other, in whole batches."""
    every = list(dict.fromkeys(caption(p) for p in zoo.prompts("emoji", "heldout")))
    captions = every[: max(2, settings.queries // 2)]
    return captions * len(STYLES), [f"{c}, {s} style" for s in STYLES for c in captions]


def row(judge: Judge, neutral: Judge, way: Way, made: Made) -> dict[str, Any]:
    """A line of the table."""
    pictures = judge.look(made)
    found = judge.measure(pictures) | {
        name: bootstrap(lambda x: float(x.double().mean()), x, groups=judge.groups, repeats=judge.repeats)
        for name, x in scores(judge, neutral, made).items()
    }
    measures = {name: [i.value, i.low, i.high] for name, i in found.items() if name in MEASURES}
    return {"way": way.name, "calls": made.calls, "calls_as_published": way.published, **measures}


def scores(judge: Judge, neutral: Judge, made: Made) -> dict[str, Float[Tensor, " n"]]:
    """Of every picture: probability of its style, whether it is the classifier's first, likeness in layout."""
    pixels = judge.look(made).pixels
    styles = judge.evaluator.styles
    wanted = torch.tensor([next(i for i, s in enumerate(styles) if t.endswith(f", {s} style")) for t in judge.texts])
    logits = judge.evaluator.style_logits(pixels)
    layout = [
        agreement(grey(a[None]), grey(b[None])).ssim for a, b in zip(pixels, neutral.reference.pixels, strict=True)
    ]
    return {
        "style": logits.softmax(1).gather(1, wanted[:, None])[:, 0],
        "accuracy": (logits.argmax(1) == wanted).float(),
        "layout": torch.tensor(layout),
    }


def compare(judge: Judge, neutral: Judge, made: dict[str, Made]) -> list[dict[str, Any]]:
    """Ways that leap against the plain solver at as many calls; p-values Holm-adjusted within a measure."""
    other = made["plain, equal calls"]
    theirs = {"text_score": judge.look(other).scores, **scores(judge, neutral, other)}
    rows: list[dict[str, Any]] = []
    for name, m in made.items():
        if "3:10" in name:
            mine = {"text_score": judge.look(m).scores, **scores(judge, neutral, m)}
            differences = {k: paired(mine[k], theirs[k], judge.groups, repeats=10 * judge.repeats) for k in theirs}
            intervals = {k: [d.interval.value, d.interval.low, d.interval.high] for k, d in differences.items()}
            rows.append({"way": name, **intervals, **{f"{k}_p": d.p for k, d in differences.items()}})
    for k in theirs:
        for r, p in zip(rows, holm([r[f"{k}_p"] for r in rows]), strict=True):
            r[f"{k}_p"] = p
    return rows


def comparison(rows: Sequence[dict[str, Any]]) -> str:
    """The differences as markdown."""
    measures = {k: v for k, v in MEASURES.items() if k in rows[0]}
    lines = [[r["way"], *(f"{report.cell(r, k)}, p {r[f'{k}_p']:.2g}" for k in measures)] for r in rows]
    words = "Paired differences to the plain solver at as many calls, the style in the prompt from the beginning."
    words += " P-values are Holm-adjusted."
    return f"{words}\n\n{report.markdown(['', *measures.values()], lines)}"


def grey(pixels: Float[Tensor, "n 3 i j"]) -> Float[Tensor, "n 1 i j"]:
    """Luma (ITU-R BT.601)."""
    return (pixels * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def shuffled(judge: Judge) -> float:
    """Mean score of pictures with captions of others."""
    texts = judge.texts[1:] + judge.texts[:1]
    return float(judge.evaluator.score(judge.reference.pixels, texts).mean())


def grid(
    path: Path,
    judge: Judge,
    neutral: Judge,
    ways: Sequence[Way],
    made: Sequence[Made],
    captions: Sequence[str],
    styled: Sequence[str],
) -> None:
    """The first captions in every style, a row for each way."""
    each = len(captions) // len(STYLES)
    shown = [s * each + i for i in range(min(4, each)) for s in range(len(STYLES))]
    columns = len(shown)
    figure = Figure(figsize=(1.05 * columns + 1.6, 1.15 * len(ways)), layout="constrained")
    panels = figure.subplots(len(ways), columns, squeeze=False)
    for way, m, line in zip(ways, made, panels, strict=True):
        pixels = (neutral if way.name == SHOWN[0].name else judge).look(m).pixels
        for i, axes in zip(shown, line, strict=True):
            axes.imshow(pixels[i].permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(way.name.replace(", ", "\n"), fontsize=6.5, rotation=0, ha="right", va="center")
    for i, axes in zip(shown, panels[0], strict=True):
        axes.set_title(styled[i].removesuffix(" style").replace(", ", "\n"), fontsize=6)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
