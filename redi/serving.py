"""A knowledge base being served in one enabled pipeline: listens to its calls, and begins a run for each."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, final

from torch import Tensor

from redi.engine import ReDiEngine, origin
from redi.errors import InvalidInputError, PlanError
from redi.interception import Listener, Start, heard, unheard
from redi.jump import JumpRun
from redi.knowledge_base import KnowledgeBase
from redi.knowledge_base.config import versions
from redi.negatives import unverified
from redi.pipelines import beside_the_prompt, changeable, parts_of
from redi.run import CoarseRun, OnMiss, PlainRun, Run
from redi.settings import decide
from redi.types import LeapReport


@final
@dataclass
class Server(Listener):
    """Hands what it hears to the run under way.

    Args:
        engines: of one knowledge base; of two with equal steps the first serves.
        schedulers: the one that the pipeline runs with for each engine; those of one solver share it.
        own: a copy of the pipeline's, for calls that no engine serves; None where there are none.
        loop_code: of the pipeline's loop.
        on_mismatch: what a call with other settings gets.
        on_miss: what a sample without near rows gets; None is what its plan gives.
        seed: of calls without a generator.
    """

    engines: Sequence[ReDiEngine]
    schedulers: Sequence[Any]
    own: Any
    loop_code: Any
    on_mismatch: Literal["error", "plain"]
    on_miss: OnMiss | None
    seed: int
    run: Run | None = None
    last: LeapReport | None = None
    deaf: bool = False
    parts: Mapping[str, tuple[int, int]] | None = None  # the pipeline's networks when it was enabled

    def __post_init__(self) -> None:
        for engine in self.engines:
            coarse = engine.plan.own_grid
            if self.on_miss == ("full" if coarse else "plain"):
                raise PlanError(
                    f"plan {engine.plan} cannot serve a miss with on_miss={self.on_miss!r}: "
                    + (
                        "it walks its own few steps from the first call on; use 'plain', the same number of calls"
                        if coarse
                        else "where it does not leap there are the fine steps; use 'full'"
                    )
                    + ", or 'nearest' or 'error'"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> Server:
        memo[id(self)] = mine = copy.copy(self)
        for name, value in vars(self).items():
            setattr(mine, name, copy.deepcopy(value, memo))
        mine.parts = None  # a copy has networks of its own
        return mine

    def call(self, pipe: Any, proceed: Callable[..., Any], arguments: dict[str, Any], given: frozenset[str]) -> Any:
        """Look at the call's settings, choose the plan, let the pipeline run, and write the report."""
        if self.run is not None:
            raise InvalidInputError(
                "this pipeline is in the middle of a call already (another thread's, or the one whose callback this "
                "is), and a pipeline walks one schedule at a time; give each thread a copy.deepcopy of the pipeline"
            )
        self.last = None
        self.unchanged(pipe)
        decision = decide(self.engines, pipe, arguments, given, self.on_mismatch)
        told, engine = dict(decision.arguments), decision.engine
        if engine is not None:
            _ = engine.table  # derived before the clock starts, once
        self.run = run = self.begin(pipe, engine, told)
        run.notes += decision.notes
        start = time.perf_counter()
        try:
            with heard(pipe, self) if isinstance(run, CoarseRun) and run.halving else nullcontext():
                out = proceed(**told)
            run.watch.seconds["total"] = time.perf_counter() - start
            self.last = run.report()
            return out
        finally:
            self.run = None
            if isinstance(run, JumpRun) and isinstance(run.scheduler.timesteps, Tensor):  # they know their run
                run.scheduler.timesteps = run.scheduler.timesteps.as_subclass(Tensor)

    def unchanged(self, pipe: Any) -> None:
        """Refuse a pipeline some part of which was put in another's place since redi was enabled.

        Raises:
            InvalidInputError: names it.
        """
        if all(pipe.scheduler is not known for known in (*self.schedulers, self.own)):
            raise InvalidInputError(
                f"the pipeline's scheduler became {type(pipe.scheduler).__name__} while redi serves it with a "
                f"{type(self.schedulers[0]).__name__} of its own; call redi.disable(pipe) first, then set the scheduler"
            )
        now = parts_of(pipe)
        before, self.parts = self.parts or now, self.parts or now
        if other := [name for name, part in now.items() if before.get(name) != part]:
            raise InvalidInputError(
                f"the pipeline's {', '.join(other)} became another while redi is active, or learnt new tokens; call "
                "redi.disable(pipe), and redi.enable it again with a knowledge base of what it is now"
            )

    def begin(self, pipe: Any, engine: ReDiEngine | None, arguments: dict[str, Any]) -> Run:
        """The run of a call."""
        serving = {id(e): scheduler for e, scheduler in zip(self.engines, self.schedulers, strict=True)}
        scheduler = serving.get(id(engine), self.own)
        if pipe.scheduler is not scheduler:  # a pipeline writes down in its config what it is given
            pipe.scheduler = scheduler
        if engine is None:
            return PlainRun(pipe, scheduler, arguments)
        if engine.plan.own_grid:
            notes = [f"whole calls: {why}" for why in (unhalved(pipe, arguments, engine) if engine.plan.halved else [])]
            halving, on_miss = engine.plan.halved and not notes, self.on_miss or "plain"
            return CoarseRun(pipe, scheduler, arguments, notes, engine=engine, on_miss=on_miss, halving=halving)
        on_miss = self.on_miss or "full"
        return JumpRun(pipe, scheduler, arguments, engine=engine, on_miss=on_miss, loop_code=self.loop_code)

    def noise(self, drawn: Tensor, start: Start) -> Tensor:
        """Replace drawn noise by the bank's; recognise noise that was passed."""
        return drawn if self.run is None else self.run.noise(drawn, start, self.seed)

    def embedded(self, embeddings: Tensor) -> None:
        """Keep the prompt's embedding, for `key="prompt"`."""
        if self.run is not None and not self.deaf:
            self.run.embedded(embeddings)

    def set_timesteps(self, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Install the run's schedule."""
        if self.run is None:
            proceed(*args, **kwargs)
        else:
            self.run.set_timesteps(proceed, args, kwargs)

    def get_timesteps(self, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The run's schedule, of which it walks all."""
        return proceed(*args, **kwargs) if self.run is None else self.run.get_timesteps(proceed, args, kwargs)

    def bar(self, bar: Any) -> None:
        """Keep the bar, which a leap shortens."""
        if self.run is not None:
            self.run.bar = bar

    def asked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What the run asks the network instead."""
        return None if self.run is None else self.run.asked(args, kwargs)

    def answered(self, output: Any) -> Any:
        """What the run makes of its answer."""
        return output if self.run is None else self.run.answered(output)

    def step(
        self, proceed: Callable[..., Any], model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any
    ) -> Any:
        """The scheduler's step, and after it what the neighbours teach."""
        if self.run is None:
            return proceed(model_output, timestep, sample, **kwargs)
        return self.run.step(proceed, model_output, timestep, sample, **kwargs)


def unhalved(pipe: Any, arguments: Mapping[str, Any], engine: ReDiEngine) -> list[str]:
    """Why a call's unconditional halves may not be those that the rows foretell."""
    own = beside_the_prompt(arguments)
    unknown = unverified(pipe, arguments, engine.knowledge_base.fingerprint.negative_prompt)
    closed = unheard(pipe)
    return [
        *([f"{', '.join(own)} may change their unconditional half"] if own else []),
        *([f"there is no encoder to tell whether {', '.join(unknown)} are those of the rows"] if unknown else []),
        *([closed] if closed else []),
    ]


def in_context(report: LeapReport, pipe: Any, kb: KnowledgeBase) -> LeapReport:
    """A report that says, too, in which pipeline and with which versions."""
    now = changeable(pipe)
    beside = f" with {', '.join(now['adapters'])}" if now["adapters"] else ""
    here = {
        "redi": _versions(),
        "pipeline": f"{type(pipe).__name__} on {pipe.device} in {now['dtype']}{beside}",
    }
    return replace(report, context={**here, **(report.context or origin(kb))})


@cache
def _versions() -> str:
    ours, *others = ((name, version) for name, version in sorted(versions().items(), key=lambda v: v[0] != "redi"))
    return f"{ours[1]} ({', '.join(' '.join(other) for other in others)}, {platform.system()})"
