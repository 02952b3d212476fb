"""What a launcher (torchrun, srun, Lightning's own) told this process about the others, before anything is imported."""

from __future__ import annotations

import os


def launched() -> int:
    """How many processes were launched for the work that this one is part of."""
    return max(_number(name, 1) for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))


def per_node() -> int | None:
    """How many of them run on this node, where the launcher says so."""
    return _number("LOCAL_WORLD_SIZE", 0) or None


def is_first() -> bool:
    """Whether this process is rank 0, or alone."""
    return not any(_number(name, 0) for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def _number(name: str, otherwise: int) -> int:
    said = os.environ.get(name, "")
    return int(said) if said.isdecimal() else otherwise
