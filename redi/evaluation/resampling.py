"""Draws of whole prompts, made once and used for every measure: `redi.intervals` for many columns at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, final

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from redi.intervals import Difference, Interval, percentiles

_TOGETHER: Final = 500  # draws counted at once: a few megabytes


@final
class Draws:
    """A cluster bootstrap (Davison & Hinkley 1997, §3.8): prompts drawn with replacement, as many as there are.

    Args:
        groups: for each picture the number of its prompt, 0 … g − 1, in order.
        repeats: how many times all prompts are drawn.
        seed: of the draws.
    """

    def __init__(self, groups: Sequence[int], repeats: int, seed: int) -> None:
        self.repeats = repeats
        self._groups = torch.tensor(groups)
        self._members = [(self._groups == g).nonzero().flatten() for g in range(max(groups) + 1)]
        generator = torch.Generator().manual_seed(seed)
        count = len(self._members)
        self._drawn = torch.stack([torch.randint(count, (count,), generator=generator) for _ in range(repeats)])

    def means(self, x: Float64[Tensor, "n k"]) -> Float64[Tensor, "r k"]:
        """Of every draw the mean of each column; a NaN is no sample, and a column of nothing else stays NaN."""
        there = (~x.isnan()).double()
        shape = (len(self._members), x.shape[1])
        sums = torch.zeros(shape, dtype=torch.float64).index_add_(0, self._groups, x.nan_to_num(0.0))
        counts = torch.zeros(shape, dtype=torch.float64).index_add_(0, self._groups, there)
        found: list[Tensor] = []
        for drawn in self._drawn.split(_TOGETHER):
            times = torch.zeros(len(drawn), len(self._members), dtype=torch.float64)
            times.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
            found.append((times @ sums) / (times @ counts))
        return torch.cat(found)

    def rows(self, draw: int) -> Int64[Tensor, " m"]:
        """The pictures of one draw."""
        return torch.cat([self._members[g] for g in self._drawn[draw].tolist()])


def interval(value: float, drawn: Float64[Tensor, " r"], level: float = 0.95) -> Interval:
    """As `redi.intervals.bootstrap` makes it; draws that had no sample are left out, and of nothing comes NaN."""
    kept = drawn[~drawn.isnan()]
    return Interval(value, torch.nan, torch.nan) if len(kept) == 0 else percentiles(value, kept, level)


def difference(value: float, drawn: Float64[Tensor, " r"], level: float = 0.95) -> Difference:
    """As `redi.intervals.paired` makes it, for any statistic: P(|d* − mean d*| ≥ |d|) over draws d*."""
    kept = drawn[~drawn.isnan()]
    if len(kept) == 0:
        return Difference(Interval(value, torch.nan, torch.nan), 1.0)
    beyond = ((kept - kept.mean()).abs() >= abs(value) * (1 - 1e-12)).sum()
    return Difference(percentiles(value, kept, level), float((1 + beyond) / (1 + len(kept))))
