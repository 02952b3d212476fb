"""The table: every way with its cost and its distance to the fine solve, and redi against plain solvers of equal cost.

Intervals are over prompts: those of one prompt's pictures that start from several noises are no evidence of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from jaxtyping import Float64
from torch import Tensor

from redi.evaluation.contest import Contest
from redi.evaluation.resampling import Draws, difference, interval
from redi.evaluation.seen import MEASURES, STAGES, Seen
from redi.evaluation.ways import Way
from redi.intervals import Interval, holm
from redi.metrics import frechet_distance, principal_directions

COLUMNS: Final = ("frechet", "latent_error", "at_value", "l2", "ssim", "lpips", "score")
"""What is measured with an interval."""
COMPARED: Final = ("frechet", "latent_error", "l2", "ssim", "lpips", "score")
"""What redi and a plain solver of the same number of calls are compared in."""
_OF_MEANS: Final = 10_000  # draws; a mean is cheap to take again, a Fréchet distance is not


@final
@dataclass(frozen=True)
class Row:
    """One way.

    Args:
        way: which.
        nfe: model calls made per picture, the mean over them.
        leapt: share of the pictures that neighbours taught something; None for a way without any.
        seconds: per picture, of the denoising loop and of each stage of it; the median over batches.
        measures: by the names of `COLUMNS`; None where there is none.
    """

    way: Way
    nfe: float
    leapt: float | None
    seconds: Mapping[str, float]
    measures: Mapping[str, Interval | None]

    def to_json(self) -> dict[str, Any]:
        """A row of the table."""
        w = self.way
        return {
            "name": w.name,
            "kind": w.kind,
            "solver": str(w.solver),
            "steps": w.steps,
            **w.choices,
            "nfe": self.nfe,
            "leapt": self.leapt,
            "seconds": dict(self.seconds),
            **{n: None if i is None else [i.value, i.low, i.high] for n, i in self.measures.items()},
        }


@final
@dataclass(frozen=True)
class Against:
    """redi minus a plain solver of the same number of calls, on the same pictures.

    Args:
        way: redi's.
        plain: the plain solver's.
        differences: by the names of `COMPARED`; None where there is nothing to compare.
        p: two-sided p-values of no difference, Holm's adjustment over all comparisons of the table.
    """

    way: Way
    plain: Way
    differences: Mapping[str, Interval | None]
    p: Mapping[str, float | None]

    def to_json(self) -> dict[str, Any]:
        """A comparison."""
        said = {n: None if i is None else [i.value, i.low, i.high] for n, i in self.differences.items()}
        return {"way": self.way.name, "plain": self.plain.name, "calls": self.way.calls, **said, "p": dict(self.p)}


@final
@dataclass(frozen=True)
class Table:
    """What an evaluation found.

    Args:
        rows: one for each way, the fine solve first.
        against: redi's ways against plain solvers.
        about: what it was measured on, as JSON.
    """

    rows: Sequence[Row]
    against: Sequence[Against]
    about: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        contest: Contest,
        seen: Sequence[Seen],
        *,
        repeats: int = 400,
        seed: int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Table:
        """Take the measures, and how sure they are.

        Args:
            contest: the ways.
            seen: of each way, all pictures.
            repeats: draws of the prompts for Fréchet distances; of means there are 10,000.
            seed: of the draws.
            progress: told (draws done, draws in all).
        """
        ways, groups = contest.ways, contest.groups
        pairs = [
            (i, j)
            for i, w in enumerate(ways)
            for j, p in enumerate(ways)
            if w.kind == "redi" and p.kind == "plain" and w.rival_calls == p.calls
        ]
        directions = contest.features.directions(len(groups))
        values, drawn = _frechet(seen, directions, Draws(groups, repeats, seed), progress)
        many = Draws(groups, _OF_MEANS, seed)
        means = [(_mean(s.measures), many.means(s.measures)) for s in seen]
        apart = [seen[i].measures - seen[j].measures for i, j in pairs]
        gaps = [(_mean(x), many.means(x)) for x in apart]

        def row(i: int) -> Row:
            value, draws = means[i]
            found = {n: _known(interval(float(value[k]), draws[:, k])) for k, n in enumerate(MEASURES)}
            distance = interval(values[i], drawn[:, i])
            # a Fréchet distance is not negative, however near its interval comes to zero
            found["frechet"] = _known(Interval(distance.value, max(distance.low, 0.0), distance.high))
            nfe, leapt = (float(seen[i].of(n).mean()) for n in ("nfe", "leapt"))
            redi = ways[i].kind == "redi"
            return Row(ways[i], nfe, leapt if redi else None, seen[i].median_seconds, {n: found[n] for n in COLUMNS})

        def against(pair: int) -> tuple[dict[str, Interval | None], dict[str, float | None]]:
            (i, j), (value, draws) = pairs[pair], gaps[pair]
            tested = {n: difference(float(value[k]), draws[:, k]) for k, n in enumerate(MEASURES)}
            tested["frechet"] = difference(values[i] - values[j], drawn[:, i] - drawn[:, j])
            found = {n: _known(tested[n].interval) for n in COMPARED}
            return found, {n: None if found[n] is None else tested[n].p for n in COMPARED}

        compared = [against(pair) for pair in range(len(pairs))]
        adjusted = [dict(p) for _, p in compared]
        for n in COMPARED:
            those = [k for k, p in enumerate(adjusted) if p[n] is not None]
            for k, p in zip(those, holm([p for k in those if (p := adjusted[k][n]) is not None]), strict=True):
                adjusted[k][n] = p
        return cls(
            [row(i) for i in range(len(ways))],
            [
                Against(ways[i], ways[j], found, p)
                for (i, j), (found, _), p in zip(pairs, compared, adjusted, strict=True)
            ],
            _about(contest, directions, repeats, seed),
        )

    def to_json(self) -> dict[str, Any]:
        """`table.json`."""
        return {
            **self.about,
            "rows": [r.to_json() for r in self.rows],
            "against": [a.to_json() for a in self.against],
        }


def _about(contest: Contest, directions: int | None, repeats: int, seed: int) -> dict[str, Any]:
    within = "" if directions is None else f", in {directions} principal directions of the fine solve's"
    return {
        "knowledge_base": str(contest.kb.path),
        "knowledge_base_rows": len(contest.kb),
        "model": contest.kb.fingerprint.model,
        "guidance": contest.kb.fingerprint.guidance,
        "prompts": len(contest.prompts),
        "noises": len(contest.noise_ids),
        "pictures": len(contest.items),
        "batch_size": contest.batch_size,
        "features": contest.features.identity,
        "score_is": contest.score.identity,
        "frechet_is": f"between {contest.features.identity} features of a way's pictures and the fine solve's{within}",
        "seconds_are": "wall seconds of the denoising loop per picture, median over batches",
        "intervals_are": "95 %, prompts drawn with replacement",
        "p_values_are": "two-sided, of no difference, Holm-adjusted over the comparisons of a column",
        "repeats": {"frechet": repeats, "means": _OF_MEANS},
        "seed": seed,
        "stages": list(STAGES),
    }


def _frechet(
    seen: Sequence[Seen], directions: int | None, draws: Draws, progress: Callable[[int, int], None]
) -> tuple[list[float], Float64[Tensor, "r ways"]]:
    """Each way's Fréchet distance to the first, and what it is in every draw; NaN for features that are not finite."""
    features = [s.features.double() for s in seen]
    if directions is not None:
        basis = principal_directions(features[0], directions)
        features = [x @ basis for x in features]
    values = [_distance(x, features[0]) for x in features]
    drawn = torch.full((draws.repeats, len(seen)), torch.nan, dtype=torch.float64)
    for r in range(draws.repeats):
        rows = draws.rows(r)
        for i, x in enumerate(features):
            drawn[r, i] = _distance(x[rows], features[0][rows])
        progress(r + 1, draws.repeats)
    return values, drawn


def _distance(a: Float64[Tensor, "n d"], b: Float64[Tensor, "n d"]) -> float:
    finite = bool(torch.isfinite(a).all() and torch.isfinite(b).all())
    return frechet_distance(a, b) if finite else torch.nan


def _mean(x: Float64[Tensor, "n k"]) -> Float64[Tensor, " k"]:
    return x.nanmean(0)


def _known(x: Interval) -> Interval | None:
    return None if x.value != x.value else x  # NaN
