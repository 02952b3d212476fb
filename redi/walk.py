"""Our own sampling loop over an engine's route; a batch of which only some may jump is split, never averaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from redi.engine import ReDiEngine
from redi.errors import InvalidInputError
from redi.guidance import guided
from redi.plan import Segment, calls_of
from redi.recall import Recall, Stopwatch, describe
from redi.solvers import SolverState
from redi.types import LeapReport

Denoise = Callable[..., Tensor]
"""`denoise(x, t)` or `denoise(x, t, condition)`: the model's output for scaled samples x at timestep t."""


@final
class Walk:
    """One generation under way: runs segments, and splits the batch where only some of it may jump."""

    def __init__(
        self, engine: ReDiEngine, denoise: Denoise, conditional: Denoise | None, watch: Stopwatch, batch: int
    ) -> None:
        self.engine, self.denoise, self.conditional, self.watch = engine, denoise, conditional, watch
        self.halves = torch.zeros(batch, dtype=torch.int64)  # half model calls of each picture
        self.recalls: list[tuple[Tensor, Recall]] = []

    def run(
        self,
        x: Tensor,
        state: SolverState,
        segments: Sequence[Segment],
        who: Tensor,
        noise_ids: Tensor,
        condition: Any,
        embeddings: Tensor | None,
        recall: Recall | None = None,
    ) -> Tensor:
        """Walk `segments` with the samples `who`; state and x are theirs."""
        engine, solver, route = self.engine, self.engine.solver, self.engine.route
        for i, segment in enumerate(segments):
            if segment.halved:
                m = self.half(x, state, who, condition, noise_ids, recall)
            else:
                m = self.call(x, state, who, condition) if segment.called else None
            if segment not in route.leaps:
                with self.watch("solver"):
                    x, state = solver.step(_given(m), x, state)
                continue
            leap = route.leaps.index(segment)
            if leap in engine.retrieve_at:
                recall = engine.recall(self.key(x, m, state, embeddings), noise_ids, leap, self.watch)
                self.recalls.append((who, recall))
            assert recall is not None  # the first leap always looks neighbours up
            if route.plan.own_grid or recall.hit.all():
                with self.watch("solver"):
                    propagated, state = engine.transport.propagate(x, m, state, segment, solver)
                x = engine.leap(propagated, recall, leap, self.watch)
                if not route.plan.own_grid:
                    state = engine.arrive(recall, leap, x, self.watch)
                continue
            return self.split(x, m, state, segments[i:], who, noise_ids, condition, embeddings, recall)
        return x

    def split(
        self,
        x: Tensor,
        m: Tensor | None,
        state: SolverState,
        segments: Sequence[Segment],
        who: Tensor,
        noise_ids: Tensor,
        condition: Any,
        embeddings: Tensor | None,
        recall: Recall,
    ) -> Tensor:
        """Those that hit leap `segments[0]`; the others take every fine step of it instead."""
        engine, leap = self.engine, self.engine.route.leaps.index(segments[0])
        out = torch.empty_like(x)
        for rows, hit in ((recall.hit.nonzero().flatten(), True), ((~recall.hit).nonzero().flatten(), False)):
            if len(rows) == 0:
                continue
            x_, state_ = x[rows], _take(state, rows)
            m_ = None if m is None else m[rows]
            rest = list(segments[1:])
            if hit:
                propagated, state_ = engine.transport.propagate(x_, m_, state_, segments[0], engine.solver)
                x_ = engine.leap(propagated, recall[rows], leap, self.watch)
                state_ = engine.arrive(recall[rows], leap, x_, self.watch)
            else:
                start = segments[0].start
                if m_ is not None:  # the call at the start is made already
                    x_, state_ = engine.solver.step(m_, x_, state_)
                    start += 1
                rest = [Segment(e, e + 1) for e in range(start, segments[0].stop)] + rest
            more = None if embeddings is None else embeddings[rows]
            out[rows] = self.run(
                x_, state_, rest, who[rows], noise_ids[rows], _rows(condition, rows), more, recall[rows]
            )
        return out

    def call(self, x: Tensor, state: SolverState, who: Tensor, condition: Any) -> Tensor:
        """The model's output at the state's position, counted for the samples `who`."""
        self.halves[who] += 2
        return self.asked("denoise", self.denoise, x, state, condition)

    def half(
        self, x: Tensor, state: SolverState, who: Tensor, condition: Any, noise_ids: Tensor, recall: Recall | None
    ) -> Tensor:
        """The same with the unconditional half as rows foretell it; samples of which they do not are called whole."""
        assert self.conditional is not None  # `sample` saw to it
        u, known = self.engine.unconditional(state.position, noise_ids, recall, self.watch)
        out = torch.empty_like(x)
        if len(rows := known.nonzero().flatten()):
            self.halves[who[rows]] += 1
            c = self.asked("conditional", self.conditional, x[rows], _take(state, rows), _rows(condition, rows))
            out[rows] = guided(u[rows].to(c), c, self.engine.knowledge_base.fingerprint.guidance)
        if len(rows := (~known).nonzero().flatten()):
            out[rows] = self.call(x[rows], _take(state, rows), who[rows], _rows(condition, rows))
        return out

    def asked(self, name: str, model: Denoise, x: Tensor, state: SolverState, condition: Any) -> Tensor:
        """What a model says of samples at the state's position.

        Raises:
            InvalidInputError: something of another shape.
        """
        grid, at = state.grid, state.position
        with self.watch("model"):
            shown = grid.scale_input(x, at)
            t = grid.timesteps[at].to(x.device)
            out = model(shown, t) if condition is None else model(shown, t, condition)
        if not isinstance(out, Tensor) or out.shape != x.shape:  # pyright: ignore[reportUnnecessaryIsInstance]
            given = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__  # pyright: ignore
            raise InvalidInputError(f"{name} must return a tensor of shape {tuple(x.shape)}, given {given}")
        return out

    def key(self, x: Tensor, m: Tensor | None, state: SolverState, embeddings: Tensor | None) -> Tensor:
        """What the engine's key names."""
        match self.engine.served_key:
            case "denoised":
                return state.grid.denoised(_given(m), x, state.position)
            case "sample":
                return x
            case "prompt":
                if embeddings is None:
                    raise InvalidInputError("key='prompt' needs `embeddings`, the mean over tokens of each prompt's")
                return embeddings

    def report(self, noise_ids: Tensor) -> LeapReport:
        """What was done, picture by picture."""
        first: dict[int, tuple[bool, tuple[tuple[int, ...], tuple[float, ...]]]] = {}
        for who, recall in self.recalls:
            for row, picture in enumerate(who.tolist()):
                first.setdefault(picture, (bool(recall.hit[row]), describe(recall, row)))
        every = [first[i] for i in range(len(self.halves))]
        return self.engine.report(
            nfe=calls_of(max(self.halves.tolist(), default=0)),
            noise_ids=noise_ids,
            leapt=[hit for hit, _ in every],
            found=[found for _, found in every],
            seconds=self.watch.seconds,
        )


def _given(model_output: Tensor | None) -> Tensor:
    assert model_output is not None
    return model_output


def _take(state: SolverState, rows: Tensor) -> SolverState:
    return state.with_leaves({name: leaf[rows] for name, leaf in state.leaves().items()})


def _rows(condition: Any, rows: Tensor) -> Any:
    match condition:
        case Mapping():
            return {name: _rows(c, rows) for name, c in condition.items()}  # pyright: ignore
        case list():
            return [_rows(c, rows) for c in condition]  # pyright: ignore
        case tuple():
            return tuple(_rows(c, rows) for c in condition)  # pyright: ignore
        case _:
            return None if condition is None else condition[rows]
