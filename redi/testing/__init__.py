"""Contract suites and hypothesis strategies for those who write their own Retriever, Combiner or SolverAdapter.

Needs pytest and hypothesis, which redi itself does not; names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from redi.testing.combiner import CombinerContract
    from redi.testing.retriever import RetrieverContract
    from redi.testing.solver import SolverContract
    from redi.testing.strategies import clustered_latents, neighbourhoods

__all__ = ["CombinerContract", "RetrieverContract", "SolverContract", "clustered_latents", "neighbourhoods"]

_HOME: Final = {
    "CombinerContract": "combiner",
    "RetrieverContract": "retriever",
    "SolverContract": "solver",
    "clustered_latents": "strategies",
    "neighbourhoods": "strategies",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'redi.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"redi.testing.{_HOME[name]}"), name)
