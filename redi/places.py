"""Where a few model calls are best made, as `python -m benchmarks.quality grids strong` found on the bundled model.

With few calls the places decide more than anything else: strong guidance wants more of them at high noise, and an even
spread over Karras noise levels, which wastes some near the end, suits many calls or weak guidance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_STEPS: Final = 48  # of the schedule that places were measured on, on Karras noise levels
_WEAK: Final = 3.0  # guidance scale
_STRONG: Final = 6.0
_AT: Final[Mapping[int, tuple[tuple[int, ...], tuple[int, ...]]]] = {  # calls → with weak guidance, with strong
    3: ((0, 19, 29), (0, 20, 28)),
    4: ((0, 14, 23, 30), (0, 16, 24, 29)),
    5: ((0, 11, 20, 28, 35), (0, 11, 19, 25, 30)),
    6: ((0, 7, 15, 22, 29, 36), (0, 10, 17, 22, 27, 32)),
    7: ((0, 8, 15, 21, 27, 34, 41), (0, 10, 16, 20, 24, 29, 34)),
    8: ((0, 6, 12, 18, 24, 30, 36, 42), (0, 7, 13, 18, 22, 25, 29, 34)),
}


def places(calls: int, fine: int, guidance: float) -> list[int]:
    """Steps of a schedule of `fine` on Karras noise levels at which so many calls are made.

    Between the scales that were measured places move linearly with guidance, beyond them they stay. Calls for which
    no place was found better than an even spread, and schedules too short for the places, are spread evenly.

    Args:
        calls: 1 … fine.
        fine: steps of the schedule.
        guidance: classifier-free guidance scale.
    """
    even = [round(i * fine / calls) for i in range(calls)]
    if calls not in _AT:
        return even
    much = min(max((guidance - _WEAK) / (_STRONG - _WEAK), 0.0), 1.0)
    found = [
        round(((1 - much) * weak + much * strong) * fine / _STEPS) for weak, strong in zip(*_AT[calls], strict=True)
    ]
    return found if found == sorted(set(found)) and found[-1] < fine else even
