"""The place and the unit in which approximate backends see the keys, so that their codes are spent on what differs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
from jaxtyping import Float, Float32, Float64
from numpy import ndarray


@final
@dataclass(frozen=True, eq=False)
class Frame:
    """Keys are seen as (x − c) / s. Latents lie far from the origin, and half precision ends at 65,504.

    Args:
        centre: c.
        unit: s, a power of two so that dividing by it rounds nothing.
    """

    centre: Float32[ndarray, " d"]
    unit: float

    @classmethod
    def of(cls, rows: Float32[ndarray, "m d"], *, centred: bool = True) -> Frame:
        """The frame in which these rows have mean 0 (if `centred`) and a mean square near 1."""
        mean = rows.mean(axis=0, dtype=np.float64) if centred else np.zeros(rows.shape[1])
        centre = mean.astype(np.float32)
        spread = np.sqrt(np.mean([np.square(row.astype(np.float64) - centre).mean() for row in rows]))
        return cls(centre, float(2.0 ** np.round(np.log2(spread))) if spread > 0 else 1.0)

    def into(self, rows: Float32[ndarray, "m d"]) -> Float32[ndarray, "m d"]:
        """A copy of these rows as they are seen."""
        seen = rows - self.centre
        seen /= np.float32(self.unit)
        return seen

    def back(self, squared: Float[ndarray, "b k"]) -> Float64[ndarray, "b k"]:
        """Squared distances in the keys' own unit."""
        return squared.astype(np.float64) * self.unit**2

    def save(self, folder: Path) -> None:
        """Beside the index."""
        np.save(folder / "frame.npy", np.append(self.centre, self.unit), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> Frame:
        """What `save` wrote."""
        centre, unit = np.split(np.load(folder / "frame.npy", allow_pickle=False), [-1])
        return cls(centre.astype(np.float32), float(unit[0]))
