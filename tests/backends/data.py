"""Keys that several backends are tried on."""

from __future__ import annotations

import numpy as np
from numpy import ndarray


def tight_cluster(n: int, d: int = 16_384) -> tuple[ndarray, ndarray]:
    """Keys 0.01 apart at latents of standard deviation 14.6, and queries between them."""
    rng = np.random.default_rng(0)
    origin = 14.6 * rng.normal(size=d)
    direction = rng.normal(size=(n + 8, d))
    direction *= 0.01 / np.linalg.norm(direction, axis=1, keepdims=True)
    rows = (origin + direction).astype(np.float32)
    return rows[:n], rows[n:]


def blobs(n: int, d: int = 24) -> ndarray:
    """Twenty clusters that do not touch."""
    rng = np.random.default_rng(6)
    return (10 * rng.normal(size=(20, d))[rng.integers(20, size=n)] + rng.normal(size=(n, d))).astype(np.float32)
