"""When neighbours are near enough to leap: a distance, chosen by hand or from the knowledge base's own keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, final

import numpy as np
from jaxtyping import Bool, Float, Float32
from numpy import ndarray
from torch import Tensor

from redi.backends import Index
from redi.errors import InvalidInputError

_TOGETHER: Final = 64  # queries searched at once


@final
@dataclass(frozen=True, slots=True)
class Gate:
    """Lets a sample leap if its nearest key is within a distance.

    Args:
        max_distance: L2 distance (not squared) between query and nearest key, in the units of the key. It grows with
            √d, so it belongs to one kind of key of one model. `inf` always leaps.
    """

    max_distance: float = math.inf

    def __post_init__(self) -> None:
        if not self.max_distance >= 0:
            raise InvalidInputError(f"max_distance must be a number ≥ 0, given {self.max_distance}")

    def opens(self, distances: Float[Tensor, "b k"]) -> Bool[Tensor, " b"]:
        """Whether each sample may leap.

        Args:
            distances: L2 distances, the square root of what `Neighbors` holds; NaN keeps the gate shut.
        """
        return (distances <= self.max_distance).any(dim=1)

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
