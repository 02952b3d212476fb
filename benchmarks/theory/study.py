"""Bounds against errors: rank correlations over the ablation, within its cells, and what calibration reaches."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.paper.settings import Settings
from benchmarks.quality import plain
from benchmarks.quality.lab import STEPS
from benchmarks.theory import norms
from benchmarks.theory.bounds import BOUNDS, Foretold, foretell
from benchmarks.theory.world import CORRECTED, TheoryWorld
from redi.intervals import bootstrap
from redi.theory import Calibrated
from redi.tuned import Tunings

LEVEL: Final = 0.9
POOLED: Final = "all"

Fits = dict[tuple[str, str], Calibrated]
"""(transport, bound) → what was fitted."""


@dataclass(frozen=True)
class Measured:
    """One cell with its errors.

    Args:
        known: what was foretold, for the queries below alone.
        error: measured on them.
        calibrate: how many of them, at the beginning, are for calibration; the others are for the test.
    """

    known: Foretold
    error: Tensor
    calibrate: int

    @property
    def transport(self) -> str:
        """The series it belongs to."""
        return self.known.cell.transport

    def test(self, name: str) -> tuple[Tensor, Tensor]:
        """A bound and the errors of the test prompts."""
        return self.known.bounds[name][self.calibrate :], self.error[self.calibrate :]


def study(settings: Settings, pipe: Any) -> dict[str, Any]:
    """Everything that is reported."""
    world = TheoryWorld(settings, pipe)
    asked, captions, fresh = world.asked
    pictures = 2 if settings.quick else 8
    constants = norms.measure(
        asked,
        world.solver(plain.FINE).schedule(STEPS),
        settings.cache / f"norms-{pictures}.json",
        pictures,
        quick=settings.quick,
    )
    known = foretell(world, constants, world.cells())
    at_value, at_end = measure(world, known, fresh)
    fits = calibrate(at_value), calibrate(at_end)
    groups = captions[fresh:]
    seed, repeats = settings.seed, 20 if settings.quick else 400
    return {
        "rows": settings.rows,
        "cells": len(known),
        "norms": {
            n: {str(e): [min(v), statistics.mean(v), max(v)] for e, v in m.items()}
            for n, m in constants.measured.items()
        },
        "value": correlations(at_value, fits[0], groups, repeats, seed),
        "end": correlations(at_end, fits[1], groups, repeats, seed),
        "trust": trusts(world, at_value),
        "points": [point(m, fits[0]) for m in at_value],
        "end_points": [point(m, fits[1]) for m in at_end],
    }


def measure(world: TheoryWorld, known: Sequence[Foretold], fresh: int) -> tuple[list[Measured], list[Measured]]:
    """Errors at the value (at the end, where every step is corrected), and errors of jumps at the end."""
    quick = world.settings.quick
    sampled = world.sampled()
    by_cell = {f.cell: f for f in known}
    at_value: list[Measured] = [Measured(f, f.error, fresh) for f in known if f.error is not None]
    at_end: list[Measured] = []
    for corrected, calibrate, test in ((True, 64, len(world.queries)), (False, 32, 32)):
        cells = [c for c in sampled if (c.transport == CORRECTED) == corrected]
        calibrate, test = (2, 2) if quick else (min(calibrate, fresh), min(test, len(world.queries)))
        errors, first = world.ends(cells, calibrate, test)
        which = torch.tensor([*range(calibrate), *range(fresh, fresh + test)])
        for cell, error in zip(cells, errors, strict=True):
            f = by_cell[cell]
            grown = {n: b[which] * (1.0 if corrected else f.growth[n == "mean"]) for n, b in f.bounds.items()}
            of = Foretold(cell, grown, f.growth, None, f.distance[which], f.constants)
            (at_value if corrected else at_end).append(Measured(of, error, first))
    return at_value, at_end


def calibrate(measured: Sequence[Measured]) -> Fits:
    """Each bound of each transport fitted on the errors of all its cells, on the prompts for calibration."""
    fits: Fits = {}
    for transport in dict.fromkeys(m.transport for m in measured):
        mine = [m for m in measured if m.transport == transport]
        for name in [n for n in BOUNDS if n in mine[0].known.bounds]:
            bound = torch.cat([m.known.bounds[name][: m.calibrate] for m in mine])
            fits[transport, name] = Calibrated.fit(bound, torch.cat([m.error[: m.calibrate] for m in mine]), LEVEL)
    return fits


def correlations(
    measured: Sequence[Measured], fits: Fits, groups: Sequence[str], repeats: int, seed: int
) -> list[dict[str, Any]]:
    """A row for each transport and bound, and for all transports together, on the test prompts."""
    found: list[dict[str, Any]] = []
    series = list(dict.fromkeys(m.transport for m in measured))
    shared = [n for n in BOUNDS if all((t, n) in fits for t in series)]
    everything = [(POOLED, n) for n in shared] if len(series) > 1 else []
    for transport, name in [*fits, *everything]:
        mine = [m for m in measured if transport in (m.transport, POOLED)]
        width = min(len(m.error) - m.calibrate for m in mine)
        bound, error = (
            torch.stack([x[:width] for x in each]) for each in zip(*(m.test(name) for m in mine), strict=True)
        )
        fit = [fits[m.transport, name] for m in mine]
        expected = torch.stack([f.expected(b) for f, b in zip(fit, bound, strict=True)])
        within = torch.stack([f.upper(b) for f, b in zip(fit, bound, strict=True)]) >= error
        found.append(
            {
                "transport": transport,
                "bound": name,
                "cells": len(mine),
                "queries": width,
                "held": float((error <= bound).double().mean()),
                "ratio": float((bound / error).log().mean().exp()),
                "raw": _over_cells(bound, error, groups, repeats, seed),
                "calibrated": _over_cells(expected, error, groups, repeats, seed),
                "samples": _rho(expected.flatten(), error.flatten()),
                "within": _within(bound, error),
                "coverage": float(within.double().mean()),
                "bias": float(expected.mean() / error.mean()),
                "fit": None
                if transport == POOLED
                else {"factor": fit[0].factor, "power": fit[0].power, "margin": fit[0].margin},
            }
        )
    return found


def trusts(world: TheoryWorld, measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Within each cell of a corrected plan: how well near is told from far, by `Trust` or the distance it goes by."""
    tuned = Tunings.read(world.rows_kb).plans
    found: list[dict[str, Any]] = []
    for m in (m for m in measured if m.transport == CORRECTED):
        cell, error, test = m.known.cell, m.error[m.calibrate :], slice(m.calibrate, None)
        row = {
            "plan": cell.way.plan,
            "neighbors": cell.neighbors,
            "rows": cell.rows,
            "distance": _rho(m.known.distance[test], error),
            "mean": _rho(m.test("mean")[0], error),
        }
        if cell.rows == world.settings.rows and (trust := tuned.get(str(cell.way.plan))) is not None:
            row["trust"] = _rho(trust.trust.errors(m.known.distance[test][:, None]), error)
        found.append(row)
    return found


def point(m: Measured, fits: Fits) -> dict[str, Any]:
    """A cell as one flat object: means over the test prompts."""
    cell = m.known.cell
    return {
        "transport": cell.transport,
        "plan": cell.way.plan,
        "key": cell.start,
        "value": cell.stop,
        "neighbors": cell.neighbors,
        "rows": cell.rows,
        "error": float(m.error[m.calibrate :].mean()),
        "expected": float(fits[m.transport, "mean"].expected(m.test("mean")[0]).mean()),
        **{n: float(b[m.calibrate :].mean()) for n, b in m.known.bounds.items()},
        "constants": [list(c) for c in m.known.constants],
    }


def _over_cells(bound: Tensor, error: Tensor, groups: Sequence[str], repeats: int, seed: int) -> list[float]:
    """Rank correlation of cell means with its interval over captions; both (cells, queries)."""
    i = bootstrap(
        lambda b, e: _rho(b.mean(0), e.mean(0)),
        bound.T,
        error.T,
        groups=list(groups)[: bound.shape[1]],
        repeats=repeats,
        seed=seed,
    )
    return [i.value, i.low, min(i.high, 1.0)]


def _within(bound: Tensor, error: Tensor) -> list[float]:
    """Quartiles over cells of the rank correlation over queries within a cell."""
    each = torch.tensor([_rho(b, e) for b, e in zip(bound, error, strict=True)], dtype=torch.float64)
    return torch.quantile(each, torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)).tolist()


def _rho(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation; 0 where one of both does not vary."""
    if bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return 0.0
    return float(spearmanr(a.numpy(), b.numpy()).statistic)
