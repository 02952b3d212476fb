"""Ways of sampling, each measured against the fine solve of the same prompts from the same noise.

`evaluate` does all of it in this process; `redi.lightning.evaluate` does it on many, with the same numbers.
"""

from __future__ import annotations

from redi.evaluation.contest import Contest
from redi.evaluation.features import EvaluatorFeatures, Features, Inception, LatentFeatures
from redi.evaluation.lpips import Lpips
from redi.evaluation.run import Progress, evaluate
from redi.evaluation.scores import Clip, EvaluatorScore, Score
from redi.evaluation.table import Table
from redi.evaluation.ways import Way, crossing, same_calls

__all__ = [
    "Clip",
    "Contest",
    "EvaluatorFeatures",
    "EvaluatorScore",
    "Features",
    "Inception",
    "LatentFeatures",
    "Lpips",
    "Progress",
    "Score",
    "Table",
    "Way",
    "crossing",
    "evaluate",
    "same_calls",
]
