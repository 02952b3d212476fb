"""What a knowledge base took and what it gives back, in model calls for one picture. Nothing here runs a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

from redi.knowledge_base import KnowledgeBase
from redi.plan import Route


@final
@dataclass(frozen=True, slots=True)
class Cost:
    """The account of one plan.

    Args:
        rows: of the knowledge base.
        calls_per_row: model calls that a row took.
        nfe: model calls of a picture that leaps.
        nfe_full: model calls of the fine run.
    """

    rows: int
    calls_per_row: int
    nfe: int | float
    nfe_full: int

    @classmethod
    def of(cls, kb: KnowledgeBase, route: Route) -> Cost:
        """The account of a knowledge base served through a route."""
        # a build stops after the last entry that is wanted
        per_row = min(max(1, kb.record.last), route.nfe_full)
        return cls(len(kb), per_row, route.nfe, route.nfe_full)

    @property
    def model_calls(self) -> int:
        """What building took."""
        return self.rows * self.calls_per_row

    @property
    def saved(self) -> int | float:
        """What a picture saves against the fine run."""
        return self.nfe_full - self.nfe

    @property
    def break_even(self) -> int | None:
        """Pictures after which the calls saved are as many as building took; None where nothing is saved."""
        return math.ceil(self.model_calls / self.saved) if self.saved else None

    def to_json(self) -> dict[str, Any]:
        """What the plan saves."""
        return {"nfe": self.nfe, "nfe_full": self.nfe_full, "saved": self.saved, "break_even": self.break_even}
