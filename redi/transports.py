"""The coarse propagator C of the one formula x̂[b] = C(x[a]) + Σ w_i·(x^i[b] − C(x^i[a])), and what a row must store.

The bracket is row i's *defect*. C = 0 is ReDi as published (Zhang et al., 2023, arXiv 2302.02285, Algorithm 2).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Final, final

import torch
from jaxtyping import Float
from torch import Tensor

from redi.errors import PlanError
from redi.plan import Plan, Route, Segment
from redi.solvers import SolverAdapter, SolverState
from redi.types import Record, Rows

_SMALLEST_SIGNAL: Final = 1e-3  # a(t_b)/a(t_a) above a thousand would multiply the query's noise, not its picture


class Transport(ABC):
    """How a sample crosses a leap when nothing is remembered."""

    @property
    @abstractmethod
    def calls(self) -> bool:
        """Whether C needs the model's output at the start of the leap."""

    @abstractmethod
    def propagate(
        self,
        sample: Float[Tensor, "b *s"],
        model_output: Float[Tensor, "b *s"] | None,
        state: SolverState,
        leap: Segment,
        solver: SolverAdapter,
    ) -> tuple[Float[Tensor, "b *s"], SolverState]:
        """C(x[a]) for the leap a → b.

        Args:
            sample: x[a], unscaled.
            model_output: the model's output at a, or None where the leap makes no call.
            state: the solver before the call at a.
            leap: the segment in entries.
            solver: whose step it is.

        Returns:
            C(x[a]) and the solver's state after it (unchanged where C is no solver step).
        """


@final
@dataclass(frozen=True)
class Value(Transport):
    """C = 0: the query becomes Σ w_i·x^i[b], ReDi as published."""

    @property
    def calls(self) -> bool:
        """No call: the key is the sample itself."""
        return False

    def propagate(
        self,
        sample: Float[Tensor, "b *s"],
        model_output: Float[Tensor, "b *s"] | None,
        state: SolverState,
        leap: Segment,
        solver: SolverAdapter,
    ) -> tuple[Float[Tensor, "b *s"], SolverState]:
        """Zero."""
        return torch.zeros_like(sample), state


@final
@dataclass(frozen=True)
class Residual(Transport):
    """C = a(t_b)/a(t_a): Value that keeps the part of the query which the neighbours do not explain."""

    @property
    def calls(self) -> bool:
        """No call: the key is the sample itself."""
        return False

    def propagate(
        self,
        sample: Float[Tensor, "b *s"],
        model_output: Float[Tensor, "b *s"] | None,
        state: SolverState,
        leap: Segment,
        solver: SolverAdapter,
    ) -> tuple[Float[Tensor, "b *s"], SolverState]:
        """x[a] multiplied by the growth of the signal.

        Raises:
            PlanError: there is no signal at the start of the leap.
        """
        grid = state.grid
        a, b = grid.signal[grid.entries.index(leap.start)], grid.signal[grid.entries.index(leap.stop)]
        if a < _SMALLEST_SIGNAL:
            raise PlanError(f"the residual transport needs signal at entry {leap.start}, which has a = {float(a):.1e}")
        return sample * float(b / a), state


@final
@dataclass(frozen=True)
class Defect(Transport):
    """C = the solver's own single step from a to b: retrieved defect correction. Zero weights give the plain solver."""

    @property
    def calls(self) -> bool:
        """One call, at the start of the leap."""
        return True

    def propagate(
        self,
        sample: Float[Tensor, "b *s"],
        model_output: Float[Tensor, "b *s"] | None,
        state: SolverState,
        leap: Segment,
        solver: SolverAdapter,
    ) -> tuple[Float[Tensor, "b *s"], SolverState]:
        """The solver's step; on a fine grid the entries inside the leap are taken out first.

        Raises:
            PlanError: the leap makes no call.
        """
        if model_output is None:
            raise PlanError(f"the defect transport calls the model at the start of a leap; leap {leap} makes no call")
        grid = state.grid
        at = state.position
        if grid.entries[at + 1] != leap.stop:
            inside = set(range(leap.start + 1, leap.stop))
            spliced = grid.subset([e for e in grid.entries[:-1] if e not in inside])
            # the grid up to a is untouched, so the history is the same; what counts positions is the solver's
            state = solver.at(spliced, at, state.leaves())
        return solver.step(model_output, sample, state)


def check(plan: Plan, transport: Transport, solver: SolverAdapter) -> Plan:
    """The plan as this transport and solver serve it (a jump's leap makes a call or not).

    Raises:
        PlanError: the transport cannot serve a plan of this kind.
    """
    if plan.own_grid and not transport.calls:
        raise PlanError(
            f"plan {plan} calls the model at every leap, so it needs the Defect transport, given {transport}; "
            "Value and Residual serve jumps"
        )
    if transport.calls and not solver.suits_coarse:
        raise PlanError(
            f"{solver} cannot be corrected step by step (its step does not start from the sample it is given); "
            "use it for jumps with the Value or Residual transport"
        )
    served = plan.calling(transport.calls)
    if not served.leaps:
        raise PlanError(f"plan {plan} saves no call with {transport}: a leap of one step with a call is that step")
    return served


def needs(route: Route, solver: SolverAdapter) -> Record:
    """What a row must store so that every transport can serve this route."""
    starts = frozenset(s.start for s in route.leaps)
    stops = frozenset(s.stop for s in route.leaps)
    if route.plan.own_grid:
        return Record(starts | stops, starts, unconditional=frozenset(s.start for s in route.leaps if s.halved))
    history = stops | (starts if solver.suits_coarse else frozenset())
    return Record(starts | stops, starts, frozenset(e for e in history if 0 < e < route.fine.fine))


def brackets(rows: Rows, route: Route, transport: Transport, solver: SolverAdapter) -> Float[Tensor, "n l *s"]:
    """x^i[b] − C(x^i[a]) of every row and leap, C fed from the row's own trajectory and nothing else."""
    found: list[Tensor] = []
    state = solver.init(route.grid)
    for leap in route.leaps:
        x = rows.samples[leap.start].float()
        if not route.plan.own_grid:
            state = solver.at(route.grid, leap.start, _history(rows, leap.start, transport))
        m = None
        if transport.calls:
            m = route.grid.model_output(rows.denoised[leap.start].float(), x, state.position)
        propagated, state = transport.propagate(x, m, state, leap, solver)
        found.append(rows.samples[leap.stop].float() - propagated)
    return torch.stack(found, dim=1)


def _history(rows: Rows, entry: int, transport: Transport) -> dict[str, Tensor] | None:
    if not transport.calls:
        return None  # C does not look at it
    return {name: leaf.float() for name, leaf in rows.history.get(entry, {}).items()}
