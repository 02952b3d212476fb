"""Hypothesis strategies: latents as they really are, in tight clusters far from the origin, with duplicates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from jaxtyping import Float32
from numpy import ndarray
from torch import Tensor


@st.composite
def clustered_latents(
    draw: Callable[..., Any], *, min_rows: int = 1, max_rows: int = 60, max_dimension: int = 2048
) -> Float32[ndarray, "n d"]:
    """Rows in one to four clusters, each up to 10⁶ times farther from the origin than it is wide.

    Scales run from 10⁻⁴ to 10⁴; some rows are exact duplicates of others; now and then all coordinates lie on a
    coarse lattice, so that distances tie.

    Args:
        draw: given by hypothesis.
        min_rows: least n.
        max_rows: largest n.
        max_dimension: largest d.
    """
    n = draw(st.integers(min_rows, max_rows))
    d = draw(st.sampled_from([x for x in (1, 2, 3, 16, 17, 64, 257, 1025, 2048, 4096) if x <= max_dimension]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** draw(st.floats(-4, 4))
    tightness = 10.0 ** draw(st.floats(-6, 0))
    centres = rng.normal(size=(draw(st.integers(1, 4)), d))
    noise = rng.integers(-1, 2, (n, d)) if draw(st.booleans()) else rng.normal(size=(n, d))
    rows = scale * (centres[rng.integers(len(centres), size=n)] + tightness * noise)
    for _ in range(draw(st.integers(0, n // 2))):
        rows[rng.integers(n)] = rows[rng.integers(n)]
    return rows.astype(np.float32)


@st.composite
def neighbourhoods(
    draw: Callable[..., Any], *, max_neighbors: int = 17, max_dimension: int = 257
) -> tuple[Float32[Tensor, "b k d"], Float32[Tensor, "b d"]]:
    """Keys of a few neighbours, nearest first, and the query they belong to.

    The query is one of the cluster, sometimes exactly a key. Rank-deficient keys (k > d, duplicates) are included.
    """
    b = draw(st.integers(1, 3))
    keys: list[Tensor] = []
    queries: list[Tensor] = []
    rows = draw(clustered_latents(min_rows=2, max_rows=max_neighbors + 1, max_dimension=max_dimension))
    for i in range(b):
        own = draw(st.integers(0, len(rows) - 1))
        others = np.roll(rows, i, axis=0)[1:].astype(np.float64)
        query = rows[own] if draw(st.booleans()) else rows[own] + rows.std(axis=0)
        order = np.argsort(np.square(others - query).sum(axis=1), kind="stable")
        keys.append(torch.from_numpy(others[order].astype(np.float32)))
        queries.append(torch.from_numpy(query.astype(np.float32)))
    return torch.stack(keys), torch.stack(queries)
