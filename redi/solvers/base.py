"""The solver interface: explicit state in, explicit state out. Nothing here knows diffusers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from redi.errors import InvalidInputError
from redi.schedules import Grid


@final
@dataclass(frozen=True, eq=False)
class SolverState:
    """Where a solver stands on its grid and what it remembers.

    Args:
        grid: what it walks.
        position: index of the next grid point to be called, 0 … m.
        history: the solver's own memory: tensors, numbers, None, and lists of those, by field name.
    """

    grid: Grid
    position: int
    history: Mapping[str, Any]

    def leaves(self) -> dict[str, Tensor]:
        """The tensors of the history by path, e.g. `ets.0`; each has the sample's shape."""
        found: dict[str, Tensor] = {}
        for name, value in self.history.items():
            if isinstance(value, Tensor):
                found[name] = value
            elif isinstance(value, list):
                found.update({f"{name}.{i}": v for i, v in enumerate(value) if isinstance(v, Tensor)})  # pyright: ignore
        return found

    def with_leaves(self, leaves: Mapping[str, Tensor]) -> SolverState:
        """The same state with its tensors replaced, path by path.

        Raises:
            InvalidInputError: a path is missing or unknown.
        """
        if (mine := set(self.leaves())) != set(leaves):
            raise InvalidInputError(f"history leaves must be {sorted(mine)}, given {sorted(leaves)}")
        history: dict[str, Any] = {}
        for name, value in self.history.items():
            if isinstance(value, Tensor):
                history[name] = leaves[name]
            elif isinstance(value, list):
                history[name] = [leaves.get(f"{name}.{i}", v) for i, v in enumerate(value)]  # pyright: ignore
            else:
                history[name] = value
        return replace(self, history=history)


class SolverAdapter(ABC):
    """A deterministic solver as three pure functions.

    A subclass owes `schedule`, `init` and `step`; it may override `suits_coarse` and `restart`.
    """

    @abstractmethod
    def schedule(self, steps: int) -> Grid:
        """The fine grid of `steps` solver steps."""

    @abstractmethod
    def init(self, grid: Grid) -> SolverState:
        """The state before the first call on `grid` (a schedule of this solver or a subset of one)."""

    @abstractmethod
    def step(
        self, model_output: Float[Tensor, "b *s"], sample: Float[Tensor, "b *s"], state: SolverState
    ) -> tuple[Float[Tensor, "b *s"], SolverState]:
        """From x at `state.position` to x at the next grid point. Neither argument is changed."""

    @property
    def suits_coarse(self) -> bool:
        """Whether a step consumes the sample it is given and works on any grid, as a coarse plan needs."""
        return True

    def identity(self) -> Mapping[str, Any]:
        """What tells this solver from others, fit for JSON: tables derived for one are not served to another."""
        return {"class": type(self).__qualname__, "settings": repr(self)}

    def restart(self, state: SolverState) -> SolverState:
        """The state at the same position with no memory, such that the next steps warm up correctly."""
        return replace(self.init(state.grid), position=state.position)

    def at(self, grid: Grid, position: int, leaves: Mapping[str, Tensor] | None = None) -> SolverState:
        """The state a plain walk over `grid` has at `position`, holding the given history.

        What is not a tensor in a history depends on the position alone, so a walk over one zero finds it.

        Args:
            grid: what the solver walks.
            position: 0 … m.
            leaves: the tensors to hold, named as `SolverState.leaves` names them; None keeps the placeholders.
        """
        # four dimensions, for solvers that threshold a sample channel by channel
        state, x = self.init(grid), torch.zeros(1, 1, 1, 1)
        while state.position < position:
            x, state = self.step(torch.zeros_like(x), x, state)
        return state if leaves is None else state.with_leaves(leaves)
