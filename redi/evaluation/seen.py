"""What is seen of a way's pictures, and its torchmetrics state: the same numbers however many processes saw them.

Everything is kept picture by picture and put in order before it is used, so sums do not depend on who saw what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from redi.errors import MissingExtraError

try:
    from torchmetrics import Metric
    from torchmetrics.utilities import dim_zero_cat
except ImportError:  # pragma: no cover
    raise MissingExtraError("torchmetrics", "eval") from None

MEASURES: Final = ("nfe", "leapt", "latent_error", "at_value", "l2", "ssim", "lpips", "score")
"""Of each picture: model calls made; whether neighbours taught anything; L2 distances to the fine solve of the latents
at the end and where a jump arrives; root mean square difference of the pixels; SSIM; LPIPS; cosine of picture and
prompt. NaN where there is none."""
STAGES: Final = ("total", "model", "solver", "retrieval", "gather", "combine")
"""Of the denoising loop, from the first model call to the last step; of the rest there is no more than overhead."""


@final
@dataclass(frozen=True, eq=False)
class Seen:
    """One way's pictures.

    Args:
        measures: a column for each of `MEASURES`.
        features: what a Fréchet distance is measured on.
        seconds: of each batch a row: wall seconds by `STAGES`, divided by the batch's pictures.
    """

    measures: Float64[Tensor, "n measures"]
    features: Float32[Tensor, "n d"]
    seconds: Float64[Tensor, "batches stages"]

    def of(self, measure: str) -> Float64[Tensor, " n"]:
        """One column of the measures."""
        return self.measures[:, MEASURES.index(measure)]

    @property
    def median_seconds(self) -> Mapping[str, float]:
        """Stage → seconds per picture, the median over batches."""
        return dict(zip(STAGES, self.seconds.median(0).values.tolist(), strict=True))


@final
class SeenState(Metric):
    """Collects what is seen of one way, batch by batch, on any number of processes.

    Args:
        gather: what every process brings, in their order; None is one process alone.
    """

    full_state_update: bool | None = False
    pictures: list[Tensor]
    clocks: list[Tensor]

    def __init__(self, gather: Callable[[Tensor], Sequence[Tensor]] | None = None) -> None:
        more: dict[str, Any] = {}
        if gather is not None:
            more = {"dist_sync_fn": lambda x, group=None: [*gather(x)], "distributed_available_fn": lambda: True}  # pyright: ignore[reportUnknownLambdaType]
        super().__init__(compute_with_cache=False, **more)
        self.add_state("pictures", [], dist_reduce_fx="cat")
        self.add_state("clocks", [], dist_reduce_fx="cat")

    def update(self, first: int, seen: Seen) -> None:
        """Take a batch.

        Args:
            first: place of its first picture among all.
            seen: what was seen of it; of none, to say how wide its features are.
        """
        at = torch.arange(first, first + len(seen.measures), dtype=torch.float64)[:, None]
        self.pictures.append(torch.cat([at, seen.measures, seen.features.double()], 1))
        self.clocks.append(torch.cat([at[: len(seen.seconds)], seen.seconds], 1))

    def compute(self) -> dict[str, Tensor]:
        """All pictures, of all processes, in their order: the fields of `Seen`, in which torchmetrics would meddle."""
        pictures, clocks = (_in_order(dim_zero_cat(x)) for x in (self.pictures, self.clocks))
        k = len(MEASURES)
        return {"measures": pictures[:, :k], "features": pictures[:, k:].float(), "seconds": clocks}

    @property
    def width(self) -> int:
        """Of the features seen so far; 0 where there are none."""
        return self.pictures[0].shape[1] - 1 - len(MEASURES) if self.pictures else 0

    @property
    def seen(self) -> Seen:
        """The same."""
        return Seen(**self.compute())


def nothing(width: int) -> Seen:
    """What a process brings that saw no batch."""
    return Seen(
        torch.zeros(0, len(MEASURES), dtype=torch.float64),
        torch.zeros(0, width),
        torch.zeros(0, len(STAGES), dtype=torch.float64),
    )


def _in_order(x: Float64[Tensor, "n columns"]) -> Float64[Tensor, "n rest"]:
    return x[x[:, 0].argsort(), 1:]
