"""Builds a knowledge base from a diffusers pipeline (the paper's Algorithm 1): one process, one device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from redi.errors import InvalidInputError
from redi.knowledge_base import KnowledgeBase, Refusal, Writer
from redi.plan import Plan
from redi.recipe import FineSolver, Recipe
from redi.solvers import DiffusersSolver


@final
@dataclass(frozen=True)
class Progress:
    """Where a build stands.

    Args:
        done: rows finished, those of earlier builds included.
        total: rows in all.
        seconds: since this build began.
        refused: rows of this build that were not written, for what they are not finite in, or too large for the
            storage; of several ranks rank 0's own, and at the end those of all.
        most: rows that fit into the memory at once; None while every batch did.
    """

    done: int
    total: int
    seconds: float
    refused: tuple[Refusal, ...] = ()
    most: int | None = None


def build(
    pipe: Any,
    prompts: Iterable[str],
    folder: str | Path,
    *,
    plans: Sequence[Plan] | None = None,
    solver: DiffusersSolver | None = None,
    noises: int = 1,
    seed: int = 0,
    diversity: float = 0.0,
    guidance: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str | None = None,
    settings: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    storage: str = "float16",
    model: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    shard_rows: int = 256,
    stop: Callable[[], bool] = lambda: False,
) -> KnowledgeBase:
    """Algorithm 1 of the paper: run every prompt from every bank noise finely and keep what the plans need.

    A folder that holds a knowledge base of the same settings is continued: finished rows are not computed again.
    This is one process on one device; for several see `redi.lightning`.

    Args:
        pipe: a diffusers pipeline.
        prompts: one row each, per noise.
        folder: where the knowledge base goes.
        plans: as the settings that follow, see `Recipe.of`.
        solver: the fine solver; None is the pipeline's own scheduler.
        noises: M, starting noises in the bank.
        seed: of the bank.
        diversity: η, how far from its bank noise a query may start.
        guidance: classifier-free guidance scale.
        height: in pixels; None is the pipeline's default.
        width: likewise.
        negative_prompt: for every row; None is none, not the empty text where a pipeline takes zeros for none
            (Stable Diffusion XL).
        settings: further arguments of the pipeline's call, for every row (`{"num_frames": 16}`).
        batch_size: pictures per pipeline call; halved where the memory does not suffice.
        storage: dtype on disk.
        model: a name for the model.
        progress: told at the start and after every batch.
        shard_rows: rows of a full shard; what a crash can lose.
        stop: asked before every batch; when it says so the build ends early, with what is done.

    Returns:
        The knowledge base, opened.

    Raises:
        InvalidInputError: arguments that cannot work, or a pipeline that does not start from noise.
        UnsupportedSolverError: a scheduler that does not replay.
        FingerprintMismatchError: the folder's rows are of other settings.
    """
    if batch_size < 1:
        raise InvalidInputError(f"batch_size must be at least 1, given {batch_size}")
    recipe = Recipe.of(
        pipe,
        plans=plans,
        solver=solver,
        noises=noises,
        seed=seed,
        diversity=diversity,
        guidance=guidance,
        height=height,
        width=width,
        negative_prompt=negative_prompt,
        settings=settings,
        storage=storage,
        model=model,
    )
    items, solve, start = recipe.items(prompts), FineSolver(pipe, recipe), time.monotonic()
    with Writer.open(folder, recipe.config, shard_rows) as writer:
        done = writer.done
        todo = [item for item in items if item not in done]
        for i in range(0, len(todo) + batch_size, batch_size):
            if progress is not None:
                finished = len(items) - len(todo) + min(i, len(todo))
                progress(Progress(finished, len(items), time.monotonic() - start, writer.refused, solve.most))
            if i >= len(todo) or stop():
                break
            for rows in solve(todo[i : i + batch_size]):
                writer.append(rows)
    return KnowledgeBase.open(folder)
