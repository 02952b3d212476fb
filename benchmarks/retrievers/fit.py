"""A `World` that resembles real latents: their clusters, spectrum and smoothness in another shape."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy import ndarray
from scipy.cluster.vq import kmeans2

from benchmarks.retrievers.world import World

_EXPLAINED: Final = 0.99  # share of the variance that lies in the fitted directions; the rest is white


def fit(latents: ndarray, shape: tuple[int, int, int], *, clusters: int = 16, seed: int = 0) -> World:
    """A world whose keys have the variance per element, spectrum and clusters of these latents.

    Principal directions are carried over by mixing channels and interpolating in space, so they stay as smooth.

    Args:
        latents: (n, c, h, w) of a real model.
        shape: of the synthetic ones.
        clusters: how many at most.
        seed: of the mixing, the clustering and the rows.
    """
    n, d = len(latents), int(np.prod(shape))
    flat = latents.reshape(n, -1).astype(np.float64)
    mean = flat.mean(0)
    _, s, v = np.linalg.svd(flat - mean, full_matrices=False)
    most = min(n // 4, shape[0] * latents.shape[2] * latents.shape[3] // 2)
    r = max(1, min(most, int(np.searchsorted(np.cumsum(s**2), _EXPLAINED * np.sum(s**2))) + 1))
    tail = float(np.sqrt(np.sum(s[r:] ** 2) / n / flat.shape[1]))
    scale = np.sqrt(d / flat.shape[1])
    near = scale * (flat - mean) @ v[:r].T
    centres, labels = kmeans2(near, min(clusters, max(1, n // 8)), minit="++", seed=np.random.default_rng(seed))
    used = [i for i in range(len(centres)) if (labels == i).sum() > 1]
    basis = np.linalg.qr(_carried(v[:r].reshape(r, *latents.shape[1:]), shape, seed).reshape(r, d).T)[0].T
    return World(
        mean=_carried(mean.reshape(1, *latents.shape[1:]), shape, seed).reshape(d).astype(np.float32),
        basis=np.ascontiguousarray(basis, np.float32),
        shares=np.array([(labels == i).sum() for i in used]) / sum((labels == i).sum() for i in used),
        centres=np.stack([near[labels == i].mean(0) for i in used]).astype(np.float32),
        spreads=np.stack([near[labels == i].std(0) for i in used]).astype(np.float32),
        tail=tail,
        rows=1,
        seed=seed,
    )


def _carried(pictures: ndarray, shape: tuple[int, int, int], seed: int) -> ndarray:
    mixing = np.linalg.qr(np.random.default_rng(seed).normal(size=(pictures.shape[1], pictures.shape[1])))[0]
    channels = np.arange(shape[0]) % pictures.shape[1]
    mixed = np.einsum("nchw,ce->nehw", pictures, mixing[:, channels])
    return torch.nn.functional.interpolate(torch.from_numpy(mixed), shape[1:], mode="bilinear").numpy()
