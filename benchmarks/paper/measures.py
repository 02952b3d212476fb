"""How far pictures are from the fine solve, from real ones and from their prompts; intervals are over captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from benchmarks.paper.common import Made, World
from benchmarks.paper.settings import caption
from benchmarks.paper.ways import Way
from redi.demo import decode
from redi.evaluator import Evaluator
from redi.intervals import Interval, bootstrap, holm, paired
from redi.metrics import agreement, frechet_distance, principal_directions

DIRECTIONS: Final = 64
COLUMNS: Final[Mapping[str, str]] = {
    "frechet_real": "Fréchet to real",
    "frechet": "Fréchet to fine",
    "frechet_latents": "same, latents",
    "latent_error": "latent L2",
    "ssim": "SSIM",
    "text_score": "image–text",
}
"""Measure → its column."""


@dataclass(frozen=True)
class Pictures:
    """One way's pictures, noise after noise, with what is measured on them.

    Args:
        latents: of all noises and queries in one row.
        pixels: the same, decoded.
        features: the evaluator's.
        scores: image–text score of each.
    """

    latents: Float[Tensor, "n c h w"]
    pixels: Float[Tensor, "n 3 i j"]
    features: Float[Tensor, "n d"]
    scores: Float[Tensor, " n"]


class Judge:
    """Measures every way against one reference.

    Args:
        world: the model.
        texts: prompts of the queries.
        reference: the fine solve.
    """

    def __init__(self, world: World, texts: Sequence[str], reference: Made) -> None:
        self.world = world
        self.evaluator = Evaluator.load()
        self.texts = [*texts] * world.bank.size
        self.groups = [caption(t) for t in self.texts]
        self.repeats = 20 if world.settings.quick else 400
        self.seen: dict[Made, Pictures] = {}
        self.reference = self.look(reference)
        flat = self.reference.latents.flatten(1).double()
        self.basis = principal_directions(flat, min(DIRECTIONS, len(flat) // 4))

    def look(self, made: Made) -> Pictures:
        """Decode, and let the evaluator see; once for each."""
        if made not in self.seen:
            latents = made.latents.flatten(0, 1)
            pixels = torch.cat([decode(self.world.pipe, part) for part in latents.split(256)])
            features, scores = self.evaluator.features(pixels), self.evaluator.score(pixels, self.texts)
            self.seen[made] = Pictures(latents, pixels, features, scores)
        return self.seen[made]

    @cached_property
    def real(self) -> Tensor | None:
        """Features of real pictures of captions never seen, in all styles; None without `--data`."""
        folder = self.world.settings.data
        return None if folder is None else self.evaluator.features(real_pictures(folder))

    def errors(self, p: Pictures) -> Float[Tensor, " n"]:
        """L2 distance of each picture's latents to the reference's."""
        return (p.latents.double() - self.reference.latents.double()).flatten(1).norm(dim=1)

    def measure(self, p: Pictures) -> dict[str, Interval]:
        """Every measure of `COLUMNS` that can be taken."""
        ref = self.reference
        similar = torch.tensor([agreement(a[None], b[None]).ssim for a, b in zip(p.pixels, ref.pixels, strict=True)])
        own, theirs = (x.latents.flatten(1).double() @ self.basis for x in (p, ref))
        found = {} if self.real is None else {"frechet_real": self._of(self._to_real, p.features)}
        return found | {
            "frechet": self._of(frechet_distance, p.features, ref.features),
            "frechet_latents": self._of(frechet_distance, own, theirs),
            "latent_error": self._of(_mean, self.errors(p)),
            "ssim": self._of(_mean, similar, signed=True),
            "text_score": self._of(_mean, p.scores, signed=True),
        }

    def _to_real(self, features: Tensor) -> float:
        assert self.real is not None
        return frechet_distance(features, self.real)

    def _of(self, statistic: Any, *samples: Tensor, signed: bool = False) -> Interval:
        seed = self.world.settings.seed
        found = bootstrap(statistic, *samples, groups=self.groups, repeats=self.repeats, seed=seed)
        # a Fréchet distance is not negative, however near its interval comes to zero
        return found if signed else Interval(found.value, max(found.low, 0.0), found.high)

    def table(self, ways: Sequence[Way], made: Sequence[Made]) -> list[dict[str, Any]]:
        """A row for each way: settings, calls, measures."""
        rows: list[dict[str, Any]] = []
        for way, m in tqdm(list(zip(ways, made, strict=True)), desc="measuring", unit="way"):
            measures = self.measure(self.look(m))
            rows.append(
                {
                    "way": way.name,
                    "leaps": way.plan is not None,
                    "solver": way.solver,
                    "calls": m.calls,
                    "calls_as_published": way.published,
                    **{name: [i.value, i.low, i.high] for name, i in measures.items()},
                }
            )
        return rows

    def at_equal_calls(self, ways: Sequence[Way], made: Sequence[Made]) -> list[dict[str, Any]]:
        """Each way that leaps against its own solver run plainly at as many calls."""
        plain = {(w.solver, m.calls): (w.name, m) for w, m in zip(ways, made, strict=True) if w.plan is None}
        pairs = [
            ((w.name, m), plain[w.solver, m.calls])
            for w, m in zip(ways, made, strict=True)
            if w.plan is not None and (w.solver, m.calls) in plain
        ]
        return self.compare(pairs)

    def compare(self, pairs: Sequence[tuple[tuple[str, Made], tuple[str, Made]]]) -> list[dict[str, Any]]:
        """Paired differences of means of two ways each; p-values Holm-adjusted over the pairs."""
        rows: list[dict[str, Any]] = []
        for (name, made), (other, theirs) in pairs:
            a, b = self.look(made), self.look(theirs)
            row: dict[str, Any] = {"way": name, "against": other, "calls": made.calls}
            for measure, x, y in (("latent_error", self.errors(a), self.errors(b)), ("text_score", a.scores, b.scores)):
                d = paired(x, y, self.groups, repeats=10 * self.repeats, seed=self.world.settings.seed)
                row[measure] = [d.interval.value, d.interval.low, d.interval.high]
                row[f"{measure}_p"] = d.p
            if self.real is not None:
                # the same draws of captions for both, so that what they have in common cancels
                i = self._of(lambda x, y: self._to_real(x) - self._to_real(y), a.features, b.features, signed=True)
                row["frechet_real"] = [i.value, i.low, i.high]
            rows.append(row)
        for name in ("latent_error_p", "text_score_p"):
            for row, p in zip(rows, holm([r[name] for r in rows]), strict=True):
                row[name] = p
        return rows


def real_pictures(folder: Path) -> Float[Tensor, "n 3 32 32"]:
    """Real pictures in [0, 1] of captions that no prompt of a knowledge base has, from `folder/emoji32.npz`."""
    import numpy as np

    with np.load(folder / "emoji32.npz") as archive:
        images = torch.from_numpy(archive["images"][archive["split"] == "val"])
    return images.permute(0, 3, 1, 2).float() / 255.0


def _mean(x: Tensor) -> float:
    return float(x.double().mean())
