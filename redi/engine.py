"""The whole algorithm on one screen: sample, recall after the first call or few, leap by what the neighbours teach."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, Literal, final, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from redi.backends import Retriever
from redi.combiners import Combiner, Kriging, combine
from redi.cost import Cost
from redi.errors import InvalidInputError, PlanError
from redi.gate import Gate
from redi.knowledge_base import KnowledgeBase
from redi.plan import Plan, Route
from redi.recall import Recall, Stopwatch
from redi.solvers import DiffusersSolver, SolverAdapter, SolverState
from redi.table import Key, Table, require
from redi.transports import Defect, Transport, Value, check
from redi.tuned import Tunings
from redi.types import LeapReport

_HISTORY: Final = ("carry", "fresh")
_LEAST_WEIGHT: Final = 0.5  # in all, for neighbours to foretell what is no correction and may not be shrunk
_AT_ONCE: Final = 1 << 20  # numbers of neighbours' rows: one large gather is several times as fast as small ones


def origin(kb: KnowledgeBase) -> dict[str, str]:
    """Which rows a knowledge base holds, and of what, in words."""
    mark = kb.fingerprint
    beside = f" with {', '.join(mark.adapters)}" if mark.adapters else ""
    return {
        "rows": f"{len(kb):,} of {kb.path} (manifest {kb.manifest_hash[:12]})",
        "of model": f"{mark.model} (weights {mark.weights[:12]}, {mark.dtype}){beside}, {mark.steps} steps of "
        f"{mark.scheduler}, guidance {mark.guidance:g}",
    }


@final
@dataclass(frozen=True)
class ReDiEngine:
    """A knowledge base served through one plan.

    Args:
        knowledge_base: stored trajectories of the fine run.
        solver: the solver whose steps are taken.
        plan: where the model is called and where to leap.
        transport: the coarse propagator of a leap.
        combiner: how neighbours are weighed.
        retriever: how they are found; None is what suits the number of rows.
        key: what they are found by; None is the denoised prediction where a leap calls the model, else the sample.
        neighbors: H, how many.
        gate: when they are near enough, and how far to believe them.
        retrieve_at: leaps at which neighbours are looked up; in between the last ones serve.
        history: after a jump, combine the neighbours' solver history (`carry`) or begin anew (`fresh`).
        eight_bits: whether the defects of a coarse plan are kept in int8, half the bytes of float16: their error is
            small beside that of retrieval (`benchmarks/storage.py`), but a remembered row is met less exactly.
        notes: what every report shall say besides.
    """

    knowledge_base: KnowledgeBase
    solver: SolverAdapter
    plan: Plan
    transport: Transport = field(default_factory=Defect)
    combiner: Combiner = field(default_factory=Kriging)
    retriever: Retriever | None = None
    key: Key | None = None
    neighbors: int = 64
    gate: Gate = field(default_factory=Gate)
    retrieve_at: Sequence[int] = (0,)
    history: Literal["carry", "fresh"] = "carry"
    eight_bits: bool = False
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.neighbors < 1:
            raise InvalidInputError(f"neighbors must be at least 1, given {self.neighbors}")
        if self.eight_bits and self.knowledge_base.config.dtype.itemsize > 2:
            raise InvalidInputError(
                f"eight_bits=True would round defects of rows that were stored in {self.knowledge_base.config.storage} "
                "to be exact; leave it out, or build with storage float16"
            )
        if 0 not in self.retrieve_at:
            raise InvalidInputError(f"retrieve_at must contain 0, the first leap, given {list(self.retrieve_at)}")
        for name, value, valid in (("key", self.served_key, get_args(Key)), ("history", self.history, _HISTORY)):
            if value not in valid:
                raise InvalidInputError(f"{name} must be one of {', '.join(valid)}, given {value!r}")
        if self.plan.fine != (steps := self.knowledge_base.fingerprint.steps):
            raise PlanError(f"plan {self.plan} is for {self.plan.fine} fine steps; the rows were solved in {steps}")
        require(self.knowledge_base, self.route, self.solver, key=self.served_key, retrieve_at=self.retrieve_at)

    @classmethod
    def serving(
        cls, kb: KnowledgeBase, plan: Plan | str | None = None, *, max_error: float | None = None, **choices: Any
    ) -> list[ReDiEngine]:
        """An engine for each plan.

        What is not chosen is what `redi.tune` found for the plan, else an engine's own default.

        Args:
            kb: the knowledge base.
            plan: the one to serve; None is every plan the knowledge base was built for.
            max_error: error that may be expected of a sample that leaps, as a fraction of the plain solver's at the
                same number of calls; needs a tuned plan.
            choices: the other fields of an engine; None leaves one open. The solver is that of the rows, and for a
                coarse plan its `for_coarse_steps`. The transport of a plan that is not tuned is `Defect()`, or
                `Value()` for a solver that Defect does not suit.

        Raises:
            InvalidInputError: `max_error` for a plan that is not tuned, or that is served otherwise than it was tuned.
        """
        mark = kb.fingerprint
        solver = DiffusersSolver.from_config(mark.scheduler, mark.scheduler_config)
        given = {name: choice for name, choice in choices.items() if choice is not None}
        plans = [Plan.parse(p) if isinstance(p, str) else p for p in (kb.config.plans if plan is None else [plan])]
        tunings = Tunings.read(kb)
        if plan is None and max_error is not None:  # of jumps no error is foretold
            plans = [p for p in plans if str(p) in tunings.plans] or plans

        def engine(plan: Plan) -> ReDiEngine:
            usual: dict[str, Any] = {
                "solver": solver.for_coarse_steps(mark.steps, plan.steps, mark.guidance) if plan.own_grid else solver,
                "transport": Defect() if solver.suits_coarse else Value(),
            }
            served: SolverAdapter = given.get("solver", usual["solver"])
            return cls(kb, plan=plan, **(usual | tunings.fields(str(plan), given, max_error, served)))

        return [engine(p) for p in plans]

    def __deepcopy__(self, memo: dict[int, Any]) -> ReDiEngine:
        return self  # nothing in it evolves, and its rows stay on the disk: a copied pipeline shares it

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
            eight_bits=self.eight_bits,
        )

    @cached_property
    def context(self) -> dict[str, str]:
        """From which rows, and by which parts, samples are served, in words."""
        gate = "open" if self.gate == Gate() else f"within {self.gate.reach:.4g}"
        found_by = f"{self.served_key} keys" + (f" by {self.retriever}" if self.retriever else "")
        parts = (f"{self.transport}", f"{self.neighbors} neighbours of {found_by}", f"{self.combiner}", f"gate {gate}")
        again = f", looked up at leaps {list(self.retrieve_at)}" if list(self.retrieve_at) != [0] else ""
        return {**origin(self.knowledge_base), "served by": ", ".join(parts) + again}

    @cached_property
    def cost(self) -> Cost:
        """What the rows took, and what a picture saves."""
        return Cost.of(self.knowledge_base, self.route)

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
        usable = noise_ids.cpu()
        if not (finite := flat.isfinite()).all():  # what is not finite has no neighbours
            usable = usable.where(finite.all(1), -1)
        with watch("retrieval"):
            ids, distances = self.table.search(flat, usable, leap, self.neighbors)
        weights = torch.zeros(ids.shape, dtype=torch.float32)
        there = (ids >= 0).sum(1)
        hit = (there > 0) & self.gate.opens(distances)
        # samples whose noise has fewer than H rows are weighed on the rows there are
        widths: list[int] = there.where(hit, 0).tolist()
        for width in sorted(set(widths) - {0}):
            those = [i for i, other in enumerate(widths) if other == width]
            mine = slice(None) if len(those) == len(widths) else torch.tensor(those)
            with watch("gather"):
                keys = self.table.keys(ids[mine, :width], leap)
            with watch("combine"):
                found = self.combiner.weights(keys, flat[mine])
                weights[mine, :width] = (self.gate.scales(distances[mine])[:, None] * found).float()
        return Recall(ids, weights, distances, hit)

    def leap(
        self, propagated: Float[Tensor, "b *s"], recall: Recall, leap: int, watch: Stopwatch | None = None
    ) -> Float[Tensor, "b *s"]:
        """x̂[b] = C(x[a]) + Σ w_i·(x^i[b] − C(x^i[a])): the only place where retrieved rows touch the sample.

        A sample that did not hit is handed back as it came.
        """
        watch = watch or Stopwatch()
        if not recall.hits:
            return propagated
        if leap not in recall.taught:
            self._teach(recall, leap, watch)
        with watch("combine"):
            correction = recall.taught.pop(leap).to(propagated.device)
            if recall.hits == len(recall.hit):
                return (propagated.float() + correction).to(propagated.dtype)
            leapt = propagated.clone()
            hit = recall.hit.to(propagated.device)
            leapt[hit] = (propagated[hit].float() + correction).to(propagated.dtype)
        return leapt

    def _teach(self, recall: Recall, leap: int, watch: Stopwatch) -> None:
        """Combine what a recall teaches of a leap: and of those after it that it serves, where all fit in the cache."""
        those = recall if recall.hits == len(recall.hit) else recall[recall.hit]
        after = (at for at in self.retrieve_at if at > leap)
        leaps = range(leap, min(after, default=len(self.route.leaps)))
        if len(leaps) * those.ids.numel() * math.prod(self.knowledge_base.bank.shape) > _AT_ONCE:
            leaps = [leap]
        with watch("gather"):
            rows = self.table.brackets(those.ids.clamp(min=0), leaps)  # a missing neighbour has weight 0
        with watch("combine"):
            corrections = combine(those.weights.repeat(len(leaps), 1), rows.flatten(0, 1))
            recall.taught.update(zip(leaps, corrections.split(len(those.ids)), strict=True))

    def unconditional(
        self, leap: int, noise_ids: Int64[Tensor, " b"], recall: Recall | None, watch: Stopwatch | None = None
    ) -> tuple[Float[Tensor, "b *s"], Bool[Tensor, " b"]]:
        """The unconditional half of a half call as rows foretell it, and for which samples they do.

        The first call's is that of every row of its noise; a later one's is the neighbours', combined. It is foretold
        for samples that hit with weights that sum to one half at least.

        Args:
            leap: index of the leap, whose call is halved.
            noise_ids: bank noise of each sample, −1 for noise that is not from the bank.
            recall: the neighbours in use, None at the first leap.
            watch: where to count the seconds.

        Returns:
            Model outputs, float32 on the host, and which of them may be used.
        """
        watch = watch or Stopwatch()
        if leap == 0:
            ids = self.table.first_of(noise_ids)[:, None]
            weights, known = torch.ones(ids.shape), ids[:, 0] >= 0
        else:
            assert recall is not None  # the first leap always looks neighbours up
            ids, sums = recall.ids, recall.weights.sum(1)
            known = recall.hit & (sums >= _LEAST_WEIGHT)
            weights = recall.weights / sums.clamp(min=_LEAST_WEIGHT)[:, None]  # the gate may have shrunk them
        with watch("gather"):
            outputs = self.table.unconditional(ids.clamp(min=0), leap)  # a missing neighbour has weight 0
        with watch("combine"):
            return combine(weights, outputs), known

    def arrive(
        self, recall: Recall, leap: int, sample: Float[Tensor, "b *s"], watch: Stopwatch | None = None
    ) -> SolverState:
        """The solver's state at the end of a jump's leap, for a batch in which every sample hit.

        The history it holds is on the device and of the precision of `sample`.
        """
        stop = self.route.leaps[leap].stop
        grid = self.route.grid
        if self.history == "fresh" or stop == grid.fine:
            return self.solver.restart(replace(self.solver.init(grid), position=stop))
        watch = watch or Stopwatch()
        with watch("gather"):
            leaves = self.table.history(recall.ids.clamp(min=0), leap)
        with watch("combine"):
            combined = {name: combine(recall.weights, leaf).to(sample) for name, leaf in leaves.items()}
        return self.solver.at(grid, stop, combined)

    def report(
        self,
        *,
        nfe: int | float,
        noise_ids: Tensor,
        leapt: Sequence[bool],
        found: Sequence[tuple[tuple[int, ...], tuple[float, ...]]],
        seconds: Mapping[str, float],
        notes: Sequence[str] = (),
    ) -> LeapReport:
        """What one generation did, in words: see `LeapReport`."""
        prompts, trust = self.knowledge_base.prompts, self.gate.trust
        expected = [
            float(trust.errors(torch.tensor([distances], dtype=torch.float32))[0]) if trust and distances else None
            for _, distances in found
        ]
        return LeapReport(
            plan=str(self.plan),
            nfe=nfe,
            nfe_full=self.route.nfe_full,
            leapt=tuple(leapt),
            noise_ids=tuple(noise_ids.tolist()),
            neighbors=tuple(ids for ids, _ in found),
            distances=tuple(distances for _, distances in found),
            sources=tuple(tuple(prompts[i] for i in ids) for ids, _ in found),
            solver=str(self.solver),
            seconds=dict(seconds),
            notes=(*self.notes, *notes),
            expected=tuple(expected) if trust else (),
            break_even=self.cost.break_even,
            building=self.cost.model_calls,
            context=self.context,
        )

    @torch.no_grad()
    def sample(
        self,
        denoise: Callable[..., Tensor],
        noise: Float[Tensor, "b *s"],
        *,
        conditional: Callable[..., Tensor] | None = None,
        condition: Any = None,
        noise_ids: Int64[Tensor, " b"] | None = None,
        embeddings: Float[Tensor, "b e"] | None = None,
    ) -> tuple[Float[Tensor, "b *s"], LeapReport]:
        """Algorithm 2 of the paper with the plan's leaps: from unit noise to x[N].

        Args:
            denoise: the model: `denoise(x, t)`, or `denoise(x, t, condition)` where `condition` is given; x is scaled
                for the model, the output is what the solver's prediction type says.
            noise: unit-variance starting noise.
            conditional: the model with the prompt alone, called as `denoise`, which guides; half calls need it.
            condition: a tensor, or tuples, lists and mappings of tensors, with first dimension b; handed to `denoise`
                for the samples it is called with (where some samples of a batch leap and others do not, they are
                called apart).
            noise_ids: which bank noise each sample starts from, −1 for none; None matches `noise` against the bank.
            embeddings: prompt embeddings, for `key="prompt"`.

        Returns:
            x[N], and what was saved.

        Raises:
            InvalidInputError: noise or ids of another shape than the knowledge base's samples, or half calls without
                `conditional`.
        """
        watch = Stopwatch()
        shape = self.knowledge_base.bank.shape
        if noise.shape[1:] != shape or (noise_ids is not None and noise_ids.shape != noise.shape[:1]):
            ids_given = "" if noise_ids is None else f" and noise ids of shape {tuple(noise_ids.shape)}"
            raise InvalidInputError(
                f"expected noise of shape (b, {', '.join(map(str, shape))}) and, if any, b noise ids, given "
                f"{tuple(noise.shape)}{ids_given}; a single sample is a batch of one: noise[None]"
            )
        if self.plan.halved and conditional is None:
            raise InvalidInputError(
                f"plan {self.plan} has half calls, which run the model with the prompt alone; give it as conditional="
            )
        ids = self.knowledge_base.bank.match(noise) if noise_ids is None else noise_ids
        from redi.walk import Walk  # the loop is written over the engine, so it comes after it

        walk = Walk(self, denoise, conditional, watch, len(noise))
        state = self.solver.init(self.route.grid)
        everyone = torch.arange(len(noise))
        start = time.perf_counter()
        x = walk.run(
            noise * self.route.grid.initial_scale, state, self.route.segments, everyone, ids, condition, embeddings
        )
        watch.seconds["total"] = time.perf_counter() - start
        return x, walk.report(ids)
