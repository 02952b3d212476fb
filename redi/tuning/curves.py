"""From what left-out rows said to what their distances say: the curves of a `Trust`."""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np
import torch
from numpy import ndarray
from scipy.optimize import isotonic_regression
from torch import Tensor

from redi.gate import Trust
from redi.tuning.left_out import Sums

KNOTS: Final = 12
SAMPLES: Final = 16
"""Of each knot, at least: a quantile of nine tenths needs about so many."""
LEVEL: Final = 0.9


def fit(near: Sums, far: Sums, unit: float) -> Trust:
    """Curves over distance, each knot in the middle of as many samples.

    Args:
        near: rows left out, with the neighbours that a query like them would have.
        far: the same rows with their nearest neighbours left out too, which shows what greater distance does.
        unit: of distances.
    """
    every = Sums.cat([near, far])
    x = (every.distance / unit).numpy()
    knots = _bins(x)
    distances = np.maximum.accumulate([x[k].mean() for k in knots])
    across = np.array([float(every.across[k].sum()) for k in knots])
    found = np.array([float(every.found[k].sum()) for k in knots])
    share = np.divide(across, found, out=np.ones_like(found), where=found > 0)
    scale = _monotone(share.clip(0, 1), found + np.finfo(float).tiny, increasing=False)

    def errors(of: Sums) -> ndarray:
        return of.errors(_at(scale, distances, of, unit)).numpy()

    errors_ = errors(every)
    sizes = np.array([len(k) for k in knots], dtype=float)
    error = _monotone(np.array([errors_[k].mean() for k in knots]), sizes, increasing=True)
    bound = _monotone(
        np.array([np.quantile(errors_[k], LEVEL, method="higher") for k in knots]), sizes, increasing=True
    )
    curves = {"distances": distances, "scale": scale, "error": error, "bound": bound}
    return Trust(unit=unit, average=float(errors(near).mean()), **{n: tuple(c.tolist()) for n, c in curves.items()})


def at_least(trust: Trust, error: float) -> Trust:
    """The same curves, nowhere below an error."""
    raised = {name: tuple(max(error, e) for e in getattr(trust, name)) for name in ("error", "bound")}
    return dataclasses.replace(trust, **raised)


def stretched(trust: Trust, error: float, bound: float, average: float) -> Trust:
    """The same curves with errors and bounds multiplied, and another average."""
    return dataclasses.replace(
        trust,
        error=tuple(error * e for e in trust.error),
        bound=tuple(bound * b for b in trust.bound),
        average=average,
    )


def _bins(x: ndarray) -> list[ndarray]:
    order = np.argsort(x, kind="stable")
    return np.array_split(order, max(1, min(KNOTS, len(order) // SAMPLES)))


def _at(curve: ndarray, distances: ndarray, of: Sums, unit: float) -> Tensor:
    return torch.from_numpy(np.interp((of.distance / unit).numpy(), distances, curve))


def _monotone(y: ndarray, weights: ndarray, *, increasing: bool) -> ndarray:
    found: ndarray = isotonic_regression(y, weights=weights, increasing=increasing).x
    return found  # equal values come out equal to the last bit, so a curve is monotone as `Trust` asks
