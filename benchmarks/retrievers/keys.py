"""A set of keys that is searched, and the queries it is searched with. How they came about is in `data.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy import ndarray

from benchmarks.retrievers.world import World


@final
@dataclass(frozen=True)
class Data:
    """Keys and queries of one kind.

    Args:
        name: "denoised@0", "sample@10", "4x64x64".
        synthetic: not from a model.
        file: keys as .npy, or a `World` that makes them.
        queries: file of held-out queries, float32.
        rows: how many keys there can be.
        dimension: of a key.
    """

    name: str
    synthetic: bool
    file: Path
    queries: Path
    rows: int
    dimension: int

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Data:
        """From JSON."""
        return cls(**dict(said) | {name: Path(said[name]) for name in ("file", "queries")})

    def open(self, rows: int) -> Keys:
        """The first rows of it."""
        if self.file.suffix == ".npz":
            return Keys(None, World.load(self.file).of(rows))
        return Keys(np.load(self.file, mmap_mode="r")[:rows], None)


@final
@dataclass(frozen=True)
class Keys:
    """Keys in a memory map, or made as they are asked for."""

    array: ndarray | None
    world: World | None

    def fetch(self, ids: ndarray) -> ndarray:
        """Rows of these ids."""
        source: Any = self.world if self.array is None else self.array
        return source[ids]

    def chunks(self) -> Iterator[ndarray]:
        """All rows in order."""
        if self.array is None:
            assert self.world is not None
            yield from self.world.chunks()
        else:
            for start in range(0, len(self.array), 1024):
                yield self.array[start : start + 1024]
