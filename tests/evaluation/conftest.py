"""A knowledge base of a tiny pipeline, and contests on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import redi
from redi.evaluation import Contest, EvaluatorFeatures, EvaluatorScore, Way, crossing, same_calls
from redi.evaluation.ways import distinct
from redi.knowledge_base import KnowledgeBase
from redi.plan import Plan
from tests.tiny import tiny_pipeline

ROWS = ("red apple", "green heart", "blue face", "red star", "a cat", "a dog")
QUERIES = ("red cat", "a star", "green dog")
COARSE, JUMP = Plan.coarse(3, 6), Plan.jump(2, 4, 6)


@pytest.fixture(scope="session")
def pipe() -> Any:
    from diffusers import DPMSolverMultistepScheduler

    pipe = tiny_pipeline()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe


@pytest.fixture(scope="session")
def kb(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> KnowledgeBase:
    folder = tmp_path_factory.mktemp("kb") / "kb"
    return redi.build(pipe, ROWS, folder, plans=[COARSE, JUMP], guidance=2.0, noises=2, storage="float32")


@pytest.fixture(scope="session")
def ways(kb: KnowledgeBase) -> list[Way]:
    """The fine solve, one plain solver at each number of calls, both plans, and a jump as published."""
    nearest = {"combiner": [("nearest", redi.Nearest())], "neighbors": [("H=1", 1)]}
    fine = Way.fine(kb, "own")
    leaping = [
        *crossing(kb, [COARSE, JUMP], {}),
        *crossing(kb, [JUMP], {"transport": [("value", redi.Value())], **nearest}),
    ]
    return distinct([fine, *same_calls(leaping, [("own", fine.solver)]), *leaping])


def contest(kb: KnowledgeBase, ways: Sequence[Way], prompts: Sequence[str] = QUERIES, **more: Any) -> Contest:
    given = {"noise_ids": [0, 1], "features": EvaluatorFeatures(), "score": EvaluatorScore(), "batch_size": 4} | more
    return Contest(kb, prompts, ways=ways, **given)


class Calls:
    """How often a pipeline's network is called."""

    def __init__(self, pipe: Any) -> None:
        self.count = 0
        self._handle = pipe.unet.register_forward_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def folder_of(base: Path) -> list[Path]:
    return sorted(base.glob("batches/*/*.safetensors"))
