"""Where calls are best made: two of the studies, and how places are tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any, Final

import numpy as np

from benchmarks.paper.settings import Settings, spread
from benchmarks.paper.ways import Way
from benchmarks.quality.lab import STEPS, Lab, at, called, evenly, fine, measured, one_noise, placed, scaled, served
from redi import KnowledgeBase, zoo
from redi.metrics import latent_error

FEWER: Final = 1024
"""Rows of a noise that places are tried on: every try derives a table."""
PLACED: Final = (3.0, 6.0, 7.5)  # guidance scales
LONGER: Final = (1.0, 1.25, 1.5, 2.0, 2.5)  # first and last step, as multiples of even ones


def grids(settings: Settings, pipe: Any) -> dict[str, Any]:
    """Where few calls are best made: places move, alone and together, from where they are served, judged on train
    prompts that are no rows; then all are compared on queries.
    """
    lab = one_noise(settings, pipe)
    kb = lab.rows("rows", settings.rows, settings.noises)
    tried = judged_on_train(lab, kb, None if settings.quick else FEWER)
    ways: list[Way] = []
    for n in (3,) if settings.quick else (3, 4, 5, 6):
        found = moved(called(placed(n)), tried, most=1 if settings.quick else 40)
        ways += [served(n, "evenly spread", plan=evenly(n)), served(n, "moved", plan=at(found)), served(n)]
    judge, made = measured(lab, ways, {"rows": kb}, lab.queries)
    return {"points": judge.table(ways, made), "plans": {w.name: w.plan for w in ways}, "rows": len(kb)}


def places(settings: Settings, pipe: Any) -> dict[str, Any]:
    """The same for several guidance scales, among shapes instead of by moves: best for noise of the bank, corrected by
    rows, and for nobody's noise, without rows, together.
    """
    points: list[dict[str, Any]] = []
    plans: dict[str, str] = {}
    for scale in PLACED[:1] if settings.quick else PLACED:
        lab, far = (one_noise(settings, pipe, guidance=scale, away=away) for away in (0.0, 1.0))
        kb = scaled(lab)
        near, alone = judged_on_train(lab, kb), judged_on_train(far, kb, neighbors=0)
        named: list[tuple[int, str, str]] = []
        for n in (4,) if settings.quick else (6, 8, 10):
            shapes = [called(evenly(n)), *shaped(n)][: 2 if settings.quick else None]
            errors = np.array([[near(s), alone(s)] for s in shapes])
            best = shapes[int((errors / errors[0]).sum(1).argmin())]
            named += [(n, "evenly spread", evenly(n)), (n, "shaped", at(best)), (n, "redi", placed(n, scale))]
        for there, bank in ((lab, True), (far, False)):
            alone_there: dict[str, Any] = {} if bank else {"neighbors": 0}
            ways = [served(n, name, guidance=scale, plan=plan, **alone_there) for n, name, plan in named]
            judge, made = measured(there, ways, {"rows": kb}, there.queries)
            points += [{**p, "guidance": scale, "bank": bank} for p in judge.table(ways, made)]
            plans |= {f"{w.name}, guidance {scale:g}": str(w.plan) for w in ways}
    return {"points": points, "plans": plans}


def judged_on_train(
    lab: Lab, kb: KnowledgeBase, most: int | None = None, **changes: Any
) -> Callable[[Sequence[int]], float]:
    """Latent error of places, on train prompts that are no rows."""
    prompts = spread(zoo.prompts("emoji", "train")[12_032:], 4 if lab.settings.quick else 64)
    reference = lab.sample([fine()], {}, prompts)[0].latents.flatten(0, 1)

    def error(tried: Sequence[int]) -> float:
        way = served(len(tried), guidance=lab.guidance, plan=at(tried), most=most, **changes)
        (made,) = lab.sample([way], {"rows": kb}, prompts)
        return latent_error(made.latents.flatten(0, 1), reference)

    return error


def shaped(calls: int) -> Iterator[list[int]]:
    """Places with a longer first step and a longer last one, evenly spread between."""
    for first in LONGER:
        for last in LONGER:
            a, b = (round(STEPS / calls * times) for times in (first, last))
            tried = [0, *(round(a + i * (STEPS - b - a) / (calls - 2)) for i in range(calls - 1))]
            if tried == sorted(set(tried)):
                yield tried


def moved(places: Sequence[int], error: Callable[[Sequence[int]], float], most: int) -> list[int]:
    """The places after moves that lowered the error, each of one place or of some in a row together by one entry.

    A place moved alone leaves a long step before it or after it; many a better spread is reached only by moving
    several at once. The first place stays.

    Args:
        places: ascending, from 0.
        error: of places.
        most: rounds over all places.
    """
    best, least = list(places), error(places)
    for _ in range(most):
        before = least
        for first, last in combinations(range(1, len(best) + 1), 2):
            for step in (-1, 1):
                tried = [*best[:first], *(place + step for place in best[first:last]), *best[last:]]
                ascending = tried == sorted(set(tried)) and tried[-1] < STEPS
                if ascending and (e := error(tried)) < least:
                    best, least = tried, e
        if least == before:
            break
    return best
