"""The keys that are searched: real ones of the bundled model, and synthetic ones in Stable Diffusion's shapes.

Everything made is kept in a cache folder; run again, it is found there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.retrievers.fit import fit
from benchmarks.retrievers.keys import Data
from benchmarks.retrievers.world import World
from redi import KnowledgeBase, Plan, build, zoo
from redi.cli import names

GUIDANCE: Final = 3.0
SHAPES: Final = {"4x64x64": (4, 64, 64), "4x128x128": (4, 128, 128)}


@final
@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Args:
        fine: steps of the fine solve.
        steps: of the coarse plan.
        rows: trajectories of the bundled model.
        queries: held-out prompts, and synthetic queries.
        entries: where jumps may begin whose keys are looked at.
    """

    fine: int
    steps: int
    rows: int
    queries: int
    entries: tuple[int, ...]

    @property
    def coarse(self) -> Plan:
        """The plan that is served."""
        return Plan.coarse(self.steps, self.fine)


def real(cache: Path, scale: Scale, seed: int) -> tuple[KnowledgeBase, KnowledgeBase, list[Data]]:
    """A knowledge base of the bundled model, the fine solves of held-out prompts, and their keys at several entries."""
    pipe = zoo.load("emoji")
    solver = names.solver("dpmsolver++", pipe.scheduler)
    plans = [scale.coarse, *(Plan.jump(e, e + scale.fine // 4, scale.fine) for e in scale.entries)]

    def solved(split: str, count: int) -> KnowledgeBase:
        with tqdm(desc=f"solving {split} prompts finely", unit="row", leave=False) as bar:
            return build(
                pipe,
                zoo.prompts("emoji", split)[:count],
                cache / f"{split}-{count}-{scale.fine}",
                plans=plans,
                solver=solver,
                seed=seed,
                guidance=GUIDANCE,
                storage="float32" if split == "heldout" else "float16",
                model="emoji",
                progress=lambda now: bar.update(now.done - bar.n),
            )

    train, heldout = solved("train", scale.rows), solved("heldout", scale.queries)
    found: list[Data] = []
    for name, take in _keys(scale).items():
        files = [cache / f"{name}-{split}-{scale.fine}-{len(kb)}.npy" for split, kb in (("k", train), ("q", heldout))]
        for file, kb in zip(files, (train, heldout), strict=True):
            if not file.exists():
                np.save(file, np.concatenate([take(rows).flatten(1).numpy() for rows in kb.chunks()]))
        found.append(Data(name, False, files[0], files[1], len(train), int(np.prod(train.fingerprint.sample_shape))))
    return train, heldout, found


def _keys(scale: Scale) -> dict[str, Callable[[Any], torch.Tensor]]:
    def sample(entry: int) -> Callable[[Any], torch.Tensor]:
        return lambda rows: rows.samples[entry]

    return {"denoised@0": lambda rows: rows.denoised[0]} | {f"sample@{e}": sample(e) for e in scale.entries}


def synthetic(cache: Path, kb: KnowledgeBase, name: str, rows: int, scale: Scale, seed: int, *, stream: bool) -> Data:
    """Keys of one of Stable Diffusion's shapes.

    Args:
        cache: where they are kept.
        kb: whose denoised predictions at entry 0 they are fitted to.
        name: of the shape.
        rows: how many.
        scale: of the benchmark.
        seed: of the keys.
        stream: keep no file of keys, make them whenever they are asked for.
    """
    shape, count = SHAPES[name], max(64, scale.queries)
    base = cache / f"{name}-fit-{len(kb)}-{scale.fine}-{seed}"
    fitted, queries = base.with_suffix(".npz"), Path(f"{base}-q{count}.npy")
    if not fitted.exists():
        latents = torch.cat([r.denoised[0] for r in kb.chunks()]).float().numpy()
        fit(latents, shape, seed=seed).save(fitted)
    world = World.load(fitted).of(rows)
    if not queries.exists():
        np.save(queries, world.queries(count))
    d = int(np.prod(shape))
    if stream:
        return Data(name, True, fitted, queries, rows, d)
    file = Path(f"{base}-{rows}.npy")
    if not file.exists():
        partial = file.with_suffix(".partial")
        keys = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=(rows, d))
        at = 0
        with tqdm(desc=f"making {name} keys", total=rows, unit="row", leave=False) as bar:
            for chunk in world.chunks():
                keys[at : at + len(chunk)] = chunk
                at += len(chunk)
                bar.update(len(chunk))
        keys.flush()
        partial.rename(file)
    return Data(name, True, file, queries, rows, d)
