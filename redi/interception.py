"""Puts our functions in the way of a diffusers pipeline's own methods, and takes them out again without a trace.

Knows nothing of retrieval: `redi.scheduler` serves through it, `redi.recorder` listens through it.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Final, final, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from redi.errors import InvalidInputError

_SLOT: Final = "_redi_interception"


class Listener(ABC):
    """What an interception hands a pipeline's call to. A subclass owes `call` and `step`; the rest it may leave be."""

    @abstractmethod
    def call(self, pipe: Any, proceed: Callable[..., Any], arguments: dict[str, Any], given: frozenset[str]) -> Any:
        """The whole call: `arguments` with defaults filled in, the names `given` by the caller."""

    @abstractmethod
    def step(
        self, proceed: Callable[..., Any], model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any
    ) -> Any:
        """The scheduler takes a step."""

    def noise(self, drawn: Tensor, passed: bool, before: list[bytes] | None) -> Tensor:
        """The starting sample, after the pipeline drew it, or was `passed` one; `before`: its generators' states."""
        return drawn

    def embedded(self, embeddings: Float[Tensor, "b tokens e"]) -> None:
        """The prompt embeddings the pipeline computed."""
        return None

    def set_timesteps(self, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The scheduler is told how many steps."""
        proceed(*args, **kwargs)


@final
@dataclass
class Interception:
    """A listener installed in one pipeline.

    Args:
        pipe: the pipeline; its class, scheduler, `prepare_latents` and `encode_prompt` are stood in for.
        scheduler: the scheduler to run with; it is changed in place, so hand over a copy of its own.
        listener: who decides.
    """

    pipe: Any
    scheduler: Any
    listener: Listener
    _class: type = field(init=False)
    _scheduler: Any = field(init=False)

    def install(self) -> None:
        """Stand in the way.

        Raises:
            InvalidInputError: something of ours is in the way already, or the pipeline has no place for us.
        """
        pipe = self.pipe
        if _SLOT in vars(pipe):
            raise InvalidInputError("redi is active in this pipeline already; call redi.disable(pipe) first")
        for name in ("scheduler", "prepare_latents"):
            if not hasattr(pipe, name):
                raise InvalidInputError(f"expected a diffusers pipeline with a {name}, given {type(pipe).__name__}")
        if "image" in inspect.signature(pipe.prepare_latents).parameters:
            raise InvalidInputError(
                f"{type(pipe).__name__} starts from a picture, not from noise of the bank; use its text-to-image form"
            )
        self._class, self._scheduler = type(pipe), pipe.scheduler
        vars(pipe)[_SLOT] = self
        pipe.scheduler = self.scheduler
        self.scheduler.step = functools.wraps(self.scheduler.step)(functools.partial(_step, self, self.scheduler.step))
        proceed = self.scheduler.set_timesteps
        self.scheduler.set_timesteps = functools.wraps(proceed)(functools.partial(_set_timesteps, self, proceed))
        pipe.prepare_latents = functools.wraps(pipe.prepare_latents)(
            functools.partial(_prepare_latents, self, pipe.prepare_latents)
        )
        if hasattr(pipe, "encode_prompt"):
            pipe.encode_prompt = functools.wraps(pipe.encode_prompt)(
                functools.partial(_encode_prompt, self, pipe.encode_prompt)
            )
        pipe.__class__ = _calling_us(self._class)

    def remove(self) -> None:
        """Leave the pipeline as it was found."""
        pipe = self.pipe
        pipe.__class__ = self._class
        for name in ("prepare_latents", "encode_prompt", _SLOT):
            vars(pipe).pop(name, None)
        if pipe.scheduler is self.scheduler:  # another one was put there since: it stays
            pipe.scheduler = self._scheduler


def loop_code(pipe: Any) -> Any:
    """The code object of a pipeline's own loop, by which that loop is recognised."""
    return inspect.unwrap(type(pipe).__call__).__code__


def active(pipe: Any) -> Interception | None:
    """What is installed in a pipeline, if anything."""
    return vars(pipe).get(_SLOT)


@functools.cache
def _calling_us(cls: type) -> type:
    """A class like `cls` (same name, so that saving works) whose instances hand their calls to their listener."""
    proceed: Callable[..., Any] = cls.__call__
    signature = inspect.signature(proceed)

    @functools.wraps(proceed)
    def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(pipe, *args, **kwargs)
        given = frozenset(bound.arguments) - {"self"}
        bound.apply_defaults()
        arguments = {k: v for k, v in bound.arguments.items() if k != "self"}
        arguments |= arguments.pop("kwargs", {})
        return vars(pipe)[_SLOT].listener.call(pipe, functools.partial(proceed, pipe), arguments, given)

    return type(
        cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    )


def _step(
    it: Interception,
    proceed: Callable[..., Any],
    model_output: Tensor,
    timestep: Any,
    sample: Tensor,
    *a: Any,
    **kw: Any,
) -> Any:
    return it.listener.step(functools.partial(_with, proceed, a), model_output, timestep, sample, **kw)


def _with(proceed: Callable[..., Any], more: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
    return proceed(*args, *more, **kwargs)


def _set_timesteps(it: Interception, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    it.listener.set_timesteps(proceed, args, kwargs)


def _prepare_latents(it: Interception, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    bound = inspect.signature(proceed).bind(*args, **kwargs)
    bound.apply_defaults()
    generator = bound.arguments.get("generator")
    before = None if generator is None else list(_states(generator))
    out = proceed(*args, **kwargs)
    passed = bound.arguments.get("latents") is not None
    if isinstance(out, Tensor):
        return it.listener.noise(out, passed, before)
    return (it.listener.noise(out[0], passed, before), *out[1:])


def _encode_prompt(it: Interception, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    out = proceed(*args, **kwargs)
    it.listener.embedded(out if isinstance(out, Tensor) else out[0])
    return out


def _states(generator: torch.Generator | list[torch.Generator]) -> Iterator[bytes]:
    """A digest of each generator's state: its seed and how much was drawn from it."""
    for g in generator if isinstance(generator, list) else [generator]:
        yield hashlib.blake2b(g.get_state().numpy().tobytes(), digest_size=16).digest()


@final
class SteeredTimesteps(Tensor):
    """Timesteps that a pipeline's own loop walks as `follow` says; to everyone else an ordinary tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore
    code: Any
    follow: Callable[[], Iterator[int]]

    @classmethod
    def of(cls, timesteps: Tensor, code: Any, follow: Callable[[], Iterator[int]]) -> SteeredTimesteps:
        """Steer the loop whose code object is `code` through the entries that `follow()` yields."""
        steered = timesteps.as_subclass(cls)
        steered.code, steered.follow = code, follow
        return steered

    @no_type_check  # a checker's wrapper would stand between us and our caller
    def __iter__(self) -> Iterator[Tensor]:
        plain = self.as_subclass(Tensor)
        caller: FrameType | None = inspect.currentframe()
        caller = caller.f_back if caller else None
        if caller is not None and caller.f_code is self.code:
            return (plain[entry] for entry in self.follow())
        return iter(plain.unbind(0))
