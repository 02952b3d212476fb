"""Operations on a live diffusers scheduler, such as a pipeline's own: install a grid, snapshot, restore, advance.

What differs between schedulers is data in `redi.solvers.specs`; the few quirks data cannot say are in `stepping`.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast, final

import torch
from jaxtyping import Float
from torch import Tensor

from redi.errors import InvalidInputError, PlanError, UnsupportedSolverError
from redi.schedules import Grid
from redi.solvers.base import SolverState
from redi.solvers.grids import set_timesteps, spec_of
from redi.solvers.specs import HistoryField, SolverSpec

_INSTALLED: Final = "_redi_installed"


@final
@dataclass(frozen=True, eq=False)
class _Installed:
    """What installing a grid left in a scheduler: the same again need not be computed again, which takes milliseconds.

    Args:
        grid: that was installed.
        device: where its timesteps are.
        config: of the scheduler at that time.
        state: everything that the scheduler held then, but methods that others wrapped.
    """

    grid: Grid
    device: torch.device | str | None
    config: Any
    state: Mapping[str, Any]

    @classmethod
    def of(cls, scheduler: Any, grid: Grid, device: torch.device | str | None) -> _Installed:
        """As it is now."""
        held = vars(scheduler).items()
        kept = {n: v for n, v in held if n not in (_INSTALLED, "_internal_dict") and not callable(v)}
        return cls(grid, device, scheduler.config, _apart(kept))

    def fits(self, scheduler: Any, grid: Grid, device: torch.device | str | None) -> bool:
        """Whether installing would leave this."""
        return self.grid is grid and self.device == device and self.config is scheduler.config


def _apart(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same with lists of its own; tensors are never written into."""
    return {name: list(cast("list[Any]", v)) if isinstance(v, list) else v for name, v in state.items()}


def install(scheduler: Any, grid: Grid, device: torch.device | str | None = None) -> None:
    """Make `grid` the scheduler's own schedule, with no memory: what `set_timesteps` does, for subsets too.

    Raises:
        PlanError: the grid is not of this scheduler's schedule.
        UnsupportedSolverError: the grid is a subset and the scheduler cannot walk one.
    """
    before: _Installed | None = vars(scheduler).get(_INSTALLED)
    if before is not None and before.fits(scheduler, grid, device):
        vars(scheduler).update(_apart(before.state))
        return
    spec = spec_of(scheduler)
    if not grid.is_fine and not spec.coarse:
        raise UnsupportedSolverError(
            f"{spec.name} cannot walk a subset of its schedule, as a coarse plan needs: use a jump, or a solver whose "
            "step consumes its sample (DPMSolverMultistepScheduler, UniPCMultistepScheduler, DDIMScheduler, …)"
        )
    begin = grid.timetable.begin
    set_timesteps(scheduler, begin + grid.steps, device, grid.timetable)
    if not grid.is_fine:
        if len(scheduler.timesteps) != begin + grid.fine:
            raise PlanError(_misfit(spec, grid))
        # Index N, not −1: EulerDiscreteScheduler's log-linear sigmas have one more than a walk reads.
        at = [begin + entry for entry in grid.entries]
        for name in spec.arrays:
            setattr(scheduler, name, getattr(scheduler, name)[at])
        scheduler.timesteps = scheduler.timesteps[at[:-1]]
        scheduler.num_inference_steps = len(grid)
    require_grid(scheduler, grid)
    _remember(scheduler, spec, no_history(scheduler, spec))
    vars(scheduler)[_INSTALLED] = _Installed.of(scheduler, grid, device)


def require_grid(scheduler: Any, grid: Grid) -> None:
    """Check that a live scheduler walks exactly `grid`.

    Raises:
        PlanError: its timesteps are others, e.g. custom ones passed to a pipeline.
    """
    mine = scheduler.timesteps
    if mine is None or len(mine) != len(grid) or not torch.equal(mine.cpu(), grid.timesteps.cpu()):
        raise PlanError(_misfit(spec_of(scheduler), grid))


def snapshot(scheduler: Any, grid: Grid, position: int | None = None) -> SolverState:
    """The state of a live scheduler; its lists are copied, its tensors shared.

    Args:
        scheduler: walks `grid`.
        grid: what it walks.
        position: index of the next grid point to be called; None asks the scheduler, if it counts its steps.

    Raises:
        InvalidInputError: no position is given, and the scheduler (DDIM) does not know it.
    """
    spec = spec_of(scheduler)
    if position is None:
        position = _counted(scheduler, spec)
    if not 0 <= position <= len(grid):
        raise InvalidInputError(f"position must be 0 … {len(grid)}, given {position}")
    # A single-step method begins anew at its boundaries, and nothing is read after the end.
    begins = spec.layout == "singlestep" and grid.entries[position] in grid.boundaries
    if begins or position == len(grid):
        return SolverState(grid, position, no_history(scheduler, spec))
    empty = no_history(scheduler, spec)
    history = {f.name: _kept(f, getattr(scheduler, f.name, empty[f.name])) for f in spec.history}
    return SolverState(grid, position, history)


def restore(scheduler: Any, state: SolverState) -> None:
    """Put a live scheduler that walks `state.grid` where `state` stands.

    Raises:
        PlanError: the scheduler walks a grid of another length.
    """
    spec = spec_of(scheduler)
    if len(scheduler.timesteps) != len(state.grid):
        raise PlanError(_misfit(spec, state.grid))
    _remember(scheduler, spec, state.history)
    if spec.has_index:
        # By number, never by timestep: of equal timesteps diffusers finds the second.
        scheduler._step_index = state.position


@contextmanager
def stepping(scheduler: Any, grid: Grid, position: int) -> Generator[dict[str, Any]]:
    """Around one `scheduler.step` of a live scheduler: makes the stock step right on subsets and after a restart.

    On the fine grid with plain history it changes nothing. Use it wherever a scheduler on which a grid was installed,
    or a state restored, is stepped by its own method:

        with stepping(scheduler, grid, position) as options:
            out = scheduler.step(model_output, timestep, sample, **options)

    Args:
        scheduler: on which `grid` was installed.
        grid: what it walks.
        position: index of the grid point that is being called, 0 … m − 1.

    Yields:
        Keyword arguments that the step needs besides the caller's.

    Raises:
        InvalidInputError: the position is not a grid point.
    """
    spec = spec_of(scheduler)
    if not 0 <= position < len(grid):
        raise InvalidInputError(f"a step begins at a grid point, 0 … {len(grid) - 1}, given {position}")
    options: dict[str, Any] = {}
    if spec.has_index:
        scheduler._step_index = position
    if spec.name == "LMSDiscreteScheduler":
        # It takes its order from the step's number; after a restart there are fewer derivatives than that.
        options["order"] = min(len(scheduler.derivatives) + 1, 4)
    with _on_a_subset(scheduler, spec, grid, position):
        yield options
    if spec.layout == "plms":
        # The second call of PLMS's start (counter 1) belongs to entry 1, which repeats a timestep. A restart elsewhere
        # has no such entry; taking that call there would run every later call one noise level ahead of the sample.
        scheduler.counter = position + 1
        scheduler.cur_sample = scheduler.cur_sample if position == 0 else None


def advance(
    scheduler: Any, model_output: Float[Tensor, "b *s"], sample: Float[Tensor, "b *s"], grid: Grid, position: int
) -> Float[Tensor, "b *s"]:
    """Take one step of a live scheduler that stands at `position`; its history moves on.

    Args:
        scheduler: on which `grid` was installed.
        model_output: what the model returned (after guidance).
        sample: x at that point.
        grid: what the scheduler walks.
        position: 0 … m − 1.

    Raises:
        InvalidInputError: the position is not a grid point, or the shapes differ.
    """
    if model_output.shape != sample.shape:
        raise InvalidInputError(f"model output {tuple(model_output.shape)} and sample {tuple(sample.shape)} differ")
    with stepping(scheduler, grid, position) as options:
        # The class's own step: the instance's may have been wrapped by whoever called this.
        step = type(scheduler).step
        return step(scheduler, model_output, grid.timesteps[position], sample, return_dict=False, **options)[0]


def no_history(scheduler: Any, spec: SolverSpec) -> dict[str, Any]:
    """The history of a scheduler that has taken no step."""

    def empty(f: HistoryField) -> Any:
        match f.empty:
            case "none":
                return None
            case "zero":
                return 0
            case "list":
                return []
            case "slots":
                return [None] * scheduler.config.solver_order

    return {f.name: empty(f) for f in spec.history}


def _counted(scheduler: Any, spec: SolverSpec) -> int:
    if spec.has_index:
        return int(scheduler.begin_index or 0) if scheduler.step_index is None else int(scheduler.step_index)
    if spec.layout == "plms":
        return int(scheduler.counter)
    raise InvalidInputError(f"{spec.name} does not count its steps: say at which position of the grid it stands")


def _kept(f: HistoryField, value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim == 0:
        return value.item()  # Heun's dt: a number like the others, so that every tensor has the sample's shape
    if not isinstance(value, list):
        return value
    items = cast("list[Any]", value)
    return [None] * f.stale + items[f.stale :] if f.empty == "slots" else items[-f.newest :]


def _remember(scheduler: Any, spec: SolverSpec, history: Mapping[str, Any]) -> None:
    for name, value in history.items():
        setattr(scheduler, name, list(cast("list[Any]", value)) if isinstance(value, list) else value)
    for name in spec.scratch:
        setattr(scheduler, name, [None] * scheduler.config.solver_order)
    if hasattr(scheduler, "is_scale_input_called"):
        scheduler.is_scale_input_called = True  # the caller scales by the grid; without this the step warns


@contextmanager
def _on_a_subset(scheduler: Any, spec: SolverSpec, grid: Grid, position: int) -> Generator[None]:
    """What a scheduler must be for one step on a subset; afterwards it is what it was."""
    meanwhile: dict[str, Any] = {}
    if not grid.is_fine and spec.law == "cumprod":
        # DDIM subtracts a constant from the timestep. With one step, every timestep's predecessor is negative, and it
        # reads final_alpha_cumprod: there we put the next grid point's. Squaring the float64 root and rounding gives
        # back exactly the float32 number of the table.
        last = (grid.signal[position + 1] ** 2).to(scheduler.final_alpha_cumprod.dtype)
        meanwhile = {"num_inference_steps": 1, "final_alpha_cumprod": last}
    elif not grid.is_fine and spec.name == "UniPCMultistepScheduler":
        # The corrector starts again from last_sample and would discard whatever was added to the sample since.
        meanwhile = {"disable_corrector": list(range(len(grid)))}
    before = {name: getattr(scheduler, name) for name in meanwhile}
    vars(scheduler).update(meanwhile)
    try:
        yield
    finally:
        vars(scheduler).update(before)


def _misfit(spec: SolverSpec, grid: Grid) -> str:
    return (
        f"{spec.name} does not walk the expected schedule of {len(grid)} timesteps (of {grid.steps} steps); "
        "custom timesteps or sigmas are not supported: pass num_inference_steps, and a grid of this very scheduler"
    )
