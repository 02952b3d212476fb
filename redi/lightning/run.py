"""A build with Lightning in one call."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

from redi.builder import Progress
from redi.knowledge_base import KnowledgeBase
from redi.lightning.data import PromptData
from redi.lightning.module import KnowledgeBaseBuilder
from redi.lightning.writer import ShardWriter
from redi.recipe import Recipe
from redi.stop import Stop


def trainer(
    *callbacks: Callback, devices: int = 1, num_nodes: int = 1, accelerator: str = "auto", **more: Any
) -> Trainer:
    """A Trainer for predict loops whose ranks share out the work themselves.

    Args:
        callbacks: for builds, a ShardWriter.
        devices: GPUs, or processes where there is none, on each node.
        num_nodes: nodes.
        accelerator: as the Trainer's argument.
        more: further arguments of the Trainer, e.g. a logger or a profiler.
    """
    given: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "use_distributed_sampler": False,
    }
    if devices * num_nodes > 1:
        given["strategy"] = DDPStrategy(process_group_backend="gloo")  # ranks exchange words, no tensors
    if SLURMEnvironment.detect():
        given["plugins"] = [SLURMEnvironment(auto_requeue=False)]  # there is no checkpoint to save: rows are
    given |= {"accelerator": accelerator, "devices": devices, "num_nodes": num_nodes, **more}
    given["callbacks"] = [*callbacks, *more.get("callbacks", ())]
    return Trainer(**given)


def build(
    pipe: Any,
    recipe: Recipe,
    data: PromptData,
    folder: str | Path,
    *,
    devices: int = 1,
    num_nodes: int = 1,
    accelerator: str = "auto",
    shard_rows: int = 256,
    progress: Callable[[Progress], None] | None = None,
    stop: Stop | None = None,
    **more: Any,
) -> KnowledgeBase:
    """`redi.build` on many devices: the same rows, whatever their number, and continued by any other number.

    Every rank runs this, however the ranks were launched; with Lightning's own launcher the script that calls it is
    run again for each.

    Args:
        pipe: a diffusers pipeline on the CPU; it is put on the rank's device.
        recipe: `Recipe.of(pipe, …)`.
        data: the prompts.
        folder: where the knowledge base goes; all ranks must see the same.
        devices: GPUs, or processes where there is none, on each node.
        num_nodes: nodes.
        accelerator: as the Trainer's argument.
        shard_rows: rows of a full shard; what a crash can lose, per rank.
        progress: told on rank 0, at the start and after every batch.
        stop: what ends the build early; by default a SIGTERM.
        more: further arguments of the Trainer.

    Returns:
        The knowledge base, opened.

    Raises:
        InvalidInputError: arguments that cannot work.
        KnowledgeBaseError: the folder cannot be written, or is being written.
        RankError: another rank raised, or was lost.
    """
    writer = ShardWriter(folder, shard_rows, progress=progress, stop=stop)
    runs = trainer(writer, devices=devices, num_nodes=num_nodes, accelerator=accelerator, **more)
    predict(runs, KnowledgeBaseBuilder(pipe, recipe), data)
    return KnowledgeBase.open(folder)


def predict(runs: Trainer, module: LightningModule, data: LightningDataModule) -> None:
    """Run a predict loop that hands out texts, without warnings of what is meant.

    Raises:
        KeyboardInterrupt: Ctrl-C, which Lightning makes an exit code.
    """
    with warnings.catch_warnings():
        # no workers are needed to hand out texts, and shares may be empty
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*Total length of.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning's own, with torch 2.13
        try:
            runs.predict(module, datamodule=data, return_predictions=False)
        except SystemExit:
            if runs.interrupted:
                raise KeyboardInterrupt from None
            raise


def hush() -> None:
    """Keep Lightning's notices of what it found and how it is set up out of our output."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
