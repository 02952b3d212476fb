"""The bundled model with rows and queries whose whole trajectories are kept: every jump and coarse plan is on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from benchmarks.paper.common import Made
from benchmarks.paper.settings import caption, spread
from benchmarks.paper.ways import Way
from benchmarks.quality import plain
from benchmarks.quality.lab import Lab, coarse
from redi import Affine, Defect, KnowledgeBase, Kriging, LeastSquares, Residual, Transport, Value, zoo
from redi.combiners import Combiner
from redi.types import Rows

KEYS: Final = (4, 8, 12, 16, 20)
GAPS: Final = (2, 4, 8, 12)
STEPS: Final = 40
PLANS: Final = {
    4: "at:0,12,19,25/40",
    5: "at:0,7,16,23,29/40",
    6: "at:0,6,12,18,24,30/40",
    8: "at:0,4,10,15,20,25,30,36/40",
    10: "coarse:10/40",
}
NEIGHBORS: Final = (1, 2, 4, 16)
SIZES: Final = (64, 256)  # and all
EVERY: Final = (f"coarse:{STEPS // 2}/{STEPS}", f"at:{','.join(map(str, (0, *range(1, STEPS, 2))))}/{STEPS}")
"""Two plans that together record every entry."""

AFTER: Final = 12_032
"""Train prompts from here on are in no knowledge base of a benchmark; on them bounds are calibrated."""

JUMPING: Final[dict[str, tuple[Transport, Combiner]]] = {
    "value": (Value(), LeastSquares()),  # as published
    "residual": (Residual(), Affine()),
    "defect, jump": (Defect(), Kriging()),
}
CORRECTED: Final = "defect, every step"


@dataclass(frozen=True)
class Cell:
    """One point of the ablation.

    Args:
        transport: name of the series.
        start: k, entry of the key; 0 for a corrected plan.
        stop: v, entry of the value; the end for a corrected plan.
        neighbors: H.
        rows: prompts of the knowledge base.
        way: how it is sampled.
    """

    transport: str
    start: int
    stop: int
    neighbors: int
    rows: int
    way: Way

    @property
    def name(self) -> str:
        """For readers."""
        return f"{self.transport} {self.way.plan} H={self.neighbors} rows={self.rows}"


class TheoryWorld(Lab):
    """Rows, prompts to calibrate on, and prompts to test on."""

    @property
    def sizes(self) -> list[int]:
        """Prompts of the knowledge bases that are compared."""
        return [n for n in ((4,) if self.settings.quick else SIZES) if n < self.settings.rows] + [self.settings.rows]

    @property
    def jumps(self) -> list[tuple[int, int]]:
        """(k, v) of every jump."""
        some = [(k, k + g) for k in KEYS for g in GAPS]
        return some[5:11:5] if self.settings.quick else some

    @property
    def neighbors(self) -> tuple[int, ...]:
        """Every H."""
        return (1, 4) if self.settings.quick else NEIGHBORS

    def cells(self) -> list[Cell]:
        """The ablation."""
        found: list[Cell] = []
        for most in self.sizes:
            size = None if most == self.settings.rows else most
            for h in self.neighbors:
                for name, (transport, combiner) in JUMPING.items():
                    for k, v in self.jumps:
                        plan = f"jump:{k}:{v}/{STEPS}"
                        way = Way(name, plain.FINE, STEPS, "rows", plan, transport, combiner, h, most=size)
                        found.append(Cell(name, k, v, h, most, way))
                for calls in (4, 8) if self.settings.quick else PLANS:
                    way = Way(CORRECTED, coarse(calls), STEPS, "rows", PLANS[calls], Defect(), Kriging(), h, most=size)
                    found.append(Cell(CORRECTED, 0, STEPS, h, most, way))
        return found

    def sampled(self) -> list[Cell]:
        """Those that are run to the end: every corrected plan, and the corners of the jumps."""
        corners = {(k, k + g) for k in (8, 16) for g in (4, 12)}
        return [
            c
            for c in self.cells()
            if self.settings.quick
            or c.transport == CORRECTED
            or ((c.start, c.stop) in corners and c.neighbors in (1, 16) and c.rows != 256)
        ]

    def trajectories(self, name: str, prompts: Sequence[str]) -> KnowledgeBase:
        """Whole trajectories of these prompts, with the history that jumps need."""
        return self.build(
            name, plain.FINE, [*EVERY, *(f"jump:{k}:{k + g}/{STEPS}" for k in KEYS for g in GAPS)], prompts
        )

    @cached_property
    def fresh(self) -> list[str]:
        """Train prompts that are in no row."""
        return spread(zoo.prompts("emoji", "train")[AFTER:], self.settings.queries)

    @cached_property
    def rows_kb(self) -> KnowledgeBase:
        """The knowledge base."""
        return self.trajectories("rows", zoo.prompts("emoji", "train")[: self.settings.rows])

    @cached_property
    def asked(self) -> tuple[Rows, list[str], int]:
        """Trajectories of all queries; their captions; how many of them, at the beginning, are for calibration."""
        found = [self.trajectories("fresh", self.fresh), self.trajectories("heldout", self.queries)]
        rows = [kb.gather(torch.arange(len(kb))) for kb in found]
        both = Rows(
            *(
                {e: torch.cat([getattr(r, part)[e] for r in rows]).float() for e in getattr(rows[0], part)}
                for part in ("samples", "denoised")
            ),
            {
                e: {n: torch.cat([r.history[e][n] for r in rows]).float() for n in leaves}
                for e, leaves in rows[0].history.items()
            },
            torch.cat([r.noise_ids for r in rows]),
            torch.cat([r.embeddings for r in rows]),
            [p for r in rows for p in r.prompts],
        )
        return both, [caption(p) for p in both.prompts], len(found[0])

    def ends(self, cells: Sequence[Cell], calibrate: int, test: int) -> tuple[Tensor, int]:
        """Latent error of each cell at the end, (cells, queries): those for calibration first, and their number."""
        prompts = [*self.fresh[:calibrate], *self.queries[:test]]
        reference, *made = self.sample(
            [Way("fine", plain.FINE, STEPS), *(c.way for c in cells)], {"rows": self.rows_kb}, prompts
        )

        def ordered(m: Made) -> Tensor:
            x = m.latents.double()
            return torch.cat([x[:, :calibrate].flatten(0, 1), x[:, calibrate:].flatten(0, 1)]).flatten(1)

        errors = torch.stack([(ordered(m) - ordered(reference)).norm(dim=1) for m in made])
        return errors, calibrate * self.settings.noises
