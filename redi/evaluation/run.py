"""An evaluation by one process on one device; for several see `redi.lightning`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from redi.evaluation.archive import Archive
from redi.evaluation.contest import Contest
from redi.evaluation.examiner import Examiner
from redi.evaluation.seen import Seen, SeenState


@final
@dataclass(frozen=True)
class Progress:
    """Where an evaluation stands.

    Args:
        done: batches finished, those of earlier runs included.
        total: batches in all.
        seconds: since this run began.
    """

    done: int
    total: int
    seconds: float


def evaluate(
    pipe: Any,
    contest: Contest,
    folder: str | Path,
    *,
    progress: Callable[[Progress], None] = lambda now: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Seen] | None:
    """Solve every prompt in every way, batch after batch; batches that are in the folder are not solved again.

    Args:
        pipe: the pipeline that the knowledge base was built with; it is left as it was.
        contest: what is compared on what.
        folder: where finished batches are kept.
        progress: told at the start and after every batch.
        stop: asked before every batch; when it says so the evaluation ends early.

    Returns:
        What was seen of each way, for `Table.of`; None if it ended early. The same command goes on then.

    Raises:
        ReDiError: as `redi.enable` for a way of redi.
        KnowledgeBaseError: the folder cannot be written.
    """
    archive, began = Archive(folder, contest), time.monotonic()
    kept = {batch.first: archive.find(batch) for batch in contest.batches}
    todo = [batch for batch in contest.batches if kept[batch.first] is None]
    done = len(kept) - len(todo)
    progress(Progress(done, len(kept), time.monotonic() - began))
    examiner = Examiner(pipe, contest) if todo else None
    for batch in todo:
        if stop():
            return None
        assert examiner is not None
        kept[batch.first] = seen = examiner(batch)
        archive.keep(batch, seen)
        done += 1
        progress(Progress(done, len(kept), time.monotonic() - began))
    states = [SeenState() for _ in contest.ways]
    for first, seen in kept.items():
        assert seen is not None
        for state, s in zip(states, seen, strict=True):
            state.update(first, s)
    return [state.seen for state in states]
