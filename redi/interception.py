"""Puts our functions in the way of a diffusers pipeline's own methods, and takes them out again without a trace.

Knows nothing of retrieval: `redi.scheduler` serves through it, `redi.recorder` listens through it.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, FunctionType, MethodType
from typing import Any, Final, final
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from redi.errors import InvalidInputError
from redi.pipelines import denoiser

_SLOT: Final = "_redi_interception"


class EnoughError(Exception):
    """Raised by a listener that wants no more of the call under way, and caught by it."""


@final
@dataclass(frozen=True)
class Start:
    """How a pipeline came by the noise it starts from.

    Args:
        arguments: of its `prepare_latents`, defaults filled in.
        states: digests of its generators' states before; None without a generator.
        scale: what the noise is multiplied by.
    """

    arguments: Mapping[str, Any]
    states: list[bytes] | None
    scale: float = 1.0

    @property
    def passed(self) -> bool:
        """Whether the caller brought the noise along."""
        return self.arguments.get("latents") is not None


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

    def noise(self, drawn: Tensor, start: Start) -> Tensor:
        """The starting noise, times `start.scale`; what is returned is used instead."""
        return drawn

    def prepared(self, sample: Tensor) -> None:
        """What the pipeline's loop will start with."""
        return None

    def embedded(self, embeddings: Float[Tensor, "b tokens e"]) -> None:
        """The prompt embeddings the pipeline computed."""
        return None

    def set_timesteps(self, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The scheduler is told how many steps."""
        proceed(*args, **kwargs)

    def get_timesteps(self, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The pipeline chooses, by `strength`, how much of the schedule it walks: timesteps, and their number."""
        return proceed(*args, **kwargs)

    def bar(self, bar: Any) -> None:
        """The pipeline shows a progress bar."""
        return None

    def asked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The denoising network is called; what is returned is its arguments instead. Only while it is `heard`."""
        return None

    def answered(self, output: Any) -> Any:
        """It answers; what is returned is the answer instead."""
        return output


@final
@dataclass
class Interception:
    """A listener installed in one pipeline.

    Args:
        pipe: the pipeline; its class, its scheduler and some of its methods are stood in for.
        scheduler: the scheduler to run with; it is changed in place, so hand over a copy of its own.
        listener: who decides.
        others: further schedulers that the listener may put in the scheduler's place.
    """

    pipe: Any
    scheduler: Any
    listener: Listener
    others: Sequence[Any] = ()
    start: Start | None = None  # while the pipeline prepares its latents and no noise was heard of yet
    _class: type = field(init=False)
    _scheduler: Any = field(init=False)
    _before: dict[str, Any] = field(init=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Interception:
        """A copied pipeline has a copy of its own; its scheduler alone cannot be copied while we are in it.

        Raises:
            InvalidInputError: the scheduler is copied alone, and we would drag the pipeline along.
        """
        if id(self.pipe) not in memo:
            raise InvalidInputError(
                f"the scheduler of a {type(self.pipe).__name__} cannot be copied while redi is active in the pipeline; "
                "call redi.disable(pipe) first. A pipeline that copies its scheduler itself cannot be served"
            )
        memo[id(self)] = mine = copy.copy(self)
        for name, value in vars(self).items():
            setattr(mine, name, copy.deepcopy(value, memo))
        return mine

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
        if unknown := _unknown_start(pipe):
            raise InvalidInputError(
                f"{type(pipe).__name__} starts from a picture in a way that redi does not know ({unknown}); "
                "use a text-to-image, image-to-image or inpainting pipeline"
            )
        self._class, self._scheduler = type(pipe), pipe.scheduler
        self._before = {name: vars(pipe)[name] for name in _IN_PIPELINE if name in vars(pipe)}
        vars(pipe)[_SLOT] = self
        pipe.scheduler = self.scheduler
        schedulers = [(scheduler, _IN_SCHEDULER) for scheduler in (self.scheduler, *self.others)]
        for owner, stand_ins in (*schedulers, (pipe, _IN_PIPELINE)):
            for name, stand_in in stand_ins.items():
                if (proceed := getattr(owner, name, None)) is not None:
                    ours: Any = functools.wraps(proceed)(functools.partial(stand_in, self, proceed))
                    ours.__signature__ = signature(proceed)  # pipelines ask for it in every call
                    setattr(owner, name, ours)
        pipe.__class__ = _calling_us(self._class)

    def remove(self) -> None:
        """Leave the pipeline as it was found."""
        pipe = self.pipe
        pipe.__class__ = self._class
        for name in (*_IN_PIPELINE, _SLOT):
            vars(pipe).pop(name, None)
        vars(pipe).update(self._before)
        if self.stands_in(pipe.scheduler):  # one put there since stays
            pipe.scheduler = self._scheduler

    def stands_in(self, scheduler: Any) -> bool:
        """Whether this is one that was put in the place of the pipeline's own."""
        return any(scheduler is ours for ours in (self.scheduler, *self.others))

    @contextmanager
    def own_scheduler(self) -> Generator[None]:
        """For the block, the pipeline has its own again, unless it was given another since."""
        serving = self.pipe.scheduler
        if self.stands_in(serving):
            self.pipe.scheduler = self._scheduler
        try:
            yield
        finally:
            self.pipe.scheduler = serving


@contextmanager
def heard(pipe: Any, listener: Listener) -> Generator[None]:
    """For the block, a call of the pipeline, the listener hears the network, which other pipelines may share.

    Raises:
        InvalidInputError: there is nothing to hear.
    """
    if why := unheard(pipe):
        raise InvalidInputError(f"half calls change what the network is called with, but {why}; or use whole calls")
    network, loop = denoiser(pipe), loop_code(pipe)

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return listener.asked(args, kwargs) if _called_by(loop, pipe) else None

    def after(_: Any, args: tuple[Any, ...], output: Any) -> Any:
        return listener.answered(output) if _called_by(loop, pipe) else None

    asked = network.register_forward_pre_hook(before, with_kwargs=True)
    answered = network.register_forward_hook(after)
    try:
        yield
    finally:
        asked.remove()
        answered.remove()


def unheard(pipe: Any) -> str:
    """Why what a pipeline's network is asked cannot be heard; nothing if it can."""
    network = denoiser(pipe)
    if network._compiled_call_impl is None:  # pyright: ignore[reportPrivateUsage]
        return ""
    return (
        f"the {type(network).__name__} was compiled by its own compile(), which leaves nothing to hear: set the "
        "pipeline's network to torch.compile(network) instead"
    )


def starts_from_picture(pipe: Any) -> bool:
    """Whether a pipeline puts its noise on a picture, as image-to-image and inpainting do."""
    return "timestep" in signature(type(pipe).prepare_latents).parameters


def signature(call: Callable[..., Any]) -> inspect.Signature:
    """That of a function or method; worked out once for each, since that takes as long as some of their calls."""
    function, bound = getattr(call, "__func__", call), isinstance(call, MethodType)
    if not isinstance(function, FunctionType):
        return inspect.signature(call)
    known = _signatures.setdefault(function, {})
    if bound not in known:
        known[bound] = inspect.signature(call)
    return known[bound]


_signatures: WeakKeyDictionary[FunctionType, dict[bool, inspect.Signature]] = WeakKeyDictionary()


def _unknown_start(pipe: Any) -> str:
    """What keeps us from knowing which noise a pipeline starts from; nothing if we know."""
    if not starts_from_picture(pipe):
        return "prepare_latents(image)" if "image" in signature(pipe.prepare_latents).parameters else ""
    if not hasattr(pipe, "get_timesteps"):
        return "no get_timesteps"
    told = list(signature(pipe.get_timesteps).parameters)[:3]
    return "" if told == ["num_inference_steps", "strength", "device"] else f"get_timesteps({', '.join(told)})"


def loop_code(pipe: Any) -> Any:
    """The code object of a pipeline's own loop, by which that loop is recognised."""
    return inspect.unwrap(type(pipe).__call__).__code__


def _called_by(loop: Any, pipe: Any) -> bool:
    """Whether the network whose hook asks was called by this pipeline's loop itself.

    Another thread, another pipeline and a callback of this one may call the same network meanwhile.
    """
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    for torchs in (False, True):  # out of the hook into torch, which called it, and out of that
        while frame is not None and _is_torchs(frame) == torchs:
            frame = frame.f_back
    return frame is not None and frame.f_code is loop and frame.f_locals.get("self") is pipe


def _is_torchs(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] == "torch"


def active(pipe: Any) -> Interception | None:
    """What is installed in a pipeline, if anything."""
    return vars(pipe).get(_SLOT)


@functools.cache
def _calling_us(cls: type) -> type:
    """A class like `cls` whose instances hand their calls to their listener, and are saved as what they were before."""
    proceed: Callable[..., Any] = cls.__call__

    @functools.wraps(proceed)
    def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature(proceed).bind(pipe, *args, **kwargs)
        given = frozenset(bound.arguments) - {"self"}
        bound.apply_defaults()
        arguments = {k: v for k, v in bound.arguments.items() if k != "self"}
        arguments |= arguments.pop("kwargs", {})
        it: Interception = vars(pipe)[_SLOT]
        return it.listener.call(pipe, functools.partial(proceed, pipe), arguments, given)

    def save_pretrained(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        with vars(pipe)[_SLOT].own_scheduler():
            return cls.save_pretrained(pipe, *args, **kwargs)  # type: ignore[attr-defined]

    ours = {"__call__": call, "save_pretrained": functools.wraps(cls.save_pretrained)(save_pretrained)}  # type: ignore[attr-defined]
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}  # what is saved says what to load
    return type(cls.__name__, (cls,), ours | named)


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


def _add_noise(it: Interception, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Puts noise on a picture; the noise is replaced in place, for the pipeline may keep it for later."""
    if (start := it.start) is not None:
        it.start = None
        noise: Tensor = signature(proceed).bind(*args, **kwargs).arguments["noise"]
        noise.copy_(it.listener.noise(noise, start))
    return proceed(*args, **kwargs)


def _prepare_latents(it: Interception, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    bound = signature(proceed).bind(*args, **kwargs)
    bound.apply_defaults()
    generator = bound.arguments.get("generator")
    states = None if generator is None else list(_states(generator))
    it.start = Start(bound.arguments, states)
    try:
        out = proceed(*args, **kwargs)
    finally:
        pending, it.start = _pending(it), None
    latents, rest = (out, ()) if isinstance(out, Tensor) else (out[0], tuple(out[1:]))
    if pending is not None:  # else the noise is on a picture already
        scale = float(getattr(it.scheduler, "init_noise_sigma", 1.0))
        drawn, latents = latents, it.listener.noise(latents, Start(bound.arguments, states, scale))
        if latents is not drawn:  # inpainting at full strength hands the noise back a second time, unscaled
            again = [isinstance(o, Tensor) and o.shape == drawn.shape and torch.equal(o * scale, drawn) for o in rest]
            rest = tuple(latents / scale if same else o for o, same in zip(rest, again, strict=True))
    it.listener.prepared(latents)
    return latents if isinstance(out, Tensor) else (latents, *rest)


def _pending(it: Interception) -> Start | None:
    return it.start


def _get_timesteps(it: Interception, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return it.listener.get_timesteps(proceed, args, kwargs)


def _encode_prompt(it: Interception, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    out = proceed(*args, **kwargs)
    it.listener.embedded(out if isinstance(out, Tensor) else out[0])
    return out


def _progress_bar(it: Interception, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    bar = proceed(*args, **kwargs)
    it.listener.bar(bar)
    return bar


_IN_SCHEDULER: Final = {
    "step": _step,
    "set_timesteps": _set_timesteps,
    "add_noise": _add_noise,
    "scale_noise": _add_noise,
}
_IN_PIPELINE: Final = {
    "prepare_latents": _prepare_latents,
    "encode_prompt": _encode_prompt,
    "get_timesteps": _get_timesteps,
    "progress_bar": _progress_bar,
}


def _states(generator: Any) -> Iterator[bytes]:
    """A digest of each generator's state: its seed and how much was drawn from it.

    Raises:
        InvalidInputError: what is given in a generator's place is none.
    """
    for g in generator if isinstance(generator, (list, tuple)) else [generator]:  # pyright: ignore
        if not isinstance(g, torch.Generator):
            raise InvalidInputError(
                f"generator must be a torch.Generator or a list of them, given {g!r}; for a seed: "
                "torch.Generator().manual_seed(seed)"
            )
        yield hashlib.blake2b(g.get_state().numpy().tobytes(), digest_size=16).digest()
