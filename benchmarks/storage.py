"""What storing less costs: rows and derived tables in fewer bits, each against float32 of everything.

    python -m benchmarks.storage --json bench/storage/storage.json          # --quick for a look

Rows of train prompts are solved once and kept in float32. Held-out prompts are then served from them with one thing
stored in fewer bits at a time: rows, the defects of the derived table, its keys. Every way meets the same prompts from
the same noise, so differences of the latent error to the fine solve are paired, and both theirs and those of the
Fréchet distance (first 64 principal directions of the finely solved latents) come with bootstrap intervals over
captions. The model runs in float32: in bfloat16 its own rounding moves a picture more than storage does. Processor time
of gathering and combining 64 neighbours is measured apart. Leaves the JSON, and a table of the same name in markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from tqdm import tqdm

import redi
from benchmarks import bundled
from benchmarks.paper.denoiser import Denoiser
from benchmarks.paper.settings import caption, spread
from redi import KnowledgeBase, Plan, ReDiEngine, zoo
from redi.cli import names
from redi.combiners import combine
from redi.intervals import bootstrap, paired
from redi.knowledge_base import Derived, Writer
from redi.metrics import frechet_distance, principal_directions
from redi.partitions import open_partition
from redi.recorder import trajectory
from redi.table import Table, quantised
from redi.types import Record

FINE: Final = "dpmsolver++-karras"
STEPS: Final = 40
PLANS: Final = ("coarse:5/40", "coarse:8/40")
DIRECTIONS: Final = 64
RANKS: Final = (8, 16, 32, 64)
STABLE_DIFFUSION: Final = (4, 64, 64)


@dataclass(frozen=True)
class Kept:
    """A tensor as it comes back from storage, and what it took there.

    Args:
        back: float32, of the shape it went in with.
        row: bytes of one row.
        shared: bytes that all rows of a noise share.
    """

    back: Tensor
    row: float
    shared: int = 0


def cast(dtype: torch.dtype) -> Callable[[Tensor], Kept]:
    """Each number as `dtype`."""
    return lambda x: Kept(x.to(dtype).float(), dtype.itemsize * x[0].numel())


def int8(dims: int) -> Callable[[Tensor], Kept]:
    """Eight bits a number, and a float32 scale for all behind the first `dims` dimensions; 0: one for each leap."""

    def keep(x: Tensor) -> Kept:
        over = tuple(range(dims, x.ndim)) if dims else (0, *range(2, x.ndim))
        scale = x.abs().amax(over, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        scales = scale.numel() // len(x) if dims else 0
        return Kept((x / scale).round() * scale, x[0].numel() + 4 * scales, 0 if dims else 4 * scale.numel())

    return keep


def low_rank(rank: int, *, joint: bool = False) -> Callable[[Tensor], Kept]:
    """The mean over rows and `rank` principal components beside it, coefficients in float16.

    Args:
        rank: of each leap, or of all leaps together.
        joint: whether one set of coefficients serves all leaps.
    """

    def keep(x: Tensor) -> Kept:
        parts = [x.flatten(1)] if joint else list(x.flatten(2).unbind(1))
        back: list[Tensor] = []
        for part in parts:
            mean = part.mean(0)
            basis = torch.linalg.svd(part - mean, full_matrices=False).Vh[:rank]
            back.append(mean + ((part - mean) @ basis.T).half().float() @ basis)
        used = min(rank, len(x))
        return Kept(
            torch.stack(back, 1).reshape(x.shape),
            2 * used * len(parts),
            4 * (1 + used) * parts[0][0].numel() * len(parts),
        )

    return keep


FLOAT32: Final = cast(torch.float32)


@dataclass(frozen=True)
class Way:
    """What is stored how.

    Args:
        name: in tables.
        storage: of the rows that everything else is derived from.
        defects: of the derived table.
        keys: likewise.
    """

    name: str
    storage: str = "float32"
    defects: Callable[[Tensor], Kept] = FLOAT32
    keys: Callable[[Tensor], Kept] = FLOAT32


WAYS: Final = (
    Way("all in float32"),
    Way("all in float16", "float16", cast(torch.float16), cast(torch.float16)),
    Way("all in float16, defects in int8", "float16", int8(2), cast(torch.float16)),
    Way("defects in float16", defects=cast(torch.float16)),
    Way("defects in bfloat16", defects=cast(torch.bfloat16)),
    Way("defects in int8, a scale for each row and leap", defects=int8(2)),
    Way("defects in int8, a scale for each leap", defects=int8(0)),
    *(Way(f"defects of rank {r}", defects=low_rank(r)) for r in RANKS),
    Way("defects of rank 64 over all leaps", defects=low_rank(64, joint=True)),
    Way("keys in float16", keys=cast(torch.float16)),
    Way("keys in int8, a scale for each row", keys=int8(1)),
)


def main(argv: Sequence[str] | None = None, pipe: Any = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("bench/storage/storage.json"), metavar="FILE")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="for rows; by default beside the JSON")
    parser.add_argument("--rows", type=int, default=1024, help="train prompts of the knowledge base, of one noise")
    parser.add_argument("--queries", type=int, default=256, help="prompts of captions never seen")
    parser.add_argument("--repeats", type=int, default=1000, help="draws of every bootstrap")
    parser.add_argument("--turns", type=int, default=30, help="of the clock")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a look: figures of this size say little")
    given = parser.parse_args(argv)
    if given.quick:
        given.rows, given.queries, given.repeats, given.turns = 12, 4, 20, 2
    given.json.parent.mkdir(parents=True, exist_ok=True)
    served = serve(given, pipe or zoo.load("emoji"))
    document = {
        "command": "python -m benchmarks.storage " + " ".join(sys.argv[1:] if argv is None else argv),
        "quick": given.quick,
        "model": "emoji",
        "solver": FINE,
        **{name: getattr(given, name) for name in ("rows", "queries", "seed")},
        "served": served,
        "gather": [gather(shape, given) for shape in ((8, 8, 8), STABLE_DIFFUSION)],
        "stable_diffusion": [formula(calls) for calls in (5, 8)],
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"redi": redi.__version__, "torch": torch.__version__},
    }
    given.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    said = table(document)
    given.json.with_suffix(".md").write_text(said, encoding="utf-8")
    print(said)
    return 0


def serve(given: argparse.Namespace, pipe: Any) -> list[dict[str, Any]]:
    """The errors of every way and plan."""
    cache: Path = given.cache or given.json.parent / "cache"
    solver, plans = names.solver(FINE, pipe.scheduler), PLANS[-1:] if given.quick else PLANS
    kb = bundled.rows(
        pipe,
        cache / f"kb-float32-{given.rows}",
        [Plan.parse(p) for p in PLANS],
        zoo.prompts("emoji", "train")[: given.rows],
        solver=solver,
        seed=given.seed,
        storage="float32",
    )
    stored = {"float32": kb, "float16": again(kb, cache / f"kb-float16-{given.rows}", "float16")}
    queries = spread(zoo.prompts("emoji", "heldout"), given.queries)
    denoise, size = Denoiser(pipe, queries), min(bundled.BATCH, len(queries))
    fine: list[Tensor] = []
    engines: dict[tuple[str, str], tuple[ReDiEngine, dict[str, float]]] = {
        (plan, way.name): engine(stored[way.storage], plan, way) for plan in plans for way in WAYS
    }
    made: dict[tuple[str, str], list[Tensor]] = {key: [] for key in engines}
    with torch.no_grad(), tqdm(total=len(queries) // size * (1 + len(engines)), desc="serving", unit="batch") as bar:
        for at in range(0, len(queries) - size + 1, size):
            denoise.forget()
            numbers = (at + torch.arange(size))[:, None].expand(-1, 2)
            noise_ids = torch.zeros(size, dtype=torch.int64)
            noise, end = kb.bank.noise(noise_ids), Record(frozenset({STEPS}))
            x, _ = trajectory(
                denoise, noise, solver, STEPS, end, noise_ids=noise_ids, prompts=[""] * size, condition=numbers
            )
            fine.append(x)
            bar.update()
            denoise.forget()
            for key, (served, _) in engines.items():  # their first call is the same, and made once
                made[key].append(served.sample(denoise, noise, condition=numbers, noise_ids=noise_ids)[0])
                bar.update()
    truth, captions = torch.cat(fine), [caption(q) for q in queries[: len(fine) * size]]
    latents = {key: torch.cat(parts) for key, parts in made.items()}
    found: list[dict[str, Any]] = []
    for plan in plans:
        reference = latents[plan, WAYS[0].name]
        for way in WAYS:
            errors = compare(latents[plan, way.name], reference, truth, captions, given.repeats)
            found.append({"plan": plan, "way": way.name} | errors | engines[plan, way.name][1])
    return found


def again(kb: KnowledgeBase, folder: Path, storage: str) -> KnowledgeBase:
    """The same rows in another storage dtype."""
    with Writer.open(folder, dataclasses.replace(kb.config, storage=storage), 1024) as writer:
        for rows in kb.chunks():
            writer.append(rows)
        assert not writer.refused
    return KnowledgeBase.open(folder)


def engine(kb: KnowledgeBase, plan: str, way: Way) -> tuple[ReDiEngine, dict[str, float]]:
    """An engine as `redi.enable` makes it, but for its table; and what that takes."""
    (served,) = ReDiEngine.serving(kb, plan)
    whole = served.table.derived
    defects, keys = way.defects(whole["bracket"].float()), way.keys(whole["key.0"].float())
    derived = Derived(whole.recipe, {"bracket": defects.back, "key.0": keys.back}, None, None)
    ids = torch.arange(len(kb))
    # a frozen dataclass keeps what it has computed in its dictionary
    vars(served)["table"] = Table(derived, {(0, 0): open_partition(derived, "key.0", 0, ids, None)})
    row = sum(s.bytes for s in kb.manifest.shards) / len(kb)
    return served, {
        "bytes_row": row,
        "bytes_defects": defects.row,
        "bytes_defects_shared": defects.shared,
        "bytes_keys": keys.row,
    }


def compare(made: Tensor, reference: Tensor, truth: Tensor, captions: Sequence[str], repeats: int) -> dict[str, Any]:
    """A way's errors to the fine solve, and how they differ from the reference's."""
    mine, theirs = ((x - truth).flatten(1).norm(dim=1) for x in (made, reference))
    difference = paired(mine, theirs, captions, repeats=repeats).interval
    basis = principal_directions(truth.flatten(1).double(), min(DIRECTIONS, len(truth) - 1))
    projected = [x.flatten(1).double() @ basis for x in (made, reference, truth)]
    distance = frechet_distance(projected[1], projected[2])
    apart = bootstrap(
        lambda a, b, t: frechet_distance(a, t) - frechet_distance(b, t), *projected, groups=captions, repeats=repeats
    )
    return {
        "latent_error": float(mine.mean()),
        "latent_error_difference": percent(difference, float(theirs.mean())),
        "frechet": frechet_distance(projected[0], projected[2]),
        "frechet_difference": percent(apart, distance),
    }


def percent(interval: Any, of: float) -> list[float]:
    """Value, low and high in percent."""
    return [100 * x / of for x in (interval.value, interval.low, interval.high)]


def gather(shape: tuple[int, ...], given: argparse.Namespace) -> dict[str, Any]:
    """Processor milliseconds to gather and combine the defects of 64 neighbours for one leap, in turns."""
    rows, leaps, k = (64 if given.quick else 1024), 8, min(64, given.rows)
    generator = torch.Generator().manual_seed(given.seed)
    whole = torch.randn(rows, leaps, *shape, generator=generator)
    half, (small, scale) = whole.half(), quantised(whole)
    coefficients, basis = (
        torch.randn(n, leaps, m, generator=generator) for n, m in ((rows, 64), (64, torch.Size(shape).numel()))
    )
    coefficients = coefficients.half()

    def taken(table: Tensor, ids: Tensor) -> Tensor:  # as redi.table gathers
        return table.flatten(0, 1).index_select(0, ids.flatten() * leaps + 3).unflatten(0, ids.shape).float()

    def dequantised(ids: Tensor, w: Tensor) -> Tensor:
        return combine(w, taken(small, ids).mul_(scale[ids, 3].view(*ids.shape, *[1] * len(shape))))

    def of_rank(ids: Tensor, w: Tensor) -> Tensor:
        mixed = (w[:, None] @ coefficients[ids, 3].float())[:, 0]
        return (mixed @ basis[:, 3]).view(-1, *shape)

    ways: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
        "float32": lambda ids, w: combine(w, taken(whole, ids)),
        "float16": lambda ids, w: combine(w, taken(half, ids)),
        "int8": dequantised,
        "rank 64": of_rank,
    }
    found: dict[str, Any] = {"shape": list(shape), "neighbors": k, "rows": rows}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for batch in (1, 16):
            took: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(1 + given.turns):
                ids = torch.randint(rows, (batch, k), generator=generator)
                w = torch.randn(batch, k, generator=generator)
                for name, way in ways.items():
                    began = time.process_time()
                    way(ids, w)
                    if turn:  # the first is warming up
                        took[name].append(1e3 * (time.process_time() - began))
            found[f"batch {batch}"] = {name: statistics.median(ms) for name, ms in took.items()}
    finally:
        torch.set_num_threads(before)
    return found


def formula(calls: int, shape: torch.Size | tuple[int, ...] = STABLE_DIFFUSION) -> dict[str, Any]:
    """Bytes of one row of a coarse plan of so many calls: what is recorded, and what its table holds."""
    d = torch.Size(shape).numel()
    return {
        "calls": calls,
        "shape": list(shape),
        "row, float32": 4 * d * (2 * calls + 1),
        "row, float16": 2 * d * (2 * calls + 1),
        "table, float32": 4 * d * (calls + 1),
        "table, float16": 2 * d * (calls + 1),
        "table, defects in int8": (d + 4) * calls + 2 * d,
        "table, defects of rank 64": 2 * 64 * calls + 2 * d,
    }


def table(document: Mapping[str, Any]) -> str:
    """Everything in markdown."""
    lines = [
        f"Made with `{document['command']}`; {document['rows']} rows, {document['queries']} prompts.",
        "",
        "| plan | stored | latent error | difference, % | Fréchet distance | difference, % | bytes of a row's table |",
        "|---|---|---|---|---|---|---|",
    ]
    for f in document["served"]:
        spans = [
            "{:+.3f} ({:+.3f} … {:+.3f})".format(*f[name]) for name in ("latent_error_difference", "frechet_difference")
        ]
        size = f["bytes_defects"] + f["bytes_keys"]
        lines.append(
            f"| {f['plan']} | {f['way']} | {f['latent_error']:.4f} | {spans[0]} | {f['frechet']:.4f} | {spans[1]} "
            f"| {size:,.0f} |"
        )
    lines += ["", "| sample | batch | " + " | ".join(document["gather"][0]["batch 1"]) + " |"]
    lines += ["|---" * (2 + len(document["gather"][0]["batch 1"])) + "|"]
    for f in document["gather"]:
        for batch in ("batch 1", "batch 16"):
            cells = " | ".join(f"{ms:.3f} ms" for ms in f[batch].values())
            lines.append(f"| {'×'.join(map(str, f['shape']))} | {batch} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
