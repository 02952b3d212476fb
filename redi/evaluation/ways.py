"""Ways of sampling that are compared: the fine solve, plain solvers, and redi in every crossing of its choices.

What a way makes of a prompt is for `examiner` to see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Final, Literal, final

from redi.engine import ReDiEngine
from redi.errors import InvalidInputError, KnowledgeBaseError, PlanError, UnsupportedSolverError
from redi.knowledge_base import KnowledgeBase
from redi.plan import Plan
from redi.solvers import DiffusersSolver

_IMPOSSIBLE: Final = (PlanError, UnsupportedSolverError, KnowledgeBaseError, InvalidInputError)
_CHOICES: Final = ("transport", "combiner", "retriever", "key", "neighbors")


@final
@dataclass(frozen=True, eq=False)
class Way:
    """One way of sampling.

    Args:
        name: what it is called in the table; no two ways share one.
        kind: `fine`, the solve that all are measured against; `plain`, a solver without memory; or `redi`.
        solver: whose steps are taken.
        steps: what the pipeline is asked for, `num_inference_steps`.
        calls: of the model, per picture; a jump that is missed makes more.
        engine: of redi.
    """

    name: str
    kind: Literal["fine", "plain", "redi"]
    solver: DiffusersSolver
    steps: int
    calls: int | float
    engine: ReDiEngine | None = None

    @classmethod
    def fine(cls, kb: KnowledgeBase, label: str) -> Way:
        """The run that the rows were recorded from."""
        mark = kb.fingerprint
        solver = DiffusersSolver.from_config(mark.scheduler, mark.scheduler_config)
        return cls(
            f"{label}:{mark.steps}, the fine solve", "fine", solver, mark.steps, len(solver.schedule(mark.steps))
        )

    @classmethod
    def plain(cls, solver: DiffusersSolver, steps: int, label: str) -> Way:
        """A solver with so many steps of its own.

        Raises:
            PlanError: it has no schedule of so many.
        """
        return cls(f"{label}:{steps}", "plain", solver, steps, len(solver.schedule(steps)))

    @classmethod
    def redi(cls, engine: ReDiEngine, name: str) -> Way:
        """A knowledge base served."""
        solver = engine.solver
        assert isinstance(solver, DiffusersSolver)
        return cls(name, "redi", solver, engine.plan.steps, engine.route.nfe, engine)

    @property
    def choices(self) -> dict[str, Any]:
        """Plan, transport, combiner, retriever, key and neighbours in words; None where there is nothing to choose."""
        e = self.engine
        said = {} if e is None else {name: getattr(e, name) for name in _CHOICES} | {"key": e.served_key}
        plain: dict[str, Any] = {n: v if v is None or isinstance(v, (str, int)) else repr(v) for n, v in said.items()}
        return {"plan": None if e is None else str(e.plan)} | dict.fromkeys(_CHOICES) | plain

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that its pictures depend on besides the rows, as JSON."""
        e = self.engine
        more = (
            {}
            if e is None
            else {
                "gate": repr(e.gate),
                "retrieve_at": list(e.retrieve_at),
                "history": e.history,
                "eight_bits": e.eight_bits,
            }
        )
        return {"kind": self.kind, "solver": dict(self.solver.identity()), "steps": self.steps, **self.choices, **more}

    @property
    def rival_calls(self) -> int:
        """Calls of the plain solver it is compared with: as many, and half a call more where a half is counted."""
        return math.ceil(self.calls)

    @property
    def values(self) -> tuple[int, ...]:
        """Where a jump arrives, in entries of the fine solve: there the sample is compared before it goes on."""
        e = self.engine
        return () if e is None or e.plan.own_grid else tuple(leap.stop for leap in e.route.leaps)


def crossing(
    kb: KnowledgeBase,
    plans: Sequence[Plan],
    choices: Mapping[str, Sequence[tuple[str, Any]]],
    note: Callable[[str], None] = lambda text: None,
) -> list[Way]:
    """Every plan with every combination of choices that can be served.

    Args:
        kb: the knowledge base.
        plans: of its fine steps.
        choices: for fields of `ReDiEngine.serving`, the values to cross and what to call them; what has none is left
            to what `redi.tune` found for the plan, or the default.
        note: told which combinations cannot be served, and why.

    Raises:
        InvalidInputError: none of them can.
    """
    ways: list[Way] = []
    reason = "no plan was given"
    for plan, chosen in product(plans, product(*choices.values())):
        name = " ".join([str(plan), *(label for label, _ in chosen)])
        try:
            given = {field: value for field, (_, value) in zip(choices, chosen, strict=True)}
            ways.append(Way.redi(ReDiEngine.serving(kb, plan, **given)[0], name))
        except _IMPOSSIBLE as e:
            reason = f"{name}: {e}"
            note(f"left out {reason}")
    if not ways:
        raise InvalidInputError(f"there is nothing to evaluate; {reason}")
    return ways


def same_calls(ways: Sequence[Way], solvers: Sequence[tuple[str, DiffusersSolver]]) -> Iterator[Way]:
    """Plain solvers at each way of redi's `rival_calls`, or at the next fewer that they can make.

    Args:
        ways: redi's are looked at.
        solvers: with what to call them.
    """
    for calls in dict.fromkeys(w.rival_calls for w in ways if w.kind == "redi"):
        for label, solver in solvers:
            steps = next((s for s in range(calls, 0, -1) if (n := _calls(solver, s)) is not None and n <= calls), None)
            if steps is not None:
                yield Way.plain(solver, steps, label)


def distinct(ways: Sequence[Way]) -> list[Way]:
    """Each way once."""
    kept: list[Way] = []
    for way in ways:
        if all(way.identity != other.identity for other in kept):
            kept.append(way)
    return kept


def _calls(solver: DiffusersSolver, steps: int) -> int | None:
    try:
        return len(solver.schedule(steps))
    except PlanError:
        return None
