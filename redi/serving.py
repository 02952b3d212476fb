"""One enabled pipeline being served: everything of redi that changes while a pipeline runs lives here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from torch import Tensor

from redi.engine import ReDiEngine
from redi.errors import InvalidInputError
from redi.interception import Listener, SteeredTimesteps
from redi.pipelines import changeable
from redi.plan import Segment
from redi.recall import Recall, Stopwatch, describe
from redi.settings import decide
from redi.solvers import install, restore, snapshot, stepping
from redi.types import LeapReport


@final
@dataclass
class Run:
    """One call under way. `engine` is None while the plain solver serves."""

    engine: ReDiEngine | None
    watch: Stopwatch = field(default_factory=Stopwatch)
    noise_ids: Tensor | None = None
    embeddings: Tensor | None = None
    recall: Recall | None = None
    first: Recall | None = None
    position: int = 0
    next_entry: int = 0
    calls: int = 0
    switching: bool = False  # whether the step under way is the one after which `switch_prompt` may switch
    prompts: tuple[Any, ...] = ()
    per_prompt: int = 1
    notes: list[str] = field(default_factory=list[str])


@final
@dataclass
class Server(Listener):
    """Listens to an enabled pipeline and leaps: everything of `enable` that changes lives here."""

    engines: Sequence[ReDiEngine]
    scheduler: Any
    loop_code: Any
    on_mismatch: Literal["error", "plain"]
    seed: int
    run: Run | None = None
    last: LeapReport | None = None
    deaf: bool = False

    def call(self, pipe: Any, proceed: Callable[..., Any], arguments: dict[str, Any], given: frozenset[str]) -> Any:
        """Look at the call's settings, choose the plan, let the pipeline run, and write the report."""
        self.last = None
        if pipe.scheduler is not self.scheduler:
            raise InvalidInputError(
                f"the pipeline's scheduler became {type(pipe.scheduler).__name__} while redi serves it with a "
                f"{type(self.scheduler).__name__} of its own; call redi.disable(pipe) first, then set the scheduler"
            )
        decision = decide(self.engines, arguments, given, changeable(pipe), self.on_mismatch)
        if decision.engine is not None:
            _ = decision.engine.table  # derived before the clock starts, once
        prompt = arguments.get("prompt")
        prompts = tuple(prompt) if isinstance(prompt, list) else ()
        each = int(arguments.get("num_images_per_prompt") or 1)
        self.run = run = Run(decision.engine, notes=list(decision.notes), prompts=prompts, per_prompt=each)
        start = time.perf_counter()
        try:
            out = proceed(**decision.arguments)
            run.watch.seconds["total"] = time.perf_counter() - start
            self.last = self.describe(run)
            return out
        finally:
            self.run = None

    def noise(self, drawn: Tensor, passed: bool, before: list[bytes] | None) -> Tensor:
        """Replace drawn noise by the bank's; recognise noise that was passed."""
        run = self.run
        if run is None or run.engine is None:
            return drawn
        engine = run.engine
        bank = engine.knowledge_base.bank
        scale = engine.route.fine.initial_scale
        if tuple(drawn.shape[1:]) != tuple(bank.shape):
            raise InvalidInputError(
                f"the knowledge base's samples have shape {tuple(bank.shape)}, this call's {tuple(drawn.shape[1:])}"
            )
        if passed:
            run.noise_ids = bank.match(drawn.float().cpu() / scale)
            strangers = int((run.noise_ids < 0).sum())
            if strangers:
                run.notes.append(
                    f"{strangers} of {len(drawn)} latents passed are not from the noise bank: plain solver"
                )
            return drawn
        keys = [f"redi:{self.seed}".encode()] if before is None else before
        keys = keys * len(drawn) if len(keys) == 1 else keys
        # only pictures of one prompt must differ; so a prompt's noise does not depend on what it is batched with
        prompts: dict[Any, list[int]] = {}
        for i in range(len(drawn)):
            at = i // run.per_prompt
            prompts.setdefault(run.prompts[at] if run.prompts else at, []).append(i)
        ids, noise = torch.empty(len(drawn), dtype=torch.int64), torch.empty(drawn.shape)
        for pictures in prompts.values():
            ids[pictures], noise[pictures] = bank.draw([keys[i] for i in pictures])
        run.noise_ids = ids
        return (noise * scale).to(drawn.device, drawn.dtype)

    def embedded(self, embeddings: Tensor) -> None:
        """Keep the prompt's embedding, for `key="prompt"`."""
        if self.run is not None and not self.deaf:
            self.run.embeddings = embeddings.detach().float().mean(1).cpu()

    def set_timesteps(self, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Install the route's grid; for a jump, timesteps that only the pipeline's own loop is steered through."""
        run = self.run
        if run is None or run.engine is None:
            proceed(*args, **kwargs)
            return
        route, scheduler = run.engine.route, self.scheduler
        install(scheduler, route.grid, args[1] if len(args) > 1 else kwargs.get("device"))
        if not route.plan.own_grid:
            scheduler.timesteps = SteeredTimesteps.of(scheduler.timesteps, self.loop_code, self.follow)

    def follow(self) -> Iterator[int]:
        """Entries of a jump's run, decided as it goes."""
        run = self.run
        assert run is not None
        assert run.engine is not None
        while (entry := run.next_entry) < run.engine.route.fine.fine:
            yield entry
            run.next_entry = max(run.next_entry, entry + 1)  # an interrupted pipeline goes on without stepping

    def step(
        self, proceed: Callable[..., Any], model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any
    ) -> Any:
        """The scheduler's step, and after it what the neighbours teach."""
        run = self.run
        if run is None:
            return proceed(model_output, timestep, sample, **kwargs)
        run.calls += 1
        if run.engine is None or run.noise_ids is None:
            run.switching = run.calls == 1
            return proceed(model_output, timestep, sample, **kwargs)
        if run.engine.route.plan.own_grid:
            return self.coarse_step(run, run.engine, proceed, model_output, timestep, sample, **kwargs)
        return self.jump_step(run, run.engine, proceed, model_output, timestep, sample, **kwargs)

    def coarse_step(
        self,
        run: Run,
        engine: ReDiEngine,
        proceed: Callable[..., Any],
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        **kwargs: Any,
    ) -> Any:
        """One segment of a coarse plan: C is the scheduler's own step."""
        leap = run.position
        if leap in engine.retrieve_at:
            query = self.query(run, engine, model_output, sample, leap)
            self.look_up(run, engine, query, leap)
        with run.watch("solver"), stepping(self.scheduler, engine.route.grid, leap) as options:
            out = proceed(model_output, timestep, sample, **kwargs, **options)
        run.position += 1
        assert run.recall is not None
        return _with_sample(out, engine.leap(out[0], run.recall, leap, run.watch))

    def jump_step(
        self,
        run: Run,
        engine: ReDiEngine,
        proceed: Callable[..., Any],
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        **kwargs: Any,
    ) -> Any:
        """One entry of a jump's run. The loop is shared, so the batch leaps only if every sample may."""
        entry, leaps = run.next_entry, engine.route.leaps
        called = next((i for i, s in enumerate(leaps) if s.called and s.start == entry), None)
        if called is not None:
            self.look_up(run, engine, self.query(run, engine, model_output, sample, entry), called)
            if self.may_leap(run):
                x = self.cross(run, engine, sample, model_output, leaps[called], called)
                return (x,) if kwargs.get("return_dict") is False else _with_sample(_shell(x), x)
        with run.watch("solver"), stepping(self.scheduler, engine.route.grid, entry) as options:
            out = proceed(model_output, timestep, sample, **kwargs, **options)
        run.next_entry = entry + 1
        free = next((i for i, s in enumerate(leaps) if not s.called and s.start == entry + 1), None)
        if free is not None:
            self.look_up(run, engine, self.query(run, engine, None, out[0], entry + 1), free)
            if self.may_leap(run):
                return _with_sample(out, self.cross(run, engine, out[0], None, leaps[free], free))
        return out

    def cross(
        self,
        run: Run,
        engine: ReDiEngine,
        sample: Tensor,
        model_output: Tensor | None,
        leap: Segment,
        index: int,
    ) -> Tensor:
        """Take a jump's leap: the sample, the scheduler's history and the loop go on at its end."""
        assert run.recall is not None
        state = snapshot(self.scheduler, engine.route.fine, leap.start)
        propagated, _ = engine.transport.propagate(sample, model_output, state, leap, engine.solver)
        x = engine.leap(propagated, run.recall, index, run.watch)
        restore(self.scheduler, engine.arrive(run.recall, index, sample, run.watch))
        run.next_entry = leap.stop
        return x

    def may_leap(self, run: Run) -> bool:
        """Whether every sample of the batch hit; says so where only some did."""
        assert run.recall is not None
        hit = run.recall.hit
        if not bool(hit.all()):
            run.notes.append(
                f"{int((~hit).sum())} of {len(hit)} samples found no row near enough: the batch ran in full"
            )
        return bool(hit.all())

    def query(self, run: Run, engine: ReDiEngine, model_output: Tensor | None, sample: Tensor, at: int) -> Tensor:
        """What the engine's key names, at grid position `at`."""
        if engine.served_key == "prompt":
            if run.embeddings is None:
                raise InvalidInputError(
                    "key='prompt' needs a pipeline that encodes prompts; pass prompts, not embeddings"
                )
            return run.embeddings
        if engine.served_key == "sample" or model_output is None:
            return sample
        return engine.route.grid.denoised(model_output, sample, at)

    def look_up(self, run: Run, engine: ReDiEngine, query: Tensor, leap: int) -> None:
        """Recall neighbours for a leap, or keep the last ones."""
        if leap in engine.retrieve_at:
            assert run.noise_ids is not None
            run.recall = engine.recall(query, run.noise_ids, leap, run.watch)
            if run.first is None:
                run.first, run.switching = run.recall, True

    def describe(self, run: Run) -> LeapReport:
        """The report of a finished call."""
        engine = run.engine
        recall = run.first
        if engine is None or recall is None:
            notes = tuple(run.notes)
            return LeapReport("plain", run.calls, run.calls, seconds=dict(run.watch.seconds), notes=notes)
        jumped = engine.route.plan.own_grid or bool(recall.hit.all())
        return engine.report(
            nfe=run.calls,
            noise_ids=recall.ids[:0, 0] if run.noise_ids is None else run.noise_ids,
            leapt=[hit and jumped for hit in recall.hit.tolist()],
            found=[describe(recall, i) if jumped else ((), ()) for i in range(len(recall.hit))],
            seconds=run.watch.seconds,
            notes=run.notes,
        )


def _with_sample(out: Any, sample: Tensor) -> Any:
    """The scheduler's output with another sample in it."""
    if isinstance(out, tuple):
        return (sample, *out[1:])
    out.prev_sample = sample
    return out


def _shell(sample: Tensor) -> Any:
    from diffusers.schedulers.scheduling_utils import SchedulerOutput

    return SchedulerOutput(prev_sample=sample)
