"""What a pipeline does before its first model call: the shape of its noise, and what it tells its scheduler.

Packed latents, video frames, shifts by picture size: each pipeline knows its own, so it is asked, not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

from torch import Tensor

from redi.errors import InvalidInputError, UnsupportedSolverError
from redi.interception import EnoughError, Interception, Listener, Start, signature
from redi.schedules import Timetable

_PICTURES: Final = ("image", "control_image", "mask_image", "video", "image_embeds")


@final
@dataclass
class Look(Listener):
    """What was seen of a pipeline.

    Args:
        shape: of one sample, without the batch.
        height: of the picture in pixels, None where it has none.
        width: likewise.
        timetable: what the scheduler was told besides the number of steps.
    """

    shape: tuple[int, ...] = ()
    height: int | None = None
    width: int | None = None
    timetable: Timetable | None = None

    def call(self, pipe: Any, proceed: Callable[..., Any], arguments: dict[str, Any], given: frozenset[str]) -> Any:
        """Let the pipeline run until everything is seen."""
        try:
            proceed(**arguments)
        except EnoughError:
            return None
        raise InvalidInputError(f"{type(pipe).__name__} made no noise and set no timesteps; redi cannot follow it")

    def noise(self, drawn: Tensor, start: Start) -> Tensor:
        """See the shape."""
        self.shape = tuple(drawn.shape[1:])
        size = (start.arguments.get("height"), start.arguments.get("width"))
        self.height, self.width = (n if n is None else int(n) for n in size)
        self.done()
        return drawn

    def set_timesteps(self, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See what the scheduler is told."""
        _, self.timetable = told(proceed, args, kwargs)
        proceed(*args, **kwargs)
        self.done()

    def step(
        self, proceed: Callable[..., Any], model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any
    ) -> Any:
        """Too late."""
        raise EnoughError

    def done(self) -> None:
        """Leave when everything is seen."""
        if self.shape and self.timetable is not None:
            raise EnoughError


def look(pipe: Any, scheduler: Any, arguments: Mapping[str, Any]) -> Look:
    """Call a pipeline, and leave it before its first model call.

    Args:
        pipe: a pipeline that starts from noise alone.
        scheduler: a scheduler of its own to run with.
        arguments: of the call.

    Raises:
        InvalidInputError: it needs pictures, or redi has no place in it.
    """
    if needs := [name for name in _PICTURES if name in signature(type(pipe).__call__).parameters]:
        raise InvalidInputError(
            f"{type(pipe).__name__} takes pictures ({', '.join(needs)}), and there are none to give here; record rows "
            "from your own calls: with redi.record(pipe, folder, plans=[…]): pipe(…)"
        )
    seen = Look()
    interception = Interception(pipe, scheduler, seen)
    interception.install()
    try:
        pipe(**arguments)
    finally:
        interception.remove()
    return seen


def told(proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, Timetable]:
    """The number of steps, and what else, in a call of a scheduler's `set_timesteps`.

    Raises:
        UnsupportedSolverError: it is told something that cannot be told again.
    """
    bound = signature(proceed).bind(*args, **kwargs).arguments
    known = ("num_inference_steps", "device", "sigmas", "mu")
    if other := {name: value for name, value in bound.items() if name not in known and value is not None}:
        raise UnsupportedSolverError(
            f"the pipeline tells its scheduler {', '.join(other)}; redi follows the number of steps, sigmas and mu "
            "only: leave the schedule to the scheduler"
        )
    sigmas, mu, steps = (bound.get(name) for name in ("sigmas", "mu", "num_inference_steps"))
    levels = () if sigmas is None else tuple(float(s) for s in sigmas)
    timetable = Timetable(levels, None if mu is None else float(mu))
    return int(len(levels) if steps is None else steps), timetable
