"""A way of sampling, as data: a plain solver, or a knowledge base served through a plan."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from redi import Transport, Value
from redi.combiners import Combiner, LeastSquares


@dataclass(frozen=True)
class Way:
    """A way of sampling: a plain solver, or a knowledge base served through a plan.

    Args:
        name: for readers.
        solver: as the command line names it.
        steps: of the solver, or of the fine schedule.
        rows: of which knowledge base it leaps, by name; None for a plain run.
        plan: as it is written.
        transport: of the leap.
        combiner: of the neighbours.
        neighbors: H.
        key: what they are found by; None is the transport's own.
        published: model calls as the paper counts them.
        most: rows of the knowledge base that are served, None for all.
        retrieve_at: leaps at which neighbours are looked up.
        switch: step from which the second prompt of a query is used.
    """

    name: str
    solver: str
    steps: int
    rows: str | None = None
    plan: str | None = None
    transport: Transport = field(default_factory=Value)
    combiner: Combiner = field(default_factory=LeastSquares)
    neighbors: int = 1
    key: Any = None
    published: int | None = None
    most: int | None = None
    switch: int | None = None
    retrieve_at: tuple[int, ...] = (0,)

    def identity(self) -> str:
        """Everything the latents depend on, as text."""
        said = {k: repr(v) for k, v in vars(self).items() if k not in ("name", "published")}
        if self.plan is None:
            said = {k: said[k] for k in ("solver", "steps", "switch")}
        return json.dumps(said, sort_keys=True)
