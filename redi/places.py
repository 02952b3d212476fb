"""Where a few model calls are best made, on the bundled model: `python -m benchmarks.quality places` compares.

With few calls their places decide more than anything else. On Karras noise levels a first step and a last one that are
longer than those between serve best, the last the longer the stronger guidance is; an even spread suits many calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

HALVED_UP_TO: Final[Mapping[int, float]] = {4: 3.0, 5: 3.0, 6: 4.5, 8: 4.5}
"""Calls → the guidance scale up to which half calls were found to be nearer (`python -m benchmarks.quality halves`).

There their steps serve noise of nobody's bank no worse than plain solvers, too.
"""
_STEPS: Final = 48  # of the schedule that places were measured on, on Karras noise levels
_AT: Final[Mapping[int, Mapping[float, tuple[int, ...]]]] = {  # calls → guidance scale → steps
    3: {3.0: (0, 19, 29), 6.0: (0, 20, 28)},
    4: {3.0: (0, 16, 25, 32), 6.0: (0, 17, 25, 30)},
    5: {3.0: (0, 13, 21, 28, 35), 6.0: (0, 14, 22, 28, 33)},
    6: {3.0: (0, 11, 18, 24, 30, 36), 6.0: (0, 12, 19, 24, 29, 34)},
    7: {3.0: (0, 8, 15, 21, 27, 33, 39), 6.0: (0, 10, 16, 20, 24, 29, 34)},
    8: {
        3.0: (0, 7, 13, 18, 23, 28, 33, 39),
        6.0: (0, 10, 16, 20, 24, 28, 32, 37),
        7.5: (0, 8, 13, 17, 21, 25, 29, 33),
    },
    9: {
        3.0: (0, 6, 12, 17, 22, 26, 31, 36, 42),
        6.0: (0, 7, 11, 16, 20, 24, 28, 33, 37),
        7.5: (0, 8, 13, 17, 20, 23, 27, 31, 35),
    },
    10: {
        3.0: (0, 6, 10, 14, 18, 22, 26, 30, 34, 40),
        6.0: (0, 7, 11, 15, 19, 22, 26, 30, 34, 38),
        7.5: (0, 7, 11, 15, 19, 22, 25, 28, 32, 36),
    },
    12: {
        1.5: (0, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 44),
        3.0: (0, 5, 9, 13, 17, 21, 24, 28, 32, 36, 40, 44),
        6.0: (0, 7, 10, 13, 16, 19, 22, 25, 28, 31, 35, 39),
    },
}


_HALVED: Final[Mapping[int, Mapping[float, tuple[int, ...]]]] = {  # the same, a step more for two half calls
    3: {3.0: (0, 11, 21, 29)},
    4: {3.0: (0, 9, 18, 26, 33), 6.0: (0, 7, 17, 25, 30)},
    5: {3.0: (0, 9, 17, 24, 30, 36), 6.0: (0, 6, 15, 22, 27, 31)},
    6: {3.0: (0, 8, 15, 21, 26, 31, 37), 6.0: (0, 8, 14, 19, 24, 29, 34)},
    8: {3.0: (0, 7, 13, 18, 22, 26, 30, 35, 41), 6.0: (0, 6, 12, 17, 21, 25, 29, 33, 38)},
}


def places(calls: int, fine: int, guidance: float, halved: bool = False) -> list[int] | None:
    """Steps of a schedule of `fine` on Karras noise levels at which so many calls are made; None is an even spread.

    Between the scales that were measured places move linearly with guidance, beyond them they stay. There is none
    for calls for which nothing better was found than an even spread, and in schedules that are too short.

    Args:
        calls: how many.
        fine: steps of the schedule.
        guidance: classifier-free guidance scale.
        halved: whether the first two are half calls, which leaves room for a step more.
    """
    known = _HALVED.get(calls, _AT.get(calls + 1)) if halved else _AT.get(calls)
    if known is None:
        return None
    below = max((scale for scale in known if scale <= guidance), default=min(known))
    above = min((scale for scale in known if scale >= guidance), default=max(known))
    share = (guidance - below) / (above - below) if below < above else 0.0
    moved = [((1 - share) * a + share * b) * fine / _STEPS for a, b in zip(known[below], known[above], strict=True)]
    found = [round(at) for at in moved]
    return found if found == sorted(set(found)) and found[-1] < fine else None
