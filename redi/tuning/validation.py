"""What is really saved of the plain solver's error on prompts the knowledge base does not hold: measured by the model.

Fitted on one half of them, judged on the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from jaxtyping import Float64
from torch import Tensor

from redi.engine import ReDiEngine
from redi.errors import InvalidInputError
from redi.gate import NOBODY, Gate, Trust
from redi.knowledge_base import KnowledgeBase
from redi.look import look
from redi.metrics import latent_errors
from redi.recipe import FineSolver, Item, Recipe, quiet, run_of
from redi.scheduler import disable, enable, report
from redi.solvers import DiffusersSolver
from redi.tuning.curves import LEVEL, at_least, stretched
from redi.tuning.left_out import fractions

LEAST: Final = 8
"""Prompts: half of them are fitted on."""
_LEAST_EXPECTED: Final = 0.01
"""An error of none cannot be stretched to one that was measured."""


@final
@dataclass(frozen=True)
class Held:
    """What the model made of prompts that are held out, one number for each.

    Args:
        distance: L2, to the nearest key.
        error: to the fine run, as a fraction of the same plan's without neighbours.
    """

    distance: Float64[Tensor, " n"]
    error: Float64[Tensor, " n"]

    def calibrate(self, trust: Trust) -> tuple[Trust, dict[str, float]]:
        """Curves stretched to what was measured, and how well that holds where it was not fitted.

        Every other sample is fitted on, and only those that took something of their corrections: the others are the
        plain solver's, as is known without a model.
        """
        measured = float(self.error.mean())
        said = {"prompts": float(len(self.error)), "measured": measured}
        believed = trust.scales(self.distance[:, None]) > 0
        even = torch.arange(len(believed)) % 2 == 0
        fitted, judged = believed & even, believed & ~even
        if not (fitted.any() and judged.any()):
            return dataclasses.replace(trust, average=measured), said
        trust = at_least(trust, _LEAST_EXPECTED)
        expected, bound = trust.errors(self.distance[:, None]), trust.errors(self.distance[:, None], bound=True)
        error = float(self.error[fitted].mean() / expected[fitted].mean())
        highest = float(torch.quantile(self.error[fitted] / bound[fitted], LEVEL, interpolation="higher"))
        within = self.error[judged] <= highest * bound[judged]
        return stretched(trust, error, highest, measured), said | {
            "expected": float((error * expected[judged]).mean()),
            "measured_where_judged": float(self.error[judged].mean()),
            "coverage": float(within.double().mean()),
            "stretch": error,
        }


def unseen(pipe: Any, kb: KnowledgeBase, prompts: Sequence[str]) -> list[str]:
    """The prompts, each once, if they can be judged on.

    Raises:
        InvalidInputError: too few prompts, prompts that the knowledge base holds, or a pipeline that is given pictures.
        ReDiError: as `redi.enable`.
    """
    if isinstance(prompts, str):
        raise InvalidInputError(f"expected a list of prompts, given one text: {prompts!r}")
    texts = list(dict.fromkeys(prompts))
    if known := set(texts) & set(kb.prompts):
        raise InvalidInputError(
            f"{len(known)} of {len(texts)} prompts are the knowledge base's own, whose errors say nothing of others: "
            f"{min(known)!r}; give prompts that it does not hold"
        )
    if len(texts) < LEAST:
        raise InvalidInputError(f"at least {LEAST} prompts are needed, half to fit on, given {len(texts)}")
    mark = kb.fingerprint
    solver = DiffusersSolver.from_config(mark.scheduler, mark.scheduler_config)
    look(pipe, solver.scheduler(), run_of(pipe, mark, texts[:1], mark.steps))
    enable(pipe, kb)  # it names whatever is not as the rows were made
    disable(pipe)
    return texts


def held_out(
    pipe: Any,
    engines: Sequence[ReDiEngine],
    prompts: Sequence[str],
    *,
    batch_size: int = 16,
    progress: Callable[[int], None] = lambda pictures: None,
) -> list[Held]:
    """Run prompts finely, and by each engine with and without its neighbours.

    Args:
        pipe: the pipeline that the knowledge base was built with; it is left as it was.
        engines: of coarse plans of one knowledge base.
        prompts: what `unseen` let through; each from one noise, in turn.
        batch_size: pictures per pipeline call.
        progress: told after every batch how many prompts it had.

    Raises:
        ReDiError: as `redi.enable`.
    """
    kb = engines[0].knowledge_base
    mark = kb.fingerprint
    fine = FineSolver(pipe, Recipe(DiffusersSolver.from_config(mark.scheduler, mark.scheduler_config), kb.config))
    noises = kb.noise_ids.unique().tolist()
    # of two prompts of one noise one is fitted on, and the other judged
    items: list[Item] = [(p, noises[i // 2 % len(noises)]) for i, p in enumerate(prompts)]
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in engines]
    for some in _batches(items, batch_size):
        end = torch.cat([rows.samples[kb.record.last] for rows in fine(some)]).float()
        for engine, kept in zip(engines, found, strict=True):
            plain, _ = _run(pipe, engine, Gate(trust=NOBODY), some)
            served, distance = _run(pipe, engine, engine.gate, some)
            kept.append((distance, latent_errors(served, end), latent_errors(plain, end)))
        progress(len(some))
    every = [[torch.cat(parts) for parts in zip(*kept, strict=True)] for kept in found]
    return [Held(distance, fractions(left, plain)) for distance, left, plain in every]


def _run(pipe: Any, engine: ReDiEngine, gate: Gate, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
    """Latents by one engine, and how near its neighbours were."""
    kb = engine.knowledge_base
    prompts, ids = [p for p, _ in items], torch.tensor([n for _, n in items])
    solver = engine.solver
    assert isinstance(solver, DiffusersSolver)
    enable(
        pipe,
        kb,
        plan=engine.plan,
        solver=solver,
        combiner=engine.combiner,
        key=engine.key,
        neighbors=engine.neighbors,
        transport=engine.transport,
        gate=gate,
        on_miss="plain",
    )
    try:
        with quiet(pipe):
            arguments = run_of(pipe, kb.fingerprint, prompts, engine.plan.steps)
            out = pipe(**arguments | {"latents": kb.bank.noise(ids).to(pipe.device, pipe.dtype)})
        said = report(pipe)
    finally:
        disable(pipe)
    latents: Tensor = out.images if hasattr(out, "images") else out[0]
    # one that takes nothing of its correction reports no neighbours: it is as far as any
    near = [d[0] if d else torch.inf for d in said.distances]
    return latents.float().cpu(), torch.tensor(near, dtype=torch.float64)


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
