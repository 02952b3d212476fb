"""Small worlds in which everything is known: denoisers with conditioning, and knowledge bases recorded in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from redi.guidance import guided
from redi.knowledge_base import Config, Fingerprint, KnowledgeBase, Writer
from redi.noise import NoiseBank
from redi.plan import Plan, Route
from redi.recorder import trajectory
from redi.solvers import DiffusersSolver
from redi.transports import needs
from redi.types import Record

SHAPE = (2, 4, 4)
D = 32


@dataclass
class Linear:
    """Model output A·x + B·c (plus a little t): trajectories from one noise are affine in c."""

    seed: int = 0
    calls: int = 0

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        self.a = torch.randn(D, D, generator=g) * 0.05
        self.b = torch.randn(D, 6, generator=g) * 0.5

    def __call__(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        self.calls += 1
        t = float(t) / 1000
        return (x.flatten(1) @ self.a.T * (0.5 + t) + c @ self.b.T).view_as(x) * 0.5


@dataclass
class Curved:
    """A nonlinear model whose output depends on sample, time and conditioning."""

    seed: int = 0
    calls: int = 0

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        self.a = torch.randn(D, D, generator=g) / D**0.5
        self.b = torch.randn(D, 6, generator=g) * 0.4

    def __call__(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        self.calls += 1
        h = x.flatten(1) @ self.a.T + c @ self.b.T + float(t) / 1000
        return torch.tanh(h).view_as(x)


@dataclass
class Guided:
    """A model guided away from what it says without a condition, and its calls counted in halves."""

    model: Linear | Curved
    scale: float = 3.0
    halves: int = 0

    def __call__(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return guided(self.unconditional(x, t, c), self.conditional(x, t, c), self.scale)

    def conditional(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        self.halves += len(x)
        return self.model(x, t, c)

    def unconditional(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return self.conditional(x, t, torch.zeros_like(c))


@dataclass
class World:
    kb: KnowledgeBase
    solver: DiffusersSolver
    model: Linear | Curved | Guided
    conditions: Tensor

    def noise(self, ids: Tensor) -> Tensor:
        return self.kb.bank.noise(ids)

    def fine(self, noise: Tensor, condition: Tensor, steps: int) -> Tensor:
        """x[N] of the fine run."""
        grid = self.solver.schedule(steps)
        everything = Record(samples=frozenset({grid.fine}))
        ids = torch.zeros(len(noise), dtype=torch.int64)
        names = [str(i) for i in range(len(noise))]
        return trajectory(
            self.model, noise, self.solver, steps, everything, noise_ids=ids, prompts=names, condition=condition
        )[0]


def mark_of(solver: DiffusersSolver, steps: int, guidance: float = 1.0) -> Fingerprint:
    """The settings of rows that no pipeline made."""
    return Fingerprint(
        model="toy",
        weights="0" * 16,
        adapters=(),
        pipeline="none",
        scheduler=solver.name,
        scheduler_config=dict(solver.config),
        steps=steps,
        guidance=guidance,
        guidance_rescale=0.0,
        negative_prompt="",
        height=None,
        width=None,
        dtype="float32",
        sample_shape=SHAPE,
    )


def world(
    folder: Path,
    solver: DiffusersSolver,
    plan: Plan,
    model: Linear | Curved | Guided,
    *,
    rows: int = 8,
    noises: int = 2,
    storage: str = "float32",
    diversity: float = 0.0,
) -> World:
    """Record `rows` conditions from every bank noise, each noise as one batch."""
    schedule = solver.schedule(plan.fine)
    record = needs(Route.lay(plan, schedule), solver)
    bank = NoiseBank(seed=3, size=noises, shape=SHAPE, diversity=diversity)
    conditions = torch.randn(rows, 6, generator=torch.Generator().manual_seed(11))
    scale, without = (model.scale, model.unconditional) if isinstance(model, Guided) else (1.0, None)
    config = Config(
        fingerprint=mark_of(solver, plan.fine, scale),
        record=record,
        noise=bank.to_json(),
        plans=(str(plan),),
        storage=storage,
    )
    with Writer.open(folder, config) as writer:
        for noise_id in range(noises):
            ids = torch.full((rows,), noise_id)
            names = [str(i) for i in range(rows)]
            _, found = trajectory(
                model,
                bank.noise(ids),
                solver,
                plan.fine,
                record,
                noise_ids=ids,
                prompts=names,
                condition=conditions,
                unconditional=without,
            )
            writer.append(found)
    return World(KnowledgeBase.open(folder), solver, model, conditions)
