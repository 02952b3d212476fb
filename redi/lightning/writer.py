"""Where a build's rows go: every rank writes shards of its own, rank 0 lists them when all have arrived."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from redi.builder import Progress
from redi.errors import InvalidInputError, KnowledgeBaseError
from redi.knowledge_base import Refusal, Writer
from redi.launch import launched
from redi.lightning.module import KnowledgeBaseBuilder
from redi.lightning.ranks import Ranks
from redi.recipe import Item
from redi.stop import Stop
from redi.types import Rows


@final
class ShardWriter(BasePredictionWriter):
    """Writes a KnowledgeBaseBuilder's rows into a folder, which it continues if it holds rows of the same recipe.

    SIGTERM ends the build after the batch in hand: what is done is written and listed, and the run ends well.

    Args:
        folder: the knowledge base; all ranks must see the same.
        shard_rows: rows of a full shard; what a crash can lose, per rank.
        progress: told on rank 0, at the start and after every batch; shares are equal, so its own stands for all.
        stop: what ends the build early; by default a SIGTERM.

    Attributes:
        refused: when the build has ended, rows of any rank that were not finite and so not written.
        complete: when the build has ended, whether every row is there or refused.
    """

    def __init__(
        self,
        folder: str | Path,
        shard_rows: int = 256,
        *,
        progress: Callable[[Progress], None] | None = None,
        stop: Stop | None = None,
    ) -> None:
        super().__init__("batch")
        self.folder, self.shard_rows = Path(folder), shard_rows
        self.stop = stop or Stop()
        self.refused: tuple[Refusal, ...] = ()
        self.complete = False
        self._progress = progress
        self._writer: Writer | None = None
        self._ranks = Ranks(0, 1)
        self._todo: list[Item] = []
        self._total = self._solved = 0
        self._began = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the folder: rank 0 first, then the others beside it.

        Raises:
            InvalidInputError: more processes were launched than the Trainer knows, or it runs another module, or in
                another precision.
            KnowledgeBaseError: as `Writer.open` and `Writer.join`.
            RankError: another rank raised.
        """
        super().setup(trainer, pl_module, stage)
        if (others := launched()) > trainer.world_size:
            raise InvalidInputError(
                f"{others} processes were launched, and this Trainer knows of {trainer.world_size}: every one of them "
                f"would build all of it; give Trainer devices × num_nodes = {others}"
            )
        if not isinstance(pl_module, KnowledgeBaseBuilder):
            raise InvalidInputError(f"expected a KnowledgeBaseBuilder, given {type(pl_module).__name__}")
        pl_module.require(trainer)
        config, self._began = pl_module.recipe.config, time.monotonic()
        ranks = self._ranks = Ranks(trainer.global_rank, trainer.world_size)

        def begin() -> Any:
            self._writer = Writer.open(self.folder, config, self.shard_rows, ranks=ranks.count)
            return self._writer.ticket()

        def join() -> None:
            if self._writer is None:
                self._writer = Writer.join(self.folder, config, ticket, ranks.rank, ranks.count, self.shard_rows)

        ticket = ranks.of_first(begin)
        ranks.together(join)

    def remaining(self, trainer: Trainer, items: Callable[[], Sequence[Item]]) -> list[Item]:
        """The work that is left, the same on every rank. From here on a signal ends it early.

        Args:
            trainer: the Trainer that runs.
            items: the whole work; asked on rank 0.
        """
        writer = self._open()

        def look() -> tuple[list[Item], int]:
            every, done = items(), writer.done
            return [item for item in every if item not in done], len(every)

        self._todo, self._total = self._ranks.of_first(look)
        self._solved = 0
        if (launcher := trainer.strategy.launcher) is not None and hasattr(launcher, "kill"):
            self.stop.passed_on = launcher.kill  # those that this process started are told by it
        self.stop.listen()  # in the place of Lightning's own handler, which waits for other ranks inside the handler
        self._tell(trainer, pl_module=None)
        return self._todo

    def on_predict_batch_start(self, *_: Any, **__: Any) -> None:
        """Leave if rank 0 has: nobody would list what follows."""
        self._open().require_first()

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: list[Rows],
        batch_indices: Sequence[int] | None,
        batch: list[Item],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Take a batch's rows."""
        for rows in prediction:
            self._open().append(rows)
        self._solved += len(batch)
        self._tell(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait for all ranks, then let rank 0 list what they wrote.

        Raises:
            KnowledgeBaseError: the disk refused, or rows are neither there nor refused.
            RankError: another rank raised, or was lost.
        """
        if self._writer is None:
            return
        writer, ranks = self._writer, self._ranks
        ranks.together(writer.flush)
        written = [name for names in ranks.gathered(tuple(writer.written)) for name in names]
        self.refused = tuple(r for refused in ranks.gathered(writer.refused) for r in refused)
        ended_early = any(ranks.gathered(self.stop())) or trainer.limit_predict_batches != 1.0

        def conclude() -> bool:
            writer.list_finished(written)
            settled = writer.done | {(r.prompt, r.noise_id) for r in self.refused}
            missing = [item for item in self._todo if item not in settled]
            if missing and not ended_early:
                raise KnowledgeBaseError(
                    f"{self.folder}: {len(missing)} rows were neither written nor refused, the first of them "
                    f"{missing[0]}; run the same build again"
                )
            return not missing

        self.complete = ranks.of_first(conclude)
        self._writer = None
        writer.close()
        self._tell(trainer, pl_module)
        ranks.part()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the rows taken so far."""
        if self._writer is not None:
            self._writer.__exit__(type(exception), exception, exception.__traceback__)
            self._writer = None

    def _open(self) -> Writer:
        if self._writer is None:
            raise InvalidInputError("this ShardWriter has not been set up; hand it to a Trainer as a callback")
        return self._writer

    def _tell(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        left, seconds = len(self._todo), time.monotonic() - self._began
        share = min(left, self._solved * trainer.world_size)
        most = pl_module.solve.most if pl_module is not None else None
        refused = self._writer.refused if self._writer is not None else self.refused
        if self._progress is not None:
            self._progress(Progress(self._total - left + share, self._total, seconds, refused, most))
        for logger in trainer.loggers:
            logger.log_metrics({"rows": self._total - left + share, "rows_per_second": share / seconds}, self._solved)
