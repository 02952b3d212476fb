"""When neighbours are near enough to leap, and how far to believe them: by hand, or by what `redi.tune` fitted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64
from numpy import ndarray
from torch import Tensor

from redi.backends import Index
from redi.errors import InvalidInputError

_TOGETHER: Final = 64  # queries searched at once
_HALVINGS: Final = 60  # of an interval of distances: down to the rounding of float64


@final
@dataclass(frozen=True, slots=True)
class Trust:
    """What the distance of the nearest key says: how much of a correction to take, and how large the error stays.

    Fitted on a knowledge base's own rows. Curves are linear between their knots and constant before the first. Beyond
    the last nothing was ever seen: the error is taken to grow as the distance does.

    Args:
        unit: L2 distance that distances are divided by: between the keys of two rows of one noise, in the median.
        distances: the knots, ascending, in that unit.
        scale: share of the correction that is taken there, in [0, 1], not ascending; 0 leaves the plain solver.
        error: expected error there, as a fraction of the plain solver's at the same number of calls; not descending.
        bound: fraction that nine samples in ten stay within; not descending.
        average: expected error over the knowledge base's own rows.
    """

    unit: float
    distances: Sequence[float]
    scale: Sequence[float]
    error: Sequence[float]
    bound: Sequence[float]
    average: float

    def __post_init__(self) -> None:
        curves = (self.distances, self.scale, self.error, self.bound)
        finite = all(math.isfinite(v) and v >= 0 for v in (self.unit, self.average, *(v for c in curves for v in c)))
        rising = all(list(c) == sorted(c) for c in (self.distances, [-v for v in self.scale], self.error, self.bound))
        if not (finite and rising and self.unit and self.distances and len({len(c) for c in curves}) == 1):
            raise InvalidInputError(
                f"curves need as many finite values as knots, a falling scale and rising errors, given {self}"
            )

    def scales(self, distances: Float[Tensor, "b k"]) -> Float64[Tensor, " b"]:
        """Share of the correction that each sample takes; NaN for NaN.

        Args:
            distances: L2, nearest first.
        """
        return self._at(self.scale, self._nearest(distances))

    def errors(self, distances: Float[Tensor, "b k"], *, bound: bool = False) -> Float64[Tensor, " b"]:
        """Expected error of each sample, or what nine in ten stay within, as a fraction of the plain solver's.

        Args:
            distances: L2, nearest first.
            bound: which of the two.
        """
        x = self._nearest(distances)
        last = self.distances[-1]
        beyond = (x / last).clamp(min=1) if last else 1 + x
        expected = self._at(self.bound if bound else self.error, x) * beyond
        return torch.where(self._at(self.scale, x) == 0, 1.0, expected)

    def _nearest(self, distances: Tensor) -> Tensor:
        return distances[:, 0].detach().cpu().double() / self.unit

    def _at(self, curve: Sequence[float], x: Float64[Tensor, " b"]) -> Float64[Tensor, " b"]:
        return torch.from_numpy(np.interp(x.numpy(), self.distances, curve))


NOBODY: Final = Trust(unit=1.0, distances=(0.0,), scale=(0.0,), error=(1.0,), bound=(1.0,), average=1.0)
"""Believes no neighbour, however near: the plain solver serves."""


@final
@dataclass(frozen=True, slots=True)
class Gate:
    """Lets a sample leap if its nearest key is within a distance, and if the error expected of it is allowed.

    Args:
        max_distance: L2 distance (not squared) between query and nearest key, in the units of the key. It grows with
            √d, so it belongs to one kind of key of one model. `inf` always leaps.
        max_error: expected error, as a fraction of the plain solver's at the same number of calls; needs `trust`.
        trust: by which errors are expected and corrections shrunk; None takes every correction whole.
    """

    max_distance: float = math.inf
    max_error: float = math.inf
    trust: Trust | None = None

    def __post_init__(self) -> None:
        for name in ("max_distance", "max_error"):
            if not getattr(self, name) >= 0:
                raise InvalidInputError(f"{name} must be a number ≥ 0, given {getattr(self, name)}")
        if self.trust is None and self.max_error < math.inf:
            raise InvalidInputError(
                f"max_error={self.max_error:g} needs to know what error to expect; run redi tune KB, or give the gate "
                "a max_distance instead"
            )

    def opens(self, distances: Float[Tensor, "b k"]) -> Bool[Tensor, " b"]:
        """Whether each sample may leap; one that would take nothing of its correction does not.

        Args:
            distances: L2, nearest first, the square root of what `Neighbors` holds; NaN keeps the gate shut.
        """
        near = (distances <= self.max_distance).any(dim=1)
        if self.trust is None:
            return near
        trusted = (self.trust.errors(distances) <= self.max_error) & (self.trust.scales(distances) > 0)
        return near & trusted.to(near.device)

    def scales(self, distances: Float[Tensor, "b k"]) -> Float64[Tensor, " b"]:
        """Share of the correction that each sample takes.

        Args:
            distances: L2, nearest first.
        """
        return torch.ones(len(distances), dtype=torch.float64) if self.trust is None else self.trust.scales(distances)

    @property
    def reach(self) -> float:
        """The largest distance that may leap, 0 if none may."""

        def opens(distance: float) -> bool:
            return bool(self.opens(torch.tensor([[distance]], dtype=torch.float64)).all())

        if self.trust is None or opens(self.max_distance):
            return self.max_distance
        low, high = 0.0, min(self.max_distance, self.trust.unit * self.trust.distances[-1])
        while opens(high):
            low, high = high, 2 * high
        for _ in range(_HALVINGS):  # the error rises and the scale falls: what opens is an interval
            middle = (low + high) / 2
            low, high = (middle, high) if opens(middle) else (low, middle)
        return low

    @classmethod
    def calibrated(cls, index: Index, keys: ndarray, quantile: float = 0.99, *, limit: int = 1024) -> Gate:
        """A gate that lets this share of the knowledge base's own rows leap from the other rows.

        Args:
            index: built from `keys`.
            keys: (n, d), at least two.
            quantile: in (0, 1].
            limit: how many keys are looked at, evenly spread.

        Raises:
            InvalidInputError: a quantile out of range, or a single key.
        """
        if not 0 < quantile <= 1:
            raise InvalidInputError(f"quantile must be in (0, 1], given {quantile}")
        # A value that occurs, so that at least this share is let through, rounding included.
        return cls(float(np.quantile(leave_one_out(index, keys, limit=limit), quantile, method="higher")))


def leave_one_out(index: Index, keys: ndarray, *, limit: int = 1024) -> Float32[ndarray, " m"]:
    """L2 distance of each key to the nearest *other* key; a duplicate is another key.

    Args:
        index: built from `keys`.
        keys: (n, d), at least two.
        limit: how many keys are looked at, evenly spread.

    Raises:
        InvalidInputError: a single key, an index over other keys, or a limit below one.
    """
    n = len(keys)
    if n < 2 or index.shape[0] != n or limit < 1:
        raise InvalidInputError(
            f"leaving one out needs an index over at least two given keys and a limit of at least 1: "
            f"{n} keys given, {index.shape[0]} in the index, limit {limit}"
        )
    rows = np.unique(np.linspace(0, n - 1, min(n, limit)).round().astype(np.int64))
    nearest: list[ndarray] = []
    for start in range(0, len(rows), _TOGETHER):
        own = rows[start : start + _TOGETHER]
        found = index.search(keys[own], 2)
        # Among duplicates the key itself may not even be one of the two.
        other = np.where(found.ids[:, 0] == own, found.distances[:, 1], found.distances[:, 0])
        nearest.append(np.sqrt(other))
    return np.concatenate(nearest)
