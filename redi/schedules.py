"""The grid a solver walks: a(t), s(t) at every entry, and model output ↔ denoised for every prediction type.

Every sample obeys x[i] = a[i]·x0 + s[i]·noise. Variance-preserving solvers have a² + s² = 1, σ-space solvers a = 1,
flow solvers a + s = 1; nothing below needs to know which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from redi.errors import InvalidInputError, PlanError

Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]


@final
@dataclass(frozen=True, slots=True)
class Timetable:
    """What a pipeline tells its scheduler of the fine schedule besides the number of steps.

    Args:
        sigmas: noise levels before the scheduler's shift, one for each step; none leaves them to the scheduler.
        mu: shift of a schedule that goes by the picture's size.
        begin: steps left out at the beginning, where a pipeline starts from a picture.
    """

    sigmas: tuple[float, ...] = ()
    mu: float | None = None
    begin: int = 0

    def to_json(self) -> dict[str, list[float] | float | int]:
        """What was told, fit for JSON; empty for a schedule that the number of steps makes alone."""
        said: dict[str, list[float] | float | int | None] = {
            "sigmas": list(self.sigmas),
            "mu": self.mu,
            "begin": self.begin,
        }
        return {name: value for name, value in said.items() if value is not None and value not in ([], 0)}


PLAIN: Final = Timetable()
"""The number of steps and nothing else."""


@final
@dataclass(frozen=True, eq=False)
class Grid:
    """The schedule of a solver, or a subset of one.

    Args:
        steps: solver steps of the fine schedule (the argument of `set_timesteps`).
        entries: fine entry of each of the m grid points, and the fine schedule's length N last.
        timesteps: (m,) what the model is told at each point.
        signal: (m + 1,) float64, a at each point and at the end.
        noise: (m + 1,) float64, s at each point and at the end.
        prediction: what the model's output means.
        scales_input: whether the model sees x / √(a² + s²) (σ-space solvers) or x itself.
        initial_scale: factor from unit noise to x[0].
        boundaries: entry at which each solver step begins, and N last; None where a leap may not begin or end.
        timetable: how the fine schedule is made.
    """

    steps: int
    entries: tuple[int, ...]
    timesteps: Tensor
    signal: Float[Tensor, " p"]
    noise: Float[Tensor, " p"]
    prediction: Prediction
    scales_input: bool
    initial_scale: float
    boundaries: tuple[int | None, ...]
    timetable: Timetable = PLAIN

    def __len__(self) -> int:
        """Number of model calls that a plain walk over this grid makes."""
        return len(self.entries) - 1

    @property
    def fine(self) -> int:
        """N, the number of entries of the fine schedule."""
        return self.entries[-1]

    @property
    def is_fine(self) -> bool:
        """Whether this is the whole schedule."""
        return len(self) == self.fine and not self.timetable.begin

    def meets(self, other: Grid) -> bool:
        """Whether two schedules pass the same noise levels at the same timesteps; they may end at different ones."""
        levels = ((self.signal, other.signal), (self.noise, other.noise))
        return torch.equal(self.timesteps.cpu(), other.timesteps.cpu()) and all(
            torch.allclose(a[:-1], b[:-1]) for a, b in levels
        )

    def subset(self, entries: Sequence[int]) -> Grid:
        """The same schedule at fewer points: `entries` are fine entries, ascending, without the end N."""
        position = {entry: i for i, entry in enumerate(self.entries)}
        unknown = [e for e in entries if e not in position or e == self.fine]
        if unknown or not entries or list(entries) != sorted(set(entries)):
            raise PlanError(f"entries {list(entries)} are not an ascending subset of this grid's {self.entries[:-1]}")
        at = torch.tensor([position[e] for e in entries])
        with_end = torch.tensor([*at.tolist(), len(self)])
        return replace(
            self,
            entries=(*entries, self.fine),
            timesteps=self.timesteps[at],
            signal=self.signal[with_end],
            noise=self.noise[with_end],
        )

    def tail(self, begin: int) -> Grid:
        """What is left of a schedule without its first `begin` entries, as a fine schedule of its own.

        Raises:
            PlanError: nothing is left, or a solver step would be cut.
        """
        if begin == 0:
            return self
        if not 0 < begin < len(self) or self.boundaries != tuple(range(len(self) + 1)):
            raise PlanError(
                f"a schedule of {self.steps} steps and {len(self)} calls cannot begin at step {begin}; a solver that "
                "calls the model once in each step (DDIM, Euler, DPM-Solver++ multistep, UniPC) can, before its end"
            )
        rest = len(self) - begin
        return replace(
            self,
            steps=rest,
            entries=tuple(range(rest + 1)),
            timesteps=self.timesteps[begin:],
            signal=self.signal[begin:],
            noise=self.noise[begin:],
            boundaries=tuple(range(rest + 1)),
            timetable=replace(self.timetable, begin=self.timetable.begin + begin),
        )

    def denoised(
        self, model_output: Float[Tensor, "b *s"], sample: Float[Tensor, "b *s"], at: int
    ) -> Float[Tensor, "b *s"]:
        """x̂0 from the model's output at grid point `at` (float32 or the input's precision, whichever is higher).

        Args:
            model_output: what the model returned (after guidance).
            sample: x at that point, unscaled.
            at: position in this grid, 0 … m − 1.
        """
        a, s = float(self.signal[at]), float(self.noise[at])
        r = (a * a + s * s) ** 0.5
        x, m = _upcast(sample), _upcast(model_output)
        match self.prediction:
            case "epsilon":
                return (x - s * m) / a
            case "v_prediction":  # Salimans & Ho 2022, on x / r
                return (a / r**2) * x - (s / r) * m
            case "sample":
                return m
            case "flow_prediction":  # m = noise − x0, a + s = 1
                return x - s * m

    def model_output(
        self, denoised: Float[Tensor, "b *s"], sample: Float[Tensor, "b *s"], at: int
    ) -> Float[Tensor, "b *s"]:
        """The model output that `denoised` came from: the inverse of `Grid.denoised` at the same point."""
        a, s = float(self.signal[at]), float(self.noise[at])
        r = (a * a + s * s) ** 0.5
        x, d = _upcast(sample), _upcast(denoised)
        match self.prediction:
            case "epsilon":
                return (x - a * d) / s
            case "v_prediction":
                return ((a / r**2) * x - d) * (r / s)
            case "sample":
                return d
            case "flow_prediction":
                return (x - d) / s

    def scale_input(self, sample: Float[Tensor, "b *s"], at: int) -> Float[Tensor, "b *s"]:
        """What the model is shown at grid point `at`."""
        if not self.scales_input:
            return sample
        # in float32, as diffusers scales: our loop and a pipeline's then agree to the bit
        a, s = self.signal[at].float(), self.noise[at].float()
        return sample / (s**2 + a**2) ** 0.5


def _upcast(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise InvalidInputError(f"expected a floating-point tensor, given {x.dtype}")
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
