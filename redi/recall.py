"""What was remembered for a batch of samples, and the clock that says what remembering cost."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor


@final
@dataclass(frozen=True)
class Recall:
    """What was remembered for a batch: neighbours, their weights, and which samples may leap.

    `taught` holds the corrections of those that may, leap by leap, from when they are combined to when they are taken.
    """

    ids: Int64[Tensor, "b k"]
    weights: Float32[Tensor, "b k"]
    distances: Float32[Tensor, "b k"]
    hit: Bool[Tensor, " b"]
    taught: dict[int, Float[Tensor, "h *s"]] = field(default_factory=dict[int, Tensor], compare=False, repr=False)

    @cached_property
    def hits(self) -> int:
        """How many samples may leap."""
        return int(self.hit.sum())

    def __getitem__(self, rows: Tensor) -> Recall:
        return Recall(self.ids[rows], self.weights[rows], self.distances[rows], self.hit[rows])

    def nearest(self) -> Recall:
        """The same, but a sample that missed leaps from its nearest row alone, if there is one."""
        alone = torch.zeros_like(self.weights)
        alone[:, 0] = 1.0
        return Recall(
            self.ids,
            torch.where(self.hit[:, None], self.weights, alone),
            self.distances,
            self.hit | (self.ids[:, 0] >= 0),
        )


@final
@dataclass
class Stopwatch:
    """Wall seconds by stage of one generation."""

    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def __call__(self, stage: str) -> _Timed:
        """Add the time of the block to a stage."""
        return _Timed(self.seconds, stage)


@final
@dataclass(slots=True)
class _Timed:
    """A block on the clock; a generator's context would cost as much as some of what is timed."""

    seconds: dict[str, float]
    stage: str
    start: float = 0.0

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + time.perf_counter() - self.start


def describe(recall: Recall, row: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """From which rows one sample of a recall leapt, and at which distances; nothing where it did not hit."""
    used = (recall.ids[row] >= 0) & recall.hit[row]
    return tuple(recall.ids[row][used].tolist()), tuple(recall.distances[row][used].tolist())
