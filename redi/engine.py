"""The whole algorithm on one screen: sample, recall after the first call or few, leap by what the neighbours teach."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from redi.backends import Exact, Retriever
from redi.combiners import Affine, Combiner, combine
from redi.errors import InvalidInputError
from redi.gate import Gate
from redi.knowledge_base import KnowledgeBase
from redi.plan import Plan, Route, Segment
from redi.solvers import SolverAdapter, SolverState
from redi.table import Key, Table
from redi.transports import Defect, Transport, check
from redi.types import LeapReport

Denoise = Callable[..., Tensor]
"""`denoise(x, t)` or `denoise(x, t, condition)`: the model's output for scaled samples x at timestep t."""


@final
@dataclass(frozen=True)
class Recall:
    """What was remembered for a batch: neighbours, their weights, and which samples may leap."""

    ids: Int64[Tensor, "b k"]
    weights: Float32[Tensor, "b k"]
    distances: Float32[Tensor, "b k"]
    hit: Bool[Tensor, " b"]

    def __getitem__(self, rows: Tensor) -> Recall:
        return Recall(self.ids[rows], self.weights[rows], self.distances[rows], self.hit[rows])


@final
@dataclass
class Stopwatch:
    """Wall seconds by stage of one generation."""

    seconds: dict[str, float] = field(default_factory=dict[str, float])

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@final
@dataclass(frozen=True)
class ReDiEngine:
    """A knowledge base served through one plan.

    Args:
        knowledge_base: stored trajectories of the fine run.
        solver: the solver whose steps are taken.
        plan: where the model is called and where to leap.
        transport: the coarse propagator of a leap.
        combiner: how neighbours are weighed; None is `Affine()`.
        retriever: how they are found.
        key: what they are found by; None is the denoised prediction where a leap calls the model, else the sample.
        neighbors: H, how many.
        gate: when they are near enough.
        retrieve_at: leaps at which neighbours are looked up; in between the last ones serve.
        history: after a jump, combine the neighbours' solver history (`carry`) or begin anew (`fresh`).
    """

    knowledge_base: KnowledgeBase
    solver: SolverAdapter
    plan: Plan
    transport: Transport = field(default_factory=Defect)
    combiner: Combiner = field(default_factory=Affine)
    retriever: Retriever = field(default_factory=Exact)
    key: Key | None = None
    neighbors: int = 16
    gate: Gate = field(default_factory=Gate)
    retrieve_at: Sequence[int] = (0,)
    history: Literal["carry", "fresh"] = "carry"

    def __post_init__(self) -> None:
        if self.neighbors < 1:
            raise InvalidInputError(f"neighbors must be at least 1, given {self.neighbors}")
        if 0 not in self.retrieve_at:
            raise InvalidInputError(f"retrieve_at must contain 0, the first leap, given {list(self.retrieve_at)}")
        _ = self.route

    @cached_property
    def route(self) -> Route:
        """The plan on this solver's schedule."""
        plan = check(self.plan, self.transport, self.solver)
        return Route.lay(plan, self.solver.schedule(plan.fine))

    @property
    def served_key(self) -> Key:
        """The key in use."""
        return self.key or ("denoised" if self.transport.calls else "sample")

    @cached_property
    def table(self) -> Table:
        """Keys, brackets and history derived from the knowledge base; computed once, then kept on disk."""
        return Table.build(
            self.knowledge_base,
            self.route,
            self.transport,
            self.solver,
            key=self.served_key,
            retrieve_at=self.retrieve_at,
            retriever=self.retriever,
        )

    def recall(
        self, query: Float[Tensor, "b *s"], noise_ids: Int64[Tensor, " b"], leap: int, watch: Stopwatch | None = None
    ) -> Recall:
        """Find and weigh the neighbours of each sample's key among the rows of its own noise.

        Args:
            query: what `served_key` names, unflattened.
            noise_ids: bank noise of each sample, −1 for noise that is not from the bank.
            leap: index of the leap.
            watch: where to count the seconds.
        """
        watch = watch or Stopwatch()
        flat = query.detach().flatten(1).float().cpu()
        with watch("retrieval"):
            ids, distances = self.table.search(flat, noise_ids.cpu(), leap, self.neighbors)
        weights = torch.zeros(ids.shape)
        known = ids[:, 0] >= 0
        hit = known & torch.isfinite(flat).all(1)
        hit[known] &= self.gate.opens(distances[known])
        # samples whose noise has fewer than H rows are weighed on the rows there are
        for width in (ids >= 0).sum(1)[hit].unique().tolist():
            mine = hit & ((ids >= 0).sum(1) == width)
            with watch("gather"):
                keys = self.table.keys(ids[mine, :width], leap)
            with watch("combine"):
                weights[mine, :width] = self.combiner.weights(keys, flat[mine]).float()
        return Recall(ids, weights, distances, hit)

    def leap(
        self, propagated: Float[Tensor, "b *s"], recall: Recall, leap: int, watch: Stopwatch | None = None
    ) -> Float[Tensor, "b *s"]:
        """x̂[b] = C(x[a]) + Σ w_i·(x^i[b] − C(x^i[a])): the only place where retrieved rows touch the sample.

        A sample that did not hit is handed back as it came.
        """
        watch = watch or Stopwatch()
        if not recall.hit.any():
            return propagated
        ids = recall.ids[recall.hit].clamp(min=0)  # a missing neighbour has weight 0
        with watch("gather"):
            rows = self.table.bracket(ids, leap)
        with watch("combine"):
            correction = combine(recall.weights[recall.hit], rows).to(propagated.device)
            leapt = propagated.clone()
            hit = recall.hit.to(propagated.device)
            leapt[hit] = (propagated[hit].float() + correction).to(propagated.dtype)
        return leapt

    def arrive(self, recall: Recall, leap: int, device: torch.device, watch: Stopwatch | None = None) -> SolverState:
        """The solver's state at the end of a jump's leap, for a batch in which every sample hit."""
        stop = self.route.leaps[leap].stop
        grid = self.route.grid
        if self.history == "fresh" or stop == grid.fine:
            return self.solver.restart(replace(self.solver.init(grid), position=stop))
        watch = watch or Stopwatch()
        with watch("gather"):
            leaves = self.table.history(recall.ids.clamp(min=0), leap)
        with watch("combine"):
            combined = {name: combine(recall.weights, leaf).to(device) for name, leaf in leaves.items()}
        return self.solver.at(grid, stop, combined)

    @torch.no_grad()
    def sample(
        self,
        denoise: Denoise,
        noise: Float[Tensor, "b *s"],
        *,
        condition: Any = None,
        noise_ids: Int64[Tensor, " b"] | None = None,
        embeddings: Float[Tensor, "b e"] | None = None,
    ) -> tuple[Float[Tensor, "b *s"], LeapReport]:
        """Algorithm 2 of the paper with the plan's leaps: from unit noise to x[N].

        Args:
            denoise: the model: `denoise(x, t)`, or `denoise(x, t, condition)` where `condition` is given; x is scaled
                for the model, the output is what the solver's prediction type says.
            noise: unit-variance starting noise.
            condition: a tensor, or a tuple of tensors, with first dimension b; handed to `denoise` for the samples
                it is called with (where some samples of a batch leap and others do not, they are called apart).
            noise_ids: which bank noise each sample starts from; None matches `noise` against the bank.
            embeddings: prompt embeddings, for `key="prompt"`.

        Returns:
            x[N], and what was saved.
        """
        watch = Stopwatch()
        ids = self.knowledge_base.bank.match(noise) if noise_ids is None else noise_ids
        walk = _Walk(self, denoise, watch, len(noise))
        state = self.solver.init(self.route.grid)
        everyone = torch.arange(len(noise))
        start = time.perf_counter()
        x = walk.run(noise * self.route.grid.initial_scale, state, self.route.segments, everyone, ids, condition, embeddings)
        watch.seconds["total"] = time.perf_counter() - start
        return x, walk.report(ids)


@final
class _Walk:
    """One generation under way: runs segments, and splits the batch where only some of it may jump."""

    def __init__(self, engine: ReDiEngine, denoise: Denoise, watch: Stopwatch, batch: int) -> None:
        self.engine, self.denoise, self.watch = engine, denoise, watch
        self.calls = torch.zeros(batch, dtype=torch.int64)
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
                    state = engine.arrive(recall, leap, x.device, self.watch)
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
                state_ = engine.arrive(recall[rows], leap, x.device, self.watch)
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
        grid, at = state.grid, state.position
        with self.watch("model"):
            shown = grid.scale_input(x, at)
            t = grid.timesteps[at].to(x.device)
            out = self.denoise(shown, t) if condition is None else self.denoise(shown, t, condition)
        if not isinstance(out, Tensor) or out.shape != x.shape:  # pyright: ignore[reportUnnecessaryIsInstance]
            given = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__  # pyright: ignore
            raise InvalidInputError(f"denoise must return a tensor of shape {tuple(x.shape)}, given {given}")
        self.calls[who] += 1
        return out

    def key(self, x: Tensor, m: Tensor | None, state: SolverState, embeddings: Tensor | None) -> Tensor:
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
        batch = len(self.calls)
        first: dict[int, tuple[bool, tuple[int, ...], tuple[float, ...]]] = {}
        for who, recall in self.recalls:
            for row, picture in enumerate(who.tolist()):
                first.setdefault(picture, describe(recall, row))
        route = self.engine.route
        return LeapReport(
            plan=str(self.engine.plan),
            nfe=max(self.calls.tolist(), default=0),
            nfe_full=route.nfe_full,
            leapt=tuple(first[i][0] for i in range(batch)),
            noise_ids=tuple(noise_ids.tolist()),
            neighbors=tuple(first[i][1] for i in range(batch)),
            distances=tuple(first[i][2] for i in range(batch)),
            seconds=dict(self.watch.seconds),
        )


def describe(recall: Recall, row: int) -> tuple[bool, tuple[int, ...], tuple[float, ...]]:
    """Whether one sample of a recall leapt, and from which rows at which distances."""
    if not recall.hit[row]:
        return False, (), ()
    used = recall.ids[row] >= 0
    return True, tuple(recall.ids[row][used].tolist()), tuple(recall.distances[row][used].tolist())


def _given(model_output: Tensor | None) -> Tensor:
    assert model_output is not None
    return model_output


def _take(state: SolverState, rows: Tensor) -> SolverState:
    return state.with_leaves({name: leaf[rows] for name, leaf in state.leaves().items()})


def _rows(condition: Any, rows: Tensor) -> Any:
    if condition is None:
        return None
    if isinstance(condition, Tensor):
        return condition[rows]
    return tuple(c[rows] for c in condition)
