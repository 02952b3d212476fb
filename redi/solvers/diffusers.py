"""Any supported diffusers scheduler as a pure `SolverAdapter`: `redi.solvers.live` on a private copy."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast, final

import diffusers
import numpy as np
from diffusers.schedulers.scheduling_deis_multistep import DEISMultistepScheduler
from jaxtyping import Float
from torch import Tensor

from redi.errors import InvalidInputError, PlanError
from redi.schedules import PLAIN, Grid, Timetable
from redi.solvers.base import SolverAdapter, SolverState
from redi.solvers.grids import check_replayable, schedule_of, spec_of
from redi.solvers.live import advance, install, no_history, require_grid, restore, snapshot, stepping
from redi.solvers.specs import find_spec

__all__ = ["DiffusersSolver", "advance", "install", "require_grid", "restore", "schedule_of", "snapshot", "stepping"]

_THIRD_ORDER: Final = ((1.5, 12), (3.0, 16), (6.0, 24))  # up to which guidance scale it is better, from how many calls


@final
@dataclass(frozen=True)
class DiffusersSolver(SolverAdapter):
    """A diffusers scheduler as pure functions; make one with `of` or `from_config`.

    Args:
        name: the scheduler's class.
        config: what identifies it, fit for JSON: `class`, its settings without diffusers' private ones, and under
            `timetable` what a pipeline tells it besides the number of steps, if anything.
        timetable: the same, read.
    """

    name: str
    config: Mapping[str, Any] = field(hash=False)
    timetable: Timetable
    _scheduler: Any = field(repr=False, compare=False)
    # A memo of schedules, nothing that evolves: (steps, entries) → a scheduler on which that grid is installed.
    _installed: dict[tuple[int, tuple[int, ...]], Any] = field(
        default_factory=dict[tuple[int, tuple[int, ...]], Any], init=False, repr=False, compare=False
    )

    @classmethod
    def of(cls, scheduler: Any, timetable: Timetable = PLAIN) -> DiffusersSolver:
        """The solver of a scheduler, which is copied.

        Args:
            scheduler: a diffusers scheduler.
            timetable: what it is told besides the number of steps.

        Raises:
            UnsupportedSolverError: the scheduler, or one of its settings, cannot be replayed.
        """
        spec = check_replayable(scheduler, timetable)
        mine = copy.deepcopy(scheduler)
        if spec.layout == "singlestep" and mine.config.final_sigmas_type == "zero":
            # set_timesteps changes this setting, with a warning; so a used scheduler and a new one are the same.
            mine.register_to_config(lower_order_final=True)
        # `from_config` of diffusers leaves in it what the scheduler it came from could be told, and this one cannot
        own = inspect.signature(type(mine).__init__).parameters
        settings = {k: v for k, v in _plain_settings(mine.config).items() if k in own}
        told = {"timetable": timetable.to_json()} if timetable != PLAIN else {}
        return cls(spec.name, {"class": spec.name, **settings, **told}, timetable, mine)

    @classmethod
    def from_config(cls, class_name: str, config: Mapping[str, Any]) -> DiffusersSolver:
        """The solver of `class_name(**config)`; reads what `name` and `config` hold.

        Raises:
            UnsupportedSolverError: the scheduler, or one of its settings, cannot be replayed.
            InvalidInputError: a setting that this scheduler does not have.
        """
        find_spec(class_name)
        kind = getattr(diffusers, class_name)
        settings = {k: v for k, v in config.items() if k not in ("class", "timetable") and not k.startswith("_")}
        told: Any = config.get("timetable", {})
        unknown = sorted(set(settings) - set(inspect.signature(kind.__init__).parameters))
        if unknown or config.get("class", class_name) != class_name:
            raise InvalidInputError(
                f"not a configuration of {class_name}: unknown settings {unknown}, class {config.get('class')!r}; "
                f"diffusers {diffusers.__version__} is installed, a newer one may know them"
            )
        for key, value in settings.items():
            if value in ("inf", "-inf", "nan"):
                settings[key] = float(value)
        return cls.of(kind(**settings), Timetable(**told | {"sigmas": tuple(told.get("sigmas", ()))}))

    def on(self, timetable: Timetable) -> DiffusersSolver:
        """The same scheduler, told another timetable."""
        return self if timetable == self.timetable else DiffusersSolver.of(self._scheduler, timetable)

    def __str__(self) -> str:
        return self.name

    def identity(self) -> Mapping[str, Any]:
        """The scheduler's class and settings."""
        return self.config

    @property
    def on_karras(self) -> bool:
        """Whether it walks the noise levels of Karras et al. (2022, arXiv 2206.00364)."""
        return bool(self.config.get("use_karras_sigmas", False))

    def scheduler(self) -> Any:
        """A new diffusers scheduler of this solver, for a pipeline to own."""
        return copy.deepcopy(self._scheduler)

    @property
    def suits_coarse(self) -> bool:
        """Whether a step consumes the sample it is given and works on any grid, as a coarse plan needs."""
        return find_spec(self.name).coarse

    def for_coarse_steps(self, steps: int, calls: int, guidance: float) -> DiffusersSolver:
        """The solver whose `calls` long steps are nearest to `steps` short ones of this.

        For DPM-Solver++ of a diffusion that is DEIS; and where calls are many and guidance is weak its own third order,
        which strong guidance makes unstable (Lu et al. 2022, DPM-Solver++, advise order 2 there). Corrected by the same
        rows, each came nearest to the fine solve there (`python -m benchmarks.quality choices guidance`). Any other
        solver is its own.
        """
        own = self._scheduler.config
        if self.name != "DPMSolverMultistepScheduler" or own.prediction_type == "flow_prediction":
            return self
        third = any(guidance <= scale and calls >= least for scale, least in _THIRD_ORDER)
        kind, order = (type(self._scheduler), 3) if third else (DEISMultistepScheduler, 2)
        other = DiffusersSolver.of(kind.from_config(own, solver_order=order), self.timetable)
        return other if self.schedule(steps).meets(other.schedule(steps)) else self

    def schedule(self, steps: int) -> Grid:
        """The fine grid of `steps` solver steps.

        Raises:
            PlanError: the scheduler has no schedule of that many steps.
        """
        return schedule_of(self._scheduler, steps, self.timetable)

    def init(self, grid: Grid) -> SolverState:
        """The state before the first call on `grid`.

        Raises:
            PlanError: the grid is not of this scheduler's schedule.
            UnsupportedSolverError: the grid is a subset and the scheduler cannot walk one.
        """
        scheduler = self._on(grid)
        require_grid(scheduler, grid)
        return SolverState(grid, 0, no_history(scheduler, spec_of(scheduler)))

    def step(
        self, model_output: Float[Tensor, "b *s"], sample: Float[Tensor, "b *s"], state: SolverState
    ) -> tuple[Float[Tensor, "b *s"], SolverState]:
        """From x at `state.position` to x at the next grid point; every step works on a scheduler of its own.

        Raises:
            InvalidInputError: the walk is at its end, or the shapes differ.
        """
        scheduler = copy.copy(self._on(state.grid))
        restore(scheduler, state)
        x = advance(scheduler, model_output, sample, state.grid, state.position)
        return x, snapshot(scheduler, state.grid, state.position + 1)

    def restart(self, state: SolverState) -> SolverState:
        """The state at the same position with no memory, such that the next steps warm up correctly.

        Raises:
            PlanError: the position lies inside a solver step.
        """
        if (entry := state.grid.entries[state.position]) not in state.grid.boundaries:
            near = sorted((e for e in state.grid.boundaries if e is not None), key=lambda e: abs(e - entry))[:2]
            raise PlanError(f"{self.name} cannot restart at entry {entry}, inside a step; nearest: {sorted(near)}")
        return super().restart(state)

    def _on(self, grid: Grid) -> Any:
        key = (grid.steps, grid.entries)
        if key not in self._installed:
            scheduler = copy.copy(self._scheduler)
            install(scheduler, grid)
            self._installed[key] = scheduler
        return self._installed[key]


def _plain_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray | np.generic):
            return plain(value.tolist())
        if isinstance(value, list | tuple):
            return [plain(v) for v in cast("list[Any]", value)]
        # JSON has no infinities.
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return {k: plain(v) for k, v in sorted(config.items()) if not k.startswith("_")}
