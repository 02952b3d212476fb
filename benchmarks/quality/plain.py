"""Plain diffusers solvers as a careful user would run them: every spacing of their steps is tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from benchmarks.paper.common import World
from redi import DiffusersSolver
from redi.cli import names
from redi.errors import ReDiError

FINE: Final = "dpmsolver++-karras"
"""The solver of rows and of the fine solve."""

SPACINGS: Final = ("linspace", "leading", "trailing", "karras", "exponential")
FAMILIES: Final[Mapping[str, Sequence[str]]] = {
    "ddim": ("linspace", "leading", "trailing"),
    "pndm": ("linspace", "leading", "trailing"),
    "heun": ("linspace", "karras"),
    "lms": ("linspace", "trailing", "karras"),
    "dpmsolver++": SPACINGS,
    "dpmsolver++3": SPACINGS,
    "unipc": SPACINGS,
    "deis": SPACINGS,
}
"""Solver → spacings. The bundled model cannot be walked by IPNDM's own noise levels; LMS is its nearest relative."""


def solver(name: str, trained: Any) -> DiffusersSolver:
    """`family-spacing`, on the model's schedule."""
    family, _, spacing = name.partition("-")
    if spacing in ("", "karras"):
        return names.solver(name, trained)
    stock = names.solver(family, trained).scheduler()
    settings = {"use_exponential_sigmas": True} if spacing == "exponential" else {"timestep_spacing": spacing}
    return DiffusersSolver.of(type(stock).from_config(stock.config, **settings))


def steps_for(world: World, name: str, calls: int) -> int | None:
    """Steps that make exactly so many model calls, or None where no number does."""
    for steps in range(calls, 0, -1):
        try:
            made = world.solver(name).schedule(steps).fine
        except (ReDiError, ValueError, IndexError):  # diffusers has its own ways to say that these steps are too few
            return None
        if made <= calls:
            return steps if made == calls else None
    return None


def runs(world: World, families: Sequence[str], budgets: Sequence[int]) -> Iterator[tuple[str, str, int, int]]:
    """(family, name, calls, steps) of everything that can be run."""
    for family in families:
        for spacing in FAMILIES[family]:
            for calls in budgets:
                if steps := steps_for(world, f"{family}-{spacing}", calls):
                    yield family, f"{family}-{spacing}", calls, steps
