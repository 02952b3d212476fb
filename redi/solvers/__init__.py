"""Solvers: the interface, and diffusers' schedulers behind it.

Names are imported lazily, so that the interface can be used without loading diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redi.solvers.base import SolverAdapter, SolverState
    from redi.solvers.diffusers import DiffusersSolver
    from redi.solvers.grids import schedule_of
    from redi.solvers.live import advance, install, require_grid, restore, snapshot, stepping

__all__ = [
    "DiffusersSolver",
    "SolverAdapter",
    "SolverState",
    "advance",
    "install",
    "require_grid",
    "restore",
    "schedule_of",
    "snapshot",
    "stepping",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "base" if name in ("SolverAdapter", "SolverState") else "diffusers"
    return getattr(import_module(f"{__name__}.{home}"), name)
