"""An evaluation by many processes: a predict loop that generates, and states that are reduced over all of them.

The numbers are those of one process: batches are the same, and what is seen of them is put in order before it is used.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader

from redi.errors import InvalidInputError
from redi.evaluation import Contest, Progress
from redi.evaluation.archive import Archive
from redi.evaluation.contest import Batch
from redi.evaluation.examiner import Examiner
from redi.evaluation.seen import Seen, SeenState, nothing
from redi.launch import launched
from redi.lightning.data import Share
from redi.lightning.ranks import Ranks
from redi.lightning.run import predict, trainer
from redi.pipelines import changeable
from redi.stop import Stop


@final
class Evaluation(LightningModule):
    """Solves a contest's batches in every way, keeps what is seen of them in a folder, and brings it all together.

    Args:
        pipe: the pipeline that the knowledge base was built with, loaded by every rank for itself, on any device.
        contest: what is compared on what.
        folder: where finished batches are kept; all ranks must see the same.
        progress: told on rank 0, at the start and after every batch; shares are equal, so its own stands for all.
        stop: what ends the evaluation early; by default a SIGTERM.

    Attributes:
        seen: of each way, all pictures of all ranks, when the evaluation has ended; None if it ended early.
    """

    def __init__(
        self,
        pipe: Any,
        contest: Contest,
        folder: str | Path,
        *,
        progress: Callable[[Progress], None] = lambda now: None,
        stop: Stop | None = None,
    ) -> None:
        super().__init__()
        # A pipeline is no module, so Lightning does not send rank 0's weights to ranks that have loaded them.
        self.pipe, self.contest = pipe, contest
        self.archive, self.stop = Archive(folder, contest), stop or Stop()
        self.seen: list[Seen] | None = None
        self._progress = progress
        self._ranks = Ranks(0, 1)
        self._examiner: Examiner | None = None
        self._kept: list[Batch] = []
        self._todo: list[Batch] = []
        self._states: tuple[SeenState, ...] = ()
        self._solved = 0
        self._began = time.monotonic()

    def setup(self, stage: str) -> None:
        """Meet the other ranks; rank 0 derives the tables that serve, so that the others find them.

        Raises:
            InvalidInputError: more processes were launched than the Trainer knows, or its precision is not the
                pipeline's own.
            RankError: another rank raised.
        """
        if (others := launched()) > self.trainer.world_size:
            raise InvalidInputError(
                f"{others} processes were launched, and this Trainer knows of {self.trainer.world_size}: every one of "
                f"them would evaluate all of it; give Trainer devices × num_nodes = {others}"
            )
        if self.trainer.precision != "32-true":
            raise InvalidInputError(
                f"Trainer(precision={self.trainer.precision!r}) would make other pictures than the knowledge base's; "
                "load the pipeline in the dtype of its rows, and leave the Trainer's precision alone"
            )
        self._ranks = Ranks(self.trainer.global_rank, self.trainer.world_size)
        gather = self._ranks.gathered if self._ranks.count > 1 else None
        self._states = tuple(SeenState(gather) for _ in self.contest.ways)  # a tuple: they stay on the CPU
        self._ranks.of_first(self._derive)

    def remaining(self) -> list[Batch]:
        """The batches that are left, the same on every rank. From here on a signal ends the work early."""

        def look() -> list[int]:
            return [i for i, batch in enumerate(self.contest.batches) if self.archive.find(batch) is None]

        left = set(self._ranks.of_first(look))
        batches = self.contest.batches
        self._todo = [b for i, b in enumerate(batches) if i in left]
        kept = [b for i, b in enumerate(batches) if i not in left]
        self._kept = kept[self._ranks.rank :: self._ranks.count]
        if (launcher := self.trainer.strategy.launcher) is not None and hasattr(launcher, "kill"):
            self.stop.passed_on = launcher.kill  # those that this process started are told by it
        self.stop.listen()  # in the place of Lightning's own handler, which waits for other ranks inside the handler
        self._tell(0)
        return self._todo

    def on_predict_start(self) -> None:
        """Put the pipeline on this rank's device."""
        self.pipe.to(self.device)
        mark = self.contest.kb.fingerprint
        if (dtype := changeable(self.pipe)["dtype"]) != mark.dtype:
            raise InvalidInputError(f"the rows were solved with the pipeline in {mark.dtype}, now it is in {dtype}")

    def transfer_batch_to_device(self, batch: Batch, device: Any, dataloader_idx: int) -> Batch:
        """Nothing to move: a batch is words, and Lightning would look into it for tensors."""
        return batch

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Seen]:
        """What is seen of this batch's pictures in each way."""
        self._examiner = self._examiner or Examiner(self.pipe, self.contest)
        seen = self._examiner(batch)
        self.archive.keep(batch, seen)
        for state, s in zip(self._states, seen, strict=True):
            state.update(batch.first, s)
        self._solved += 1
        self._tell(min(len(self._todo), self._solved * self.trainer.world_size))  # shares are equal
        return seen

    def teardown(self, stage: str) -> None:
        """Wait for all ranks, and reduce the states over them.

        Raises:
            RankError: another rank raised, or was lost.
        """
        if not self._states:
            return
        ranks = self._ranks
        self._tell(sum(ranks.gathered(self._solved)))
        ended_early = any(ranks.gathered(self.stop())) or self.trainer.limit_predict_batches != 1.0
        if not ended_early:
            for batch in self._kept:
                seen = self.archive.find(batch)
                if seen is None:
                    raise InvalidInputError(f"{self.archive.folder}: a batch vanished meanwhile; run the same again")
                for state, s in zip(self._states, seen, strict=True):
                    state.update(batch.first, s)
            width = max(ranks.gathered(max(state.width for state in self._states)))
            for state in self._states:
                state.update(0, nothing(width))  # so that a rank that saw nothing has something to bring
            self.seen = [state.seen for state in self._states]
        self._states, self._examiner = (), None
        ranks.part()

    def _derive(self) -> None:
        for way in self.contest.ways:
            if way.engine is not None:
                _ = way.engine.table

    def _tell(self, solved: int) -> None:
        if not self.trainer.is_global_zero:
            return
        total, seconds = len(self.contest.batches), time.monotonic() - self._began
        done = total - len(self._todo) + solved
        self._progress(Progress(done, total, seconds))
        rate = solved * self.contest.batch_size / max(seconds, 1e-9)
        for logger in self.trainer.loggers:
            logger.log_metrics({"batches": done, "pictures_per_second": rate}, done)


@final
class ContestData(LightningDataModule):
    """This rank's share of an Evaluation's batches, but for those that are finished."""

    def __init__(self) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Batches that `Evaluation.predict_step` takes.

        Raises:
            InvalidInputError: the Trainer's module is no Evaluation.
        """
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        if not isinstance(module, Evaluation):
            raise InvalidInputError(f"ContestData feeds an Evaluation, given {type(module).__name__}")
        todo = module.remaining()
        share = Share(todo, self.trainer.global_rank, self.trainer.world_size, module.stop)  # type: ignore
        return DataLoader(todo, batch_size=1, sampler=share, collate_fn=_alone)  # type: ignore


def evaluate(
    pipe: Any,
    contest: Contest,
    folder: str | Path,
    *,
    devices: int = 1,
    num_nodes: int = 1,
    accelerator: str = "auto",
    progress: Callable[[Progress], None] = lambda now: None,
    stop: Stop | None = None,
    **more: Any,
) -> list[Seen] | None:
    """`redi.evaluation.evaluate` on many devices: the same numbers, whatever their number.

    Every rank runs this, however the ranks were launched; with Lightning's own launcher the script that calls it is
    run again for each.

    Args:
        pipe: the pipeline, on the CPU; it is put on the rank's device.
        contest: what is compared on what.
        folder: where finished batches are kept; all ranks must see the same.
        devices: GPUs, or processes where there is none, on each node.
        num_nodes: nodes.
        accelerator: as the Trainer's argument.
        progress: told on rank 0, at the start and after every batch.
        stop: what ends the evaluation early; by default a SIGTERM.
        more: further arguments of the Trainer, e.g. a logger or a profiler.

    Returns:
        What was seen of each way, on every rank, for `Table.of`; None if it ended early. The same command goes on then.

    Raises:
        ReDiError: as `redi.enable` for a way of redi.
        KnowledgeBaseError: the folder cannot be written.
        RankError: another rank raised, or was lost.
    """
    module = Evaluation(pipe, contest, folder, progress=progress, stop=stop)
    runs = trainer(devices=devices, num_nodes=num_nodes, accelerator=accelerator, **more)
    predict(runs, module, ContestData())
    return module.seen


def _alone(batch: list[Batch]) -> Batch:
    return batch[0]
