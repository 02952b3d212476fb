"""How many processes share a command's work, on what, and how each of them loads the model."""

from __future__ import annotations

import argparse
import os
from typing import Any

from redi import launch
from redi.cli import models
from redi.errors import InvalidInputError


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of every command whose work can be shared."""
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto", help="what the ranks run on")
    parser.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="ranks per node: GPUs, or processes on CPUs (default: as launched, or 1)",
    )
    parser.add_argument("--num-nodes", type=int, metavar="M", help="nodes (default: as launched, or 1)")


def count(given: argparse.Namespace) -> tuple[int, int]:
    """Ranks per node, and nodes: as asked for, or as launched.

    Args:
        given: the parsed options, with the command's `prompts`.

    Raises:
        InvalidInputError: something else was launched than is asked for, or several ranks would read one input.
    """
    around, here = launch.launched(), launch.per_node()
    devices: int = given.devices or here or 1
    nodes: int = given.num_nodes or (around // devices if here else 1)
    if around > 1 and devices * nodes != around:
        raise InvalidInputError(
            f"this is one of {around} launched processes, but --devices {devices} and --num-nodes {nodes} make "
            f"{devices * nodes}; say how many there are on each node, and how many nodes"
        )
    if devices * nodes > 1 and given.prompts == "-":
        raise InvalidInputError("several ranks cannot share standard input; write the prompts to a file")
    return devices, nodes


def load(text: str, given: argparse.Namespace, dtype: str | None, *, by_lightning: bool) -> Any:
    """The pipeline of this name, where this process needs it.

    Args:
        text: as `models.load` takes it.
        given: the parsed options.
        dtype: of the weights; None is float16 on a GPU and float32 on a CPU.
        by_lightning: whether Lightning finds each rank's device.
    """
    import torch

    gpu = given.accelerator == "gpu" or (given.accelerator == "auto" and torch.cuda.is_available())
    where = given.device or ("cuda" if gpu else "cpu")
    if by_lightning and given.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(given.threads)  # or Lightning would share out the cores itself
    # ranks find their own device
    told = argparse.Namespace(device="cpu" if by_lightning else where, threads=given.threads)
    return models.load(text, told, dtype or ("float32" if where == "cpu" else "float16"))


def silent(done: int, total: int) -> None:
    """The bar of a rank that shows none."""
