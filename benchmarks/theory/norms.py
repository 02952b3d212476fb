"""Lipschitz constants of the bundled model along the fine solve, by power iteration in float32."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from benchmarks.bundled import GUIDANCE
from redi import theory, zoo
from redi.demo import embed
from redi.schedules import Grid
from redi.types import Rows

ENTRIES: Final = (0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 39)


@dataclass(frozen=True)
class Norms:
    """Constants at every entry but the end, interpolated between those that were measured.

    Args:
        measured: entry → list over pictures, by name: `L` and `mu` of D − x̄, `D` of D alone, `K`, by how much D differs
            for the nearest other prompt, in units of the difference at entry 0.
        clock: λ at every entry.
    """

    measured: dict[str, dict[int, list[float]]]
    clock: Tensor

    def at(self, name: str, reduce: Any) -> Tensor:
        """One number for each entry."""
        known = self.measured[name]
        return torch.from_numpy(np.interp(range(len(self.clock) - 1), list(known), [reduce(v) for v in known.values()]))

    def growth(self, rates: Tensor, start: int, stop: int, forcing: Tensor | None = None) -> float:
        """Of x̄: what an error of one at `start` becomes at `stop`; with forcing, what none becomes."""
        stop = min(stop, len(self.clock) - 2)  # the last step, to σ = 0, is D itself, whose norm there is `D`
        if stop <= start:
            return 1.0
        one = torch.tensor([1.0 if forcing is None else 0.0], dtype=torch.float64)
        over = slice(start, stop + 1)
        m = None if forcing is None else forcing[over]
        return float(theory.value_bound(one, rates[over], self.clock[over], m))


def measure(rows: Rows, grid: Grid, file: Path, pictures: int, *, quick: bool) -> Norms:
    """The constants at points of fine solves; what is in the file is read."""
    entries = ENTRIES[::5] if quick else ENTRIES
    if not file.exists():
        pipe = zoo.load("emoji")
        pipe.unet.requires_grad_(False)
        found: dict[str, dict[int, list[float]]] = {"L": {}, "mu": {}, "D": {}, "K": {}}
        near = _nearest(rows.denoised[0][:pictures].flatten(1))
        spread = (rows.denoised[0][:pictures] - rows.denoised[0][:pictures][near]).flatten(1).norm(dim=1)
        own = Guided(pipe, list(rows.prompts[:pictures]))
        other = Guided(pipe, [rows.prompts[i] for i in near.tolist()])
        for entry in tqdm(entries, desc="norms", unit="entry"):
            x = rows.samples[entry][:pictures].float() / float(grid.signal[entry])
            for name, value in _constants(own, other, grid, entry, x, quick=quick).items():
                found[name][entry] = (value / spread if name == "K" else value).tolist()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
    read = json.loads(file.read_text())
    measured = {name: {int(e): v for e, v in at.items()} for name, at in read.items()}
    return Norms(measured, theory.clock(grid))


class Guided:
    """The guided model in float32, differentiable twice."""

    def __init__(self, pipe: Any, prompts: Sequence[str]) -> None:
        said = embed(pipe, prompts)
        self.unet = pipe.unet
        self.states = torch.cat([said["negative_prompt_embeds"], said["prompt_embeds"]])

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The model's output, of unscaled samples; attention that is not fused can be differentiated twice."""
        with sdpa_kernel(SDPBackend.MATH):
            both = self.unet(torch.cat([x, x]), t, encoder_hidden_states=self.states, return_dict=False)[0]
        without, given = both.chunk(2)
        return without + GUIDANCE * (given - without)


def _constants(own: Guided, other: Guided, grid: Grid, entry: int, x: Tensor, *, quick: bool) -> dict[str, Tensor]:
    much: dict[str, Any] = {"tolerance": 1e-2 if quick else 1e-3, "iterations": 3 if quick else 40}
    f = theory.right_hand_side(own, grid, entry)
    with torch.no_grad():
        disagreement = (f(x) - theory.right_hand_side(other, grid, entry)(x)).flatten(1).norm(dim=1)

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    return {
        "L": theory.operator_norm(f, x, generator=seeded(), **much),
        "mu": theory.logarithmic_norm(f, x, generator=seeded(), **much),
        "D": theory.operator_norm(lambda x: f(x) + x, x, generator=seeded(), **much),
        "K": disagreement.double(),
    }


def _nearest(keys: Tensor) -> Tensor:
    return theory.nearest_pairs(keys, 1)[:, 1]
