"""The work of a build: every prompt from every noise, but for the rows that are there, in equal shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, DistributedSampler

from redi import prompts as prompt_files
from redi.errors import InvalidInputError
from redi.lightning.module import KnowledgeBaseBuilder
from redi.lightning.writer import ShardWriter
from redi.recipe import Item


@final
class PromptData(LightningDataModule):
    """Prompts from a file or a list. Rank 0 alone reads them; all ranks work on what it found.

    Args:
        prompts: a file as `redi.prompts.read` takes it (txt, tsv, csv, json, COCO captions, jsonl, parquet), or texts.
        batch_size: pictures solved together; halved where the memory does not suffice.
        column: which column or field of a file holds the prompt; None finds the usual names.
        suffix: put behind every prompt, e.g. ", watercolour".
        limit: how many prompts to take.
        model: for the bundled model's own lists.
        note: told what was dropped.
    """

    def __init__(
        self,
        prompts: str | Path | Iterable[str],
        batch_size: int = 16,
        *,
        column: str | None = None,
        suffix: str = "",
        limit: int | None = None,
        model: str = "",
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise InvalidInputError(f"batch_size must be at least 1, given {batch_size}")
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.batch_size = batch_size
        self._prompts = prompts
        self._reading: dict[str, Any] = {
            "column": column,
            "suffix": suffix,
            "limit": limit,
            "model": model,
            "note": note,
        }

    def read(self) -> list[str]:
        """The prompts, each once."""
        if isinstance(self._prompts, (str, Path)):
            return prompt_files.read(str(self._prompts), **self._reading)
        kept = list(dict.fromkeys(self._prompts))[: self._reading["limit"]]
        return [prompt + self._reading["suffix"] for prompt in kept]

    def predict_dataloader(self) -> DataLoader[Item]:
        """This rank's share of what is to be done.

        Raises:
            InvalidInputError: the Trainer has no ShardWriter, or its module is no KnowledgeBaseBuilder.
        """
        trainer = self.trainer
        assert trainer is not None
        builder: Any = trainer.lightning_module
        writer = next((c for c in trainer.callbacks if isinstance(c, ShardWriter)), None)  # type: ignore
        if writer is None or not isinstance(builder, KnowledgeBaseBuilder):
            raise InvalidInputError(
                "PromptData feeds a KnowledgeBaseBuilder, and asks a ShardWriter what is done already: "
                "Trainer(callbacks=[ShardWriter(kb)]).predict(KnowledgeBaseBuilder(pipe, recipe), PromptData(prompts))"
            )
        todo = writer.remaining(trainer, lambda: builder.recipe.items(self.read()))
        share = Share(todo, trainer.global_rank, trainer.world_size, writer.stop)
        # by name: Lightning makes it anew, and would pass a second batch size
        return DataLoader(todo, batch_size=self.batch_size, sampler=share, collate_fn=_as_it_is)  # type: ignore


@final
class Share(DistributedSampler[int]):
    """One of equal shares, in one piece, because a prompt's noises follow each other; it ends when it is told to stop.

    It is a DistributedSampler so that Lightning, whatever `use_distributed_sampler` says, does not divide it again.
    """

    def __init__(self, items: Sequence[object], rank: int, ranks: int, stop: Callable[[], bool]) -> None:
        super().__init__(items, ranks, rank, shuffle=False)  # type: ignore
        self._range = range(len(items) * rank // ranks, len(items) * (rank + 1) // ranks)
        self._stop = stop

    def __iter__(self) -> Iterator[int]:
        for i in self._range:
            if self._stop():
                return
            yield i

    def __len__(self) -> int:
        return len(self._range)


def _as_it_is(batch: list[Item]) -> list[Item]:
    return batch
