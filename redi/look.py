"""What a pipeline does before its first model call: its noise, what it tells its scheduler, what it asks its network.

Packed latents, video frames, shifts by picture size: each pipeline knows its own, so it is asked, not computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

from redi.errors import InvalidInputError, UnsupportedSolverError
from redi.guidance import without
from redi.interception import EnoughError, Interception, Listener, Start, heard, signature
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
    _listen(pipe, scheduler, arguments, seen)
    return seen


@final
@dataclass
class Question(Listener):
    """What a pipeline first asks its network, which is not run.

    Args:
        pictures: of the call.
        doubled: whether the network is asked for twice as many samples, its other arguments as many.
    """

    pictures: int = 0
    doubled: bool = False

    def call(self, pipe: Any, proceed: Callable[..., Any], arguments: dict[str, Any], given: frozenset[str]) -> Any:
        """Let the pipeline run until it asks."""
        with contextlib.suppress(EnoughError), heard(pipe, self):
            proceed(**arguments)

    def noise(self, drawn: Tensor, start: Start) -> Tensor:
        """Count the pictures."""
        self.pictures = len(drawn)
        return drawn

    def asked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Leave with what is asked."""
        every = torch.arange(self.pictures)
        self.doubled = without(args, kwargs, every, self.pictures) is not None
        raise EnoughError

    def step(
        self, proceed: Callable[..., Any], model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any
    ) -> Any:
        """Too late: something else than the loop asked."""
        raise EnoughError


def doubles(pipe: Any, scheduler: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a pipeline guides by one call of twice the batch, which half calls take a half of.

    Args:
        pipe: a pipeline; its network is not run.
        scheduler: a scheduler of its own to run with.
        arguments: of a guided call.

    Raises:
        InvalidInputError: redi has no place in it, or its network is compiled so that nothing can be heard.
    """
    question = Question()
    _listen(pipe, scheduler, arguments, question)
    return question.doubled


def _listen(pipe: Any, scheduler: Any, arguments: Mapping[str, Any], listener: Listener) -> None:
    interception = Interception(pipe, scheduler, listener)
    interception.install()
    try:
        pipe(**arguments)
    finally:
        interception.remove()


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
