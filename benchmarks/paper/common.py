"""The model with its queries, its knowledge bases, and latents of every way of sampling, kept as they are made."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Float, Int64
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from benchmarks import bundled
from benchmarks.paper.denoiser import Denoiser
from benchmarks.paper.settings import Settings, spread
from benchmarks.paper.ways import Way
from redi import DiffusersSolver, KnowledgeBase, NoiseBank, Plan, ReDiEngine, zoo
from redi.cli import names
from redi.knowledge_base import Writer
from redi.recorder import trajectory
from redi.types import Record

SHAPE: Final = (8, 8, 8)


@dataclass(frozen=True, eq=False)
class Made:
    """What a way made: latents of every noise and query, and the model calls of one picture."""

    latents: Float[Tensor, "noises queries c h w"]
    calls: int | float


class World:
    """The model with its queries.

    Args:
        settings: how much.
        pipe: from `bundled.load`.
        guidance: scale of rows and queries.
    """

    def __init__(self, settings: Settings, pipe: Any, guidance: float = bundled.GUIDANCE) -> None:
        self.settings, self.pipe, self.guidance = settings, pipe, guidance
        self.bank = NoiseBank(seed=settings.seed, size=settings.noises, shape=SHAPE)

    @cached_property
    def queries(self) -> list[str]:
        """Prompts of captions the model has never seen; whole batches of them."""
        return spread(zoo.prompts("emoji", "heldout"), self.settings.queries)

    def solver(self, name: str) -> DiffusersSolver:
        """A solver on the model's schedule."""
        return names.solver(name, self.pipe.scheduler)

    def build(self, name: str, solver: str, plans: Sequence[str], prompts: Sequence[str]) -> KnowledgeBase:
        """The knowledge base of this name, continued if it was begun."""
        return bundled.rows(
            self.pipe,
            self.settings.cache / f"kb-{name}-{len(prompts)}",
            [Plan.parse(p) for p in plans],
            prompts,
            solver=self.solver(solver),
            noises=self.settings.noises,
            seed=self.settings.seed,
            guidance=self.guidance,
        )

    def start(self, ids: Int64[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """What queries of these noises start from."""
        return self.bank.noise(ids)

    def fewer(self, kb: KnowledgeBase, most: int) -> KnowledgeBase:
        """The same knowledge base with its first `most` prompts of every noise."""
        folder = kb.path.with_name(f"{kb.path.name}-first-{most}")
        kept = [i for n in range(self.bank.size) for i in (kb.noise_ids == n).nonzero().flatten().tolist()[:most]]
        with Writer.open(folder, kb.config, 1024) as writer:
            if not len(writer.done):
                writer.append(kb.gather(torch.tensor(kept)))
        return KnowledgeBase.open(folder)

    @torch.no_grad()
    def sample(
        self,
        ways: Sequence[Way],
        rows: dict[str, KnowledgeBase],
        contents: Sequence[str],
        styled: Sequence[str] | None = None,
    ) -> list[Made]:
        """Latents of every way; what is in the cache is read.

        Args:
            ways: the ways.
            rows: knowledge bases by the name that ways call them.
            contents: the prompts.
            styled: the prompts after a way's `switch`.
        """
        styled = contents if styled is None else styled
        denoise = Denoiser(self.pipe, [*contents, *styled], self.guidance)
        size = min(bundled.BATCH, len(contents))
        numbers = torch.stack([torch.arange(len(contents)), len(contents) + torch.arange(len(contents))], 1)
        batches = [(n, i) for n in range(self.bank.size) for i in range(0, len(contents) - size + 1, size)]
        found: dict[tuple[int, int, int], tuple[Tensor, int | float]] = {}
        engines: dict[int, ReDiEngine] = {}
        with tqdm(total=len(batches) * len(ways), desc="sampling", unit="batch") as bar:
            for noise, at in batches:
                denoise.forget()
                for w, way in enumerate(ways):
                    bar.update()
                    after = [] if way.switch is None else styled[at : at + size]
                    file = self._file(way, noise, [*contents[at : at + size], *after])
                    if not file.exists():
                        bar.set_postfix_str(way.name)
                        if way.plan is not None and w not in engines:
                            engines[w] = self.engine(way, rows)
                        x, calls = self.run(way, engines.get(w), denoise, noise, numbers[at : at + size])
                        save(file, x, calls)
                    kept = load_file(file)
                    found[w, noise, at] = kept["latents"], kept["calls"].item()
        return [
            Made(
                torch.stack(
                    [torch.cat([found[w, n, at][0] for m, at in batches if m == n]) for n in range(self.bank.size)]
                ),
                found[w, 0, 0][1],
            )
            for w in range(len(ways))
        ]

    def engine(self, way: Way, rows: dict[str, KnowledgeBase]) -> ReDiEngine:
        """The engine of a way that leaps."""
        assert way.rows is not None
        kb = rows[way.rows]
        (engine,) = ReDiEngine.serving(
            kb if way.most is None else self.fewer(kb, way.most),
            way.plan,
            solver=self.solver(way.solver),
            transport=way.transport,
            combiner=way.combiner,
            neighbors=way.neighbors,
            key=way.key,
            retrieve_at=way.retrieve_at,
        )
        return engine

    def run(
        self, way: Way, engine: ReDiEngine | None, denoise: Denoiser, noise: int, numbers: Int64[Tensor, "b two"]
    ) -> tuple[Float[Tensor, "b c h w"], int | float]:
        """Latents of one batch by a way, and its model calls."""
        ids = torch.full((len(numbers),), noise)
        x, solver = self.start(ids), self.solver(way.solver)
        grid = solver.schedule(way.steps)
        entry = None if way.switch is None else grid.boundaries[way.switch]
        denoise.switch = -1.0 if entry is None else float(grid.timesteps[entry])
        if engine is None:
            end = Record(frozenset({grid.fine}))
            out, _ = trajectory(
                denoise, x, solver, way.steps, end, noise_ids=ids, prompts=[""] * len(x), condition=numbers
            )
            return out, grid.fine
        out, report = engine.sample(
            denoise,
            x,
            conditional=denoise.conditional,
            condition=numbers,
            noise_ids=ids,
            embeddings=denoise.embeddings[numbers[:, 0]],
        )
        return out, report.nfe

    def identity(self) -> list[str]:
        """What latents depend on besides the way, the prompts and the noise."""
        return [str(s) for s in (self.settings.seed, self.settings.rows, self.guidance)]

    def _file(self, way: Way, noise: int, texts: Sequence[str]) -> Path:
        said = "\n".join([way.identity(), *texts, str(noise), *self.identity()])
        return self.settings.cache / "latents" / f"{hashlib.sha1(said.encode()).hexdigest()[:20]}.safetensors"


def save(file: Path, latents: Tensor, calls: int | float) -> None:
    """Write latents in one go, so that an interrupt leaves none by halves."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    save_file({"latents": latents.contiguous(), "calls": torch.tensor(calls)}, temporary)
    temporary.replace(file)
