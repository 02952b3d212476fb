"""One call of an enabled pipeline under way: which schedule it walks, and what becomes of each step.

Everything of redi that changes while a pipeline runs lives in a run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from torch import Tensor

from redi.engine import ReDiEngine
from redi.errors import FingerprintMismatchError, InvalidInputError, MissError
from redi.guidance import rejoined, without
from redi.interception import Start
from redi.look import told
from redi.plan import calls_of
from redi.recall import Recall, Stopwatch, describe
from redi.solvers import install, stepping
from redi.starts import prompts_of, start_from
from redi.types import LeapReport

OnMiss = Literal["plain", "full", "nearest", "error"]
"""What a sample gets whose nearest row is too far: the plain solver at the same cost, the fine run, the nearest row
all the same, or an error."""

Proceed = Callable[..., Any]


@dataclass
class Run(ABC):
    """A call under way.

    Args:
        pipe: the pipeline.
        scheduler: the one that it runs with.
        arguments: of the call.
        notes: what the report will say.
    """

    pipe: Any
    scheduler: Any
    arguments: dict[str, Any]
    notes: list[str] = field(default_factory=list[str])
    watch: Stopwatch = field(default_factory=Stopwatch)
    halves: int = 0  # half model calls
    switching: bool = False  # whether the step under way is the one after which `switch_prompt` may switch
    bar: Any = None

    @abstractmethod
    def step(self, proceed: Proceed, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        """The scheduler's step, and what the neighbours teach of it."""

    def report(self) -> LeapReport:
        """What was done: calls and notes, where no neighbour taught anything."""
        calls = self.halves // 2  # whole ones all
        return LeapReport("plain", calls, calls, seconds=dict(self.watch.seconds), notes=tuple(self.notes))

    def noise(self, drawn: Tensor, start: Start, seed: int) -> Tensor:
        """The noise to start from."""
        return drawn

    def embedded(self, embeddings: Tensor) -> None:
        """The prompts' embeddings."""
        return None

    def set_timesteps(self, proceed: Proceed, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Install the schedule to walk."""
        proceed(*args, **kwargs)

    def get_timesteps(self, proceed: Proceed, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The part of it that a pipeline walks which starts from a picture."""
        return proceed(*args, **kwargs)

    def asked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The network's arguments, where it is called with others than the pipeline's."""
        return None

    def answered(self, output: Any) -> Any:
        """What the pipeline gets for its answer."""
        return output


@final
@dataclass
class PlainRun(Run):
    """No engine serves: the pipeline runs as it does without redi."""

    def step(self, proceed: Proceed, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        """The scheduler's step alone."""
        self.halves += 2
        self.switching = self.halves == 2
        return proceed(model_output, timestep, sample, **kwargs)


@dataclass
class LeapingRun(Run):
    """An engine serves.

    Args:
        engine: of the plan.
        on_miss: what a sample gets whose nearest row is too far.
    """

    engine: ReDiEngine = field(kw_only=True)
    on_miss: OnMiss = field(kw_only=True)
    noise_ids: Tensor | None = None
    embeddings: Tensor | None = None
    recall: Recall | None = None
    first: Recall | None = None
    position: int = 0

    @property
    @abstractmethod
    def leapt(self) -> Tensor:
        """Which samples took the first leap."""

    def noise(self, drawn: Tensor, start: Start, seed: int) -> Tensor:
        """The bank's noise in place of what was drawn; noise that was passed is recognised."""
        names = prompts_of(self.arguments, len(drawn))
        self.noise_ids, used = start_from(self.engine.knowledge_base.bank, drawn, start, names, seed)
        if strangers := int((self.noise_ids < 0).sum()):
            self.notes.append(f"{strangers} of {len(drawn)} latents passed are not from the noise bank: no leap")
        return used

    def embedded(self, embeddings: Tensor) -> None:
        """Keep them for `key="prompt"`: their mean over tokens, of what is encoded first."""
        if self.embeddings is None:
            self.embeddings = embeddings.detach().float().mean(1).cpu()

    def set_timesteps(self, proceed: Proceed, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Install the route's grid.

        Raises:
            FingerprintMismatchError: the pipeline shifts the schedule otherwise than where the rows were solved.
        """
        grid, (_, given) = self.engine.route.grid, told(proceed, args, kwargs)
        if grid.timetable.mu != given.mu:
            raise FingerprintMismatchError(
                {"mu": (grid.timetable.mu, given.mu)}, "ask for pictures of the knowledge base's size"
            )
        install(self.scheduler, grid, args[1] if len(args) > 1 else kwargs.get("device"))

    def get_timesteps(self, proceed: Proceed, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The route's grid, which begins where the rows begin."""
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        return self.scheduler.timesteps, len(self.scheduler.timesteps)

    def advance(self, proceed: Proceed, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        """The scheduler's own step at the position of the grid."""
        with self.watch("solver"), stepping(self.scheduler, self.engine.route.grid, self.position) as options:
            out = proceed(model_output, timestep, sample, **kwargs, **options)
        self.position += 1
        return out

    def look_up(self, leap: int, model_output: Tensor | None, sample: Tensor) -> Recall:
        """Neighbours for a leap, or the last ones where they are not looked up again.

        Raises:
            MissError: a sample has none near enough, and that is to be an error.
        """
        engine = self.engine
        if leap in engine.retrieve_at:
            strangers = torch.full((len(sample),), -1, dtype=torch.int64)
            ids = strangers if self.noise_ids is None else self.noise_ids
            recall = engine.recall(self.query(model_output, sample), ids, leap, self.watch)
            if self.on_miss == "nearest":
                recall = recall.nearest()
            if self.on_miss == "error" and not recall.hit.all():
                missed = (~recall.hit).nonzero().flatten().tolist()
                raise MissError({i: float(recall.distances[i, 0]) for i in missed}, engine.gate.reach)
            self.recall = recall
            if self.first is None:
                self.first, self.switching = recall, True
        assert self.recall is not None  # the first leap always looks neighbours up
        return self.recall

    def query(self, model_output: Tensor | None, sample: Tensor) -> Tensor:
        """What the engine's key names, at the position of the grid."""
        if self.engine.served_key == "prompt":
            if self.embeddings is None or len(self.embeddings) != len(sample):
                raise InvalidInputError(
                    "key='prompt' needs a pipeline that encodes prompts; pass prompts, not embeddings"
                )
            return self.embeddings
        if self.engine.served_key == "sample" or model_output is None:
            return sample
        return self.engine.route.grid.denoised(model_output, sample, self.position)

    def report(self) -> LeapReport:
        """Calls, neighbours, gate decisions, and the time all that took."""
        recall = self.first
        if recall is None:  # interrupted before the first leap
            return super().report()
        leapt: list[bool] = self.leapt.tolist()
        return self.engine.report(
            nfe=calls_of(self.halves),
            noise_ids=recall.ids[:0, 0] if self.noise_ids is None else self.noise_ids,
            leapt=leapt,
            found=[describe(recall, i) if did else ((), ()) for i, did in enumerate(leapt)],
            seconds=self.watch.seconds,
            notes=self.notes,
        )


@final
@dataclass
class CoarseRun(LeapingRun):
    """A coarse plan: C of every leap is the scheduler's own step. A sample that missed is the plain solver's.

    Args:
        halving: whether half calls are made, where the plan has them.
    """

    halving: bool = False
    foretold: Tensor | None = None  # unconditional outputs, while the network is asked without
    unasked: Tensor | None = None  # and of which pictures

    @property
    def leapt(self) -> Tensor:
        """Those that hit."""
        assert self.first is not None
        return self.first.hit

    def step(self, proceed: Proceed, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        """One segment of the plan."""
        leap = self.position
        self.halves += 1 if self.unasked is not None and len(self.unasked) == len(sample) else 2
        self.unasked = None
        recall = self.look_up(leap, model_output, sample)
        out = self.advance(proceed, model_output, timestep, sample, **kwargs)
        return with_sample(out, self.engine.leap(out[0], recall, leap, self.watch))

    def asked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Without the unconditional half of those pictures of which rows foretell it, where the plan says so."""
        leap, ids, segments = self.position, self.noise_ids, self.engine.route.segments
        if not self.halving or ids is None or self.unasked is not None or not segments[leap].halved:
            return None
        outputs, known = self.engine.unconditional(leap, ids, self.recall, self.watch)
        unasked = known.nonzero().flatten()
        if not len(unasked) or (found := without(args, kwargs, unasked, len(ids))) is None:
            return None
        self.foretold, self.unasked = outputs, unasked
        return found

    def answered(self, output: Any) -> Any:
        """Both halves, as the pipeline expects them."""
        foretold, self.foretold = self.foretold, None
        if foretold is None or self.unasked is None:
            return output
        return rejoined(output, foretold, self.unasked)


def with_sample(out: Any, sample: Tensor) -> Any:
    """The scheduler's output with another sample in it."""
    if isinstance(out, tuple):
        return (sample, *out[1:])
    out.prev_sample = sample
    return out
