"""Knowledge bases built, and evaluated, by many processes, as Lightning predict loops. Nothing else knows Lightning.

`build` and `evaluate` do all of it; the modules, data modules and `ShardWriter` fit any `Trainer` of one's own.
"""

from __future__ import annotations

try:
    import lightning as _lightning  # pyright: ignore[reportUnusedImport] # noqa: F401
except ImportError:  # pragma: no cover
    from redi.errors import MissingExtraError

    raise MissingExtraError("lightning", "lightning") from None

from redi.lightning.data import PromptData
from redi.lightning.evaluation import ContestData, Evaluation, evaluate
from redi.lightning.module import KnowledgeBaseBuilder
from redi.lightning.run import build, hush, trainer
from redi.lightning.watching import watching
from redi.lightning.writer import ShardWriter

__all__ = [
    "ContestData",
    "Evaluation",
    "KnowledgeBaseBuilder",
    "PromptData",
    "ShardWriter",
    "build",
    "evaluate",
    "hush",
    "trainer",
    "watching",
]
