"""redi: diffusion models made cheaper to run by remembering trajectories already paid for. No training.

Public names are imported on first use, so that `import redi` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redi import zoo
    from redi.backends import Exact, Faiss, Hnsw, Index, Retriever, Scann
    from redi.builder import build
    from redi.combiners import NNLS, Affine, Combiner, Kriging, LeastSquares, Nearest
    from redi.engine import ReDiEngine
    from redi.errors import ReDiError
    from redi.gate import Gate
    from redi.knowledge_base import KnowledgeBase
    from redi.noise import NoiseBank
    from redi.plan import Plan
    from redi.recording import record
    from redi.scheduler import disable, enable, report, switch_prompt
    from redi.solvers import DiffusersSolver, SolverAdapter
    from redi.transports import Defect, Residual, Transport, Value
    from redi.tuning import tune
    from redi.types import LeapReport, Neighbors

__version__ = "0.1.0"

_HOME = {
    "Affine": "combiners",
    "Combiner": "combiners",
    "Defect": "transports",
    "DiffusersSolver": "solvers",
    "Exact": "backends",
    "Faiss": "backends",
    "Gate": "gate",
    "Hnsw": "backends",
    "Index": "backends",
    "KnowledgeBase": "knowledge_base",
    "Kriging": "combiners",
    "LeapReport": "types",
    "LeastSquares": "combiners",
    "NNLS": "combiners",
    "Nearest": "combiners",
    "Neighbors": "types",
    "NoiseBank": "noise",
    "Plan": "plan",
    "ReDiEngine": "engine",
    "ReDiError": "errors",
    "Residual": "transports",
    "Retriever": "backends",
    "Scann": "backends",
    "SolverAdapter": "solvers",
    "Transport": "transports",
    "Value": "transports",
    "build": "builder",
    "disable": "scheduler",
    "enable": "scheduler",
    "record": "recording",
    "report": "scheduler",
    "switch_prompt": "scheduler",
    "tune": "tuning",
}

_MODULES = ("zoo",)

__all__ = [
    "NNLS",
    "Affine",
    "Combiner",
    "Defect",
    "DiffusersSolver",
    "Exact",
    "Faiss",
    "Gate",
    "Hnsw",
    "Index",
    "KnowledgeBase",
    "Kriging",
    "LeapReport",
    "LeastSquares",
    "Nearest",
    "Neighbors",
    "NoiseBank",
    "Plan",
    "ReDiEngine",
    "ReDiError",
    "Residual",
    "Retriever",
    "Scann",
    "SolverAdapter",
    "Transport",
    "Value",
    "build",
    "disable",
    "enable",
    "record",
    "report",
    "switch_prompt",
    "tune",
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"redi.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"redi.{name}")
    raise AttributeError(f"module 'redi' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
