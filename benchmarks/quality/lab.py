"""The bundled model with rows on Karras noise levels, as every study here uses it."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks import bundled
from benchmarks.paper.common import Made, World
from benchmarks.paper.denoiser import Denoiser
from benchmarks.paper.measures import Judge
from benchmarks.paper.settings import Settings
from benchmarks.paper.ways import Way
from benchmarks.quality import plain
from redi import Defect, DiffusersSolver, Gate, KnowledgeBase, Kriging, Plan, ReDiEngine, zoo
from redi.combiners import Combiner

STEPS: Final = 48
BUDGETS: Final = (3, 4, 5, 6, 8, 10, 12, 16, 24)  # calls

NEIGHBORS: Final = 64
COMBINER: Final[Combiner] = Kriging(nugget=0.1)


class Lab(World):
    """Queries that start from bank noises, or beside them.

    Args:
        settings: how much.
        pipe: from `bundled.load`.
        guidance: scale of rows and queries.
        away: η; queries start from √(1 − η²) · bank noise + η · fresh noise.
    """

    def __init__(
        self,
        settings: Settings,
        pipe: Any,
        guidance: float = bundled.GUIDANCE,
        away: float = 0.0,
    ) -> None:
        super().__init__(settings, pipe, guidance)
        self.away = away

    def solver(self, name: str) -> DiffusersSolver:
        """A solver and its spacing."""
        return plain.solver(name, self.pipe.scheduler)

    def rows(self, name: str, prompts: int, noises: int | None = None) -> KnowledgeBase:
        """Rows of so many train prompts with every entry, and early on what the model says without a prompt.

        Any coarse plan can be tried on them.
        """
        lab = (
            self if noises is None else Lab(dataclasses.replace(self.settings, noises=noises), self.pipe, self.guidance)
        )
        every = ",".join(f"{k}h" if k <= STEPS // 4 else f"{k}" for k in range(STEPS))
        plans = [f"at:{every}/{STEPS}", evenly(STEPS // 2)]
        return lab.build(name, fine().solver, plans, zoo.prompts("emoji", "train")[:prompts])

    def start(self, ids: Tensor) -> Tensor:
        """Bank noise, or something beside it that is the same at every call."""
        bank = super().start(ids)
        if not self.away:
            return bank
        fresh = torch.randn(bank.shape, generator=torch.Generator().manual_seed(1000 + int(ids[0])))
        return (1 - self.away**2) ** 0.5 * bank + self.away * fresh

    def identity(self) -> list[str]:
        """And how far from the bank queries start."""
        return [*super().identity(), *([f"eta {self.away}"] if self.away else [])]

    def seconds(self, ways: Sequence[Way], rows: dict[str, KnowledgeBase], turns: int) -> list[float | None]:
        """Wall time of one batch of queries by each way, the quickest of some turns; None without a turn.

        The batch is as large as any here.
        """
        if not turns:
            return [None] * len(ways)
        prompts = self.queries[: bundled.BATCH]
        denoise = Denoiser(self.pipe, prompts, self.guidance)
        numbers = torch.arange(len(prompts))[:, None].expand(-1, 2)
        found: list[float | None] = []
        for way in ways:
            engine = None if way.plan is None else self.engine(way, rows)
            taken: list[float] = []
            for _ in range(turns):
                denoise.forget()
                begun = time.perf_counter()
                self.run(way, engine, denoise, 0, numbers)
                taken.append(time.perf_counter() - begun)
            found.append(min(taken))
        return found

    def engine(self, way: Way, rows: dict[str, KnowledgeBase]) -> ReDiEngine:
        """With the way's own solver for coarse steps; without neighbours its gate is shut."""
        assert way.rows is not None
        assert way.plan is not None
        kb = rows[way.rows]
        shut = Gate(max_distance=0.0) if way.neighbors == 0 else Gate()
        return ReDiEngine(
            kb if way.most is None else self.fewer(kb, way.most),
            self.solver(way.solver),
            Plan.parse(way.plan),
            transport=way.transport,
            combiner=way.combiner,
            neighbors=max(1, way.neighbors),
            key=way.key,
            retrieve_at=way.retrieve_at,
            gate=shut,
        )


def fine() -> Way:
    """What everything is measured against."""
    return Way("fine", plain.FINE, STEPS)


def coarse(calls: int, guidance: float = bundled.GUIDANCE) -> str:
    """Whose coarse steps are corrected, as `DiffusersSolver.for_coarse_steps` chooses them."""
    third = any(guidance <= scale and calls >= least for scale, least in ((1.5, 12), (3.0, 16), (6.0, 24)))
    return "dpmsolver++3-karras" if third else "deis-karras"


def evenly(calls: int) -> str:
    """So many calls spread evenly over the fine steps."""
    return f"coarse:{calls}/{STEPS}"


def placed(calls: int, guidance: float = bundled.GUIDANCE, *, halved: bool = False) -> str:
    """So many calls where redi makes them."""
    return str(Plan.placed(calls, STEPS, guidance=guidance, halved=halved))


def at(places: Sequence[int]) -> str:
    """The plan that calls at these entries."""
    return f"at:{','.join(map(str, places))}/{STEPS}"


def called(plan: str) -> list[int]:
    """The steps at which a plan calls the model."""
    return [s.start for s in Plan.parse(plan).segments]


def served(
    calls: int,
    name: str = "redi",
    rows: str = "rows",
    guidance: float = bundled.GUIDANCE,
    *,
    halved: bool = False,
    **changes: Any,
) -> Way:
    """What a pipeline is served with so many calls, the first two of them by halves or not; or what differs from it."""
    given: dict[str, Any] = {
        "solver": coarse(calls + halved, guidance),
        "steps": STEPS,
        "plan": placed(calls, guidance, halved=halved),
        "transport": Defect(),
        "combiner": COMBINER,
        "neighbors": NEIGHBORS,
    }
    return Way(f"{name} {calls}", rows=rows, **given | changes)


def measured(
    lab: Lab, ways: Sequence[Way], rows: Mapping[str, Any], prompts: Sequence[str]
) -> tuple[Judge, list[Made]]:
    """Latents of the fine solve and of every way, and who judges them."""
    made = lab.sample([fine(), *ways], dict(rows), prompts)
    return Judge(lab, prompts, made[0]), made[1:]


def one_noise(settings: Settings, pipe: Any, **more: Any) -> Lab:
    """Studies have one noise: what they compare is paired."""
    return Lab(dataclasses.replace(settings, noises=1), pipe, **more)


def scaled(lab: Lab) -> KnowledgeBase:
    """Rows of the lab's guidance scale."""
    return lab.rows(f"guidance-{lab.guidance:g}", min(2048, lab.settings.rows))


def arguments(
    argv: Sequence[str] | None, doc: str | None, studies: Sequence[str]
) -> tuple[argparse.Namespace, Settings]:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"frontier (as none), {', '.join(studies)}")
    parser.add_argument("--json", type=Path, default=Path("bench/quality/quality.json"), metavar="FILE")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="for rows and latents; by default beside the JSON")
    parser.add_argument("--rows", type=int, default=4032, help="train prompts of the knowledge base, with every noise")
    parser.add_argument("--queries", type=int, default=256, help="prompts of captions never seen")
    parser.add_argument("--noises", type=int, default=3)
    parser.add_argument("--solvers", default=",".join(plain.FAMILIES), metavar="NAME,…", help="of the frontier")
    budgets = ",".join(map(str, BUDGETS))
    parser.add_argument("--budgets", default=budgets, metavar="N,…", help="of the frontier, in calls")
    parser.add_argument("--tuning", type=int, default=128, metavar="N", help="prompts that plain solvers are tuned on")
    parser.add_argument(
        "--turns", type=int, default=3, metavar="N", help="of the frontier's timings; 0 leaves them out"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a look: figures of this size say little")
    given = parser.parse_args(argv)
    if unknown := set(given.studies) - {"frontier", *studies}:
        parser.error(f"there is no study {', '.join(sorted(unknown))}; there is: frontier, {', '.join(studies)}")
    given.solvers, given.budgets = given.solvers.split(","), [int(n) for n in given.budgets.split(",")]
    if other := set(given.solvers) - set(plain.FAMILIES) | {str(n) for n in set(given.budgets) - set(BUDGETS)}:
        parser.error(f"there is no {', '.join(sorted(other))} among {', '.join(plain.FAMILIES)}, {[*BUDGETS]}")
    if given.quick:
        given.rows, given.queries, given.noises = 12, 4, 1
    given.json.parent.mkdir(parents=True, exist_ok=True)
    cache = given.cache or given.json.parent / "cache"
    much = Settings(given.json.parent, cache, given.rows, given.queries, given.noises, given.seed, None, given.quick)
    return given, much
