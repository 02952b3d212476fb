"""Synthetic keys in the shape of Stable Diffusion's latents: clusters and spectrum fitted to real ones, rows on demand.

Row i is a function of the seed and i alone, so a million rows of 16,384 numbers need not lie anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import numpy as np
from numpy import ndarray

HELD_OUT: Final = 1 << 40  # ids from here on are queries
_CHUNK: Final = 1 << 22  # elements made at once


@final
@dataclass(frozen=True, eq=False)
class World:
    """A mixture of Gaussians in a few directions, and white noise around it.

    Args:
        mean: (d,).
        basis: (r, d), orthonormal.
        shares: (c,), how many of the rows each cluster has.
        centres: (c, r).
        spreads: (c, r), standard deviations.
        tail: standard deviation of the white noise in every element.
        rows: n.
        seed: of everything random.
    """

    mean: ndarray
    basis: ndarray
    shares: ndarray
    centres: ndarray
    spreads: ndarray
    tail: float
    rows: int
    seed: int

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and their dimension."""
        return self.rows, self.basis.shape[1]

    def __getitem__(self, ids: ndarray) -> ndarray:
        """Rows of these ids, float16."""
        r, d = self.basis.shape
        out = np.empty((len(ids), d), np.float16)
        some = max(1, _CHUNK // d)
        for start in range(0, len(ids), some):
            these = ids[start : start + some]
            near, noise = np.empty((len(these), r), np.float32), np.empty((len(these), d), np.float32)
            for j, i in enumerate(these.tolist()):
                rng = np.random.default_rng([self.seed, i])
                cluster = rng.choice(len(self.shares), p=self.shares)
                near[j] = self.centres[cluster] + self.spreads[cluster] * rng.standard_normal(r, np.float32)
                rng.standard_normal(dtype=np.float32, out=noise[j])
            noise *= self.tail
            noise += near @ self.basis
            noise += self.mean
            out[start : start + some] = noise
        return out

    def chunks(self) -> Iterator[ndarray]:
        """All rows in order."""
        some = max(1, _CHUNK // self.shape[1])
        for start in range(0, self.rows, some):
            yield self[np.arange(start, min(start + some, self.rows))]

    def queries(self, count: int) -> ndarray:
        """Rows that no knowledge base has, float32."""
        return self[np.arange(HELD_OUT, HELD_OUT + count)].astype(np.float32)

    def of(self, rows: int) -> World:
        """The same world with another number of rows; the first ones are the same."""
        return World(self.mean, self.basis, self.shares, self.centres, self.spreads, self.tail, rows, self.seed)

    def save(self, file: Path) -> None:
        """As .npz."""
        np.savez(file, **{name: np.asarray(value) for name, value in vars(self).items()})

    @classmethod
    def load(cls, file: Path) -> World:
        """What was saved."""
        with np.load(file) as f:
            return cls(**{k: f[k].item() if f[k].ndim == 0 else f[k] for k in f.files})
