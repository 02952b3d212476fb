"""The grid of any supported diffusers scheduler: its entries, boundaries, and noise law. No step is taken here."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import diffusers
import torch
from jaxtyping import Float64
from torch import Tensor

from redi.errors import PlanError, UnsupportedSolverError
from redi.schedules import PLAIN, Grid, Timetable
from redi.solvers.specs import Layout, SolverSpec, check_settings, find_spec


def spec_of(scheduler: Any) -> SolverSpec:
    """The spec of a live scheduler.

    Raises:
        UnsupportedSolverError: its class is unknown, or a subclass whose step may be another.
    """
    kind = type(scheduler)
    if kind is getattr(diffusers, kind.__name__, None):
        return find_spec(kind.__name__)
    known = [c.__name__ for c in kind.__mro__[1:] if c is getattr(diffusers, c.__name__, None) and "Sch" in c.__name__]
    hint = f"it derives from {known[0]}, but may step otherwise; use that class itself" if known else "unknown class"
    raise UnsupportedSolverError(f"{kind.__module__}.{kind.__name__} is not one of diffusers' own schedulers: {hint}")


def check_replayable(scheduler: Any, timetable: Timetable = PLAIN) -> SolverSpec:
    """The spec of a live scheduler whose settings too are such that its steps can be replayed.

    Raises:
        UnsupportedSolverError: the scheduler, or one of its settings, cannot be replayed.
    """
    spec = spec_of(scheduler)
    # with `mu` said, the schedule depends on the picture's size no more
    check_settings(spec, scheduler.config | ({} if timetable.mu is None else {"use_dynamic_shifting": False}))
    shift = getattr(scheduler, "_shift", None)
    if shift is not None and shift != scheduler.config.shift:
        raise UnsupportedSolverError(
            f"{spec.name} with set_shift({shift}) differs from its configuration, shift={scheduler.config.shift}; "
            f"make the scheduler with shift={shift} instead"
        )
    return spec


def schedule_of(scheduler: Any, steps: int, timetable: Timetable = PLAIN) -> Grid:
    """The fine grid that `scheduler.set_timesteps(steps)` would give; the scheduler itself is not touched.

    Args:
        scheduler: a diffusers scheduler.
        steps: how many are walked, those that the timetable leaves out not counted.
        timetable: what the scheduler is told besides.

    Raises:
        UnsupportedSolverError: the scheduler, or one of its settings, cannot be replayed.
        PlanError: it has no schedule of that many steps.
    """
    spec = check_replayable(scheduler, timetable)
    trained = scheduler.config.num_train_timesteps
    whole = steps + timetable.begin
    if timetable.sigmas and len(timetable.sigmas) != whole:
        raise PlanError(
            f"this schedule has the {len(timetable.sigmas)} noise levels that the pipeline chose for as many steps, "
            f"given {whole} steps; plan for {len(timetable.sigmas)}, or build a knowledge base of other fine steps"
        )
    if not 1 <= whole <= trained or steps < 1:
        raise PlanError(
            f"{spec.name} was trained on {trained} steps and can walk 1 to {trained} of them, given {steps}"
        )
    walked = copy.copy(scheduler)
    set_timesteps(walked, whole, None, timetable)
    n, boundaries = len(walked.timesteps), _boundaries(spec.layout, walked, whole)
    beyond = spec.law == "cumprod" and int(walked.timesteps.max()) >= trained
    if n != boundaries[-1] or beyond:
        raise PlanError(
            f"{spec.name} with timestep_spacing={scheduler.config.get('timestep_spacing')!r} has no schedule of "
            f"{whole} steps: it gives {n} timesteps from {float(walked.timesteps[0]):g}; choose another number of steps"
        )
    signal, noise = _noise_law(spec, walked, n)
    grid = Grid(
        steps=whole,
        entries=tuple(range(n + 1)),
        timesteps=walked.timesteps.cpu(),
        signal=signal,
        noise=noise,
        prediction=spec.prediction or scheduler.config.prediction_type,
        scales_input=spec.law == "sigma",
        initial_scale=float(getattr(walked, "init_noise_sigma", 1.0)),
        boundaries=boundaries,
        timetable=replace(timetable, begin=0),
    )
    return grid.tail(timetable.begin)


def set_timesteps(scheduler: Any, steps: int, device: torch.device | str | None, timetable: Timetable) -> None:
    """The stock `set_timesteps` of the scheduler's class for a whole schedule."""
    told: dict[str, Any] = {} if timetable.mu is None else {"mu": timetable.mu}
    told |= {"sigmas": list(timetable.sigmas)} if timetable.sigmas else {"num_inference_steps": steps}
    # The class's own: the instance's may have been wrapped by whoever called this.
    type(scheduler).set_timesteps(scheduler, device=device, **told)


def _boundaries(layout: Layout, walked: Any, steps: int) -> tuple[int | None, ...]:
    match layout:
        case "each":
            return tuple(range(steps + 1))
        case "plms":  # the second entry is called again by the second call of the start; a single step has none
            return (0, *range(2, steps + 2)) if steps > 1 else (0, 1)
        case "heun":  # two calls in each step but the last, which arrives at σ = 0
            return (*range(0, 2 * steps - 1, 2), 2 * steps - 1)
        case "singlestep":
            return (*(k if order == 1 else None for k, order in enumerate(walked.order_list)), steps)


def _noise_law(spec: SolverSpec, walked: Any, n: int) -> tuple[Float64[Tensor, " p"], Float64[Tensor, " p"]]:
    """Signal and noise at every entry and at the end, in float64 from the float32 numbers the scheduler steps with."""
    if spec.law == "ipndm":
        return walked.alphas[: n + 1].double().cpu(), walked.betas[: n + 1].double().cpu()
    if spec.law == "cumprod":
        table = walked.alphas_cumprod.double().cpu()
        last = int(walked.timesteps[-1]) - walked.config.num_train_timesteps // walked.num_inference_steps
        end = table[last] if last >= 0 else walked.final_alpha_cumprod.double().cpu()
        kept = torch.cat([table[walked.timesteps.cpu()], end.reshape(1)])
        return kept.sqrt(), (1 - kept).sqrt()
    sigmas = walked.sigmas[: n + 1].double().cpu()
    if spec.law == "sigma":
        return torch.ones_like(sigmas), sigmas
    if spec.law == "flow" or walked.config.use_flow_sigmas:
        return 1 - sigmas, sigmas
    signal = 1 / (sigmas**2 + 1).sqrt()
    return signal, sigmas * signal
