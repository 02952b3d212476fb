"""How sure a measured number is: bootstrap intervals and tests that resample whole groups of pictures.

Pictures of one caption resemble each other, so a caption with all its styles and noises is drawn, or left out, at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from redi.errors import InvalidInputError


@final
@dataclass(frozen=True)
class Interval:
    """A statistic of the samples at hand, and where it would lie for others like them.

    Args:
        value: of the samples themselves.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float

    def __contains__(self, x: float) -> bool:
        return self.low <= x <= self.high


@final
@dataclass(frozen=True)
class Difference:
    """A difference of means of two ways that met the same pictures.

    Args:
        interval: mean of the first minus mean of the second.
        p: two-sided p-value of no difference, at least 1/(repeats + 1).
    """

    interval: Interval
    p: float


def bootstrap(
    statistic: Callable[..., float],
    *samples: Tensor,
    groups: Sequence[Hashable] | Int64[Tensor, " n"],
    repeats: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """A cluster bootstrap (Davison & Hinkley 1997, §3.8): groups drawn with replacement, as many as there are.

    The percentiles are shifted by the mean's distance from the value. For a mean this changes nothing; a statistic that
    repeated rows bias, as they do a Fréchet distance between sets that are no pairs, keeps its own value in the middle.

    Args:
        statistic: maps tensors like `samples`, with any number of rows, to a number.
        samples: tensors with one row per picture; a picture's rows are drawn together.
        groups: one label per picture.
        repeats: how many times all groups are drawn.
        seed: of the draws; the same seed draws the same groups for every statistic.
        level: coverage of the interval.

    Raises:
        InvalidInputError: no pictures, fewer than two groups, other numbers of rows than of labels, a level outside
            (0, 1) or no repeats.
    """
    drawn = [statistic(*(x[rows] for x in samples)) for rows in _draws(samples, groups, repeats, seed, level)]
    return percentiles(statistic(*samples), torch.tensor(drawn, dtype=torch.float64), level)


def paired(
    a: Float[Tensor, " n"],
    b: Float[Tensor, " n"],
    groups: Sequence[Hashable] | Int64[Tensor, " n"],
    *,
    repeats: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """Whether two ways differ in the mean over the same pictures.

    Args:
        a: one number per picture.
        b: the other way's, in the same order.
        groups: one label per picture.
        repeats: how many times all groups are drawn; the smallest p-value is 1/(repeats + 1).
        seed: of the draws.
        level: coverage of the interval.

    Returns:
        The interval of mean(a) − mean(b), and P(|d* − d| ≥ |d|) over draws d* (Davison & Hinkley 1997, §4.4).

    Raises:
        InvalidInputError: as for `bootstrap`.
    """
    d = a.detach().double().cpu() - b.detach().double().cpu()
    value = float(d.mean())
    means = torch.stack([d[rows].mean() for rows in _draws((d,), groups, repeats, seed, level)])
    # a tolerance of rounding, so that equal numbers differ with p = 1
    beyond = ((means - value).abs() >= abs(value) * (1 - 1e-12)).sum()
    return Difference(percentiles(value, means, level), float((1 + beyond) / (1 + repeats)))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of several tests, adjusted so that all rejections at α are right with probability 1 − α (Holm 1979).

    Raises:
        InvalidInputError: a value outside [0, 1].
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise InvalidInputError(f"p-values lie in [0, 1], given {list(p_values)}")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def percentiles(value: float, drawn: Float64[Tensor, " r"], level: float) -> Interval:
    """The interval of a statistic whose value in each of the draws is `drawn`; see `bootstrap`."""
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(drawn - drawn.mean(), ends).tolist()
    return Interval(value, value + low, value + high)


def _draws(
    samples: Sequence[Tensor],
    groups: Sequence[Hashable] | Int64[Tensor, " n"],
    repeats: int,
    seed: int,
    level: float,
) -> Iterator[Int64[Tensor, " r"]]:
    labels = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    members: dict[Hashable, list[int]] = {}
    for row, label in enumerate(labels):
        members.setdefault(label, []).append(row)
    if any(len(x) != len(labels) for x in samples):
        raise InvalidInputError(f"{len(labels)} labels for samples of {[len(x) for x in samples]} rows; give one each")
    if len(members) < 2:
        raise InvalidInputError(f"a bootstrap over groups needs at least 2 of them, given {len(members)}")
    if not (0 < level < 1 and repeats >= 1):
        raise InvalidInputError(f"expected a level in (0, 1) and repeats ≥ 1, given {level} and {repeats}")
    rows = [torch.tensor(m) for m in members.values()]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(repeats):
        drawn = torch.randint(len(rows), (len(rows),), generator=generator)
        yield torch.cat([rows[i] for i in drawn.tolist()])
