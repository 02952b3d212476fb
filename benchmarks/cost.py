"""What a knowledge base for a model of Stable Diffusion 1.5's size costs: model calls, bytes, pictures to pay it back.

    python -m benchmarks.cost --calls-per-second 30 --json bench/cost/cost.json          # --quick for a look

Nothing here runs a model. Calls and break-even are exact, from the plan (`redi.cost.Cost`). Bytes are measured: rows of
random numbers in the shape of latents 4×64×64, float16, under prompts about as long as COCO's, are written as any build
writes them, their table and indexes are derived, and the files are weighed at two sizes; what lies beyond is a straight
line through both. Hours are the calls divided by the rate that the reader gives: guided calls a second at the batch
size of the build, which is a property of a GPU and is not measured here. Leaves the JSON, and its table in markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

import redi
from redi import KnowledgeBase, Plan, ReDiEngine
from redi.backends import Exact, Faiss, Retriever
from redi.backends.automatic import automatic
from redi.cli import names
from redi.cost import Cost
from redi.knowledge_base import Config, Fingerprint, Writer
from redi.noise import NoiseBank
from redi.partitions import indexes
from redi.plan import Route
from redi.solvers import DiffusersSolver
from redi.transports import Defect, check, needs
from redi.types import Rows

SHAPE: Final = (4, 64, 64)
EMBEDDING: Final = 768
PLAN: Final = "coarse:8/40"
SOLVER: Final = "dpmsolver++-karras"
TRAINED: Final[dict[str, Any]] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
ROWS: Final = (1_000, 10_000, 100_000)
NOISES: Final = (1, 16, 256)
AXES_FROM: Final = 1024  # rows; below 8,192, what is no multiple of them leaves other numbers of axes
DIRECTIONS: Final = Faiss("PCA128,Flat", rerank=64)
SUBJECTS: Final = ("a man", "two dogs", "a woman with an umbrella", "a bus", "some children", "a plate of food")
PLACES: Final = (
    "on a beach",
    "in a kitchen",
    "next to a red fire hydrant",
    "under a large tree",
    "in front of a mirror",
)


@dataclass(frozen=True)
class Line:
    """Bytes of `n` rows that start from one noise: fixed + row·n.

    Args:
        fixed: whatever the rows.
        row: for each of them.
    """

    fixed: float
    row: float

    @classmethod
    def through(cls, small: tuple[int, int], large: tuple[int, int]) -> Line:
        """The line through two points (rows, bytes)."""
        row = (large[1] - small[1]) / (large[0] - small[0])
        return cls(small[1] - row * small[0], row)

    def at(self, rows: int) -> float:
        """Bytes."""
        return self.fixed + self.row * rows


@dataclass(frozen=True)
class Sizes:
    """What lies on the disk.

    Args:
        rows: the knowledge base itself.
        table: derived for the plan.
        exact: index of exact search, one for every noise.
        directions: index on principal directions, one for every noise.
    """

    rows: Line
    table: Line
    exact: Line
    directions: Line

    def of(self, rows: int, noises: int, dimension: int) -> dict[str, float]:
        """Bytes of `rows` rows from each of `noises` noises: what grows with the rows, and an index a noise."""
        index = self.exact if isinstance(automatic((rows, dimension)), Exact) else self.directions
        found = {
            "rows": self.rows.at(rows * noises),
            "table": self.table.at(rows * noises),
            "index": noises * index.at(rows),
        }
        return found | {"all": sum(found.values())}


def prompts(count: int) -> list[str]:
    """Distinct captions of about fifty characters, as COCO's are."""
    said = [f"{subject} {place}" for subject in SUBJECTS for place in PLACES]
    return [f"{said[i % len(said)]}, number {i} of many" for i in range(count)]


def served() -> tuple[DiffusersSolver, Plan]:
    """The fine solver and the plan."""
    from diffusers.schedulers.scheduling_pndm import PNDMScheduler

    return names.solver(SOLVER, PNDMScheduler(**TRAINED)), Plan.parse(PLAN)


def write(folder: Path, rows: int, noises: int, shape: Sequence[int] = SHAPE) -> KnowledgeBase:
    """A knowledge base of random numbers: `rows` of them from each noise."""
    solver, plan = served()
    record = needs(Route.lay(check(plan, Defect(), solver), solver.schedule(plan.fine)), solver)
    bank = NoiseBank(seed=0, size=noises, shape=tuple(shape))
    mark = Fingerprint(
        model="random numbers",
        weights="0" * 16,
        adapters=(),
        pipeline="StableDiffusionPipeline",
        scheduler=solver.name,
        scheduler_config=dict(solver.config),
        steps=plan.fine,
        guidance=7.5,
        guidance_rescale=0.0,
        negative_prompt="",
        height=8 * shape[-2],
        width=8 * shape[-1],
        dtype="float16",
        sample_shape=tuple(shape),
    )
    config = Config(mark, record, bank.to_json(), plans=(str(plan),), storage="float16")
    g = torch.Generator().manual_seed(0)
    with Writer.open(folder, config) as writer:
        for noise, some in ((m, p) for m in range(noises) for p in parts(prompts(rows))):
            draw = {entry: torch.randn(len(some), *shape, generator=g) for entry in sorted(record.samples)}
            said = {entry: torch.randn(len(some), *shape, generator=g) for entry in sorted(record.denoised)}
            ids = torch.full((len(some),), noise)
            writer.append(Rows(draw, said, {}, ids, torch.randn(len(some), EMBEDDING, generator=g), some))
    return KnowledgeBase.open(folder)


def parts(of: Sequence[str], size: int = 32) -> Iterator[Sequence[str]]:
    """A few at a time."""
    return (of[i : i + size] for i in range(0, len(of), size))


def weigh(kb: KnowledgeBase, *retrievers: Retriever) -> dict[str, int]:
    """Bytes of the files that building and serving leave: rows, table, and an index by each retriever."""
    found: dict[str, int] = {"rows": kb.info()["bytes"]}
    for retriever in retrievers:
        _ = ReDiEngine.serving(kb, retriever=retriever)[0].table
        found[type(retriever).__name__] = sum(i["bytes"] for i in indexes(kb.path) if i["retriever"] == repr(retriever))
    [table] = kb.info()["derived"]
    return found | {"table": table["bytes"]}


def measured(folder: Path, rows: int, shape: Sequence[int] = SHAPE) -> Sizes:
    """The lines through `rows` and twice as many, from one noise; that of principal directions through more."""
    small, large = (weigh(write(folder / str(n), n, 1, shape), Exact()) for n in (rows, 2 * rows))
    line = {name: Line.through((rows, small[name]), (2 * rows, large[name])) for name in small}
    few, many = ((n, directions(folder / f"index-{n}", n, math.prod(shape))) for n in (AXES_FROM, 2 * AXES_FROM))
    return Sizes(line["rows"], line["table"], line["Exact"], Line.through(few, many))


def directions(folder: Path, rows: int, dimension: int) -> int:
    """Bytes of an index over principal directions."""
    keys = torch.randn(rows, dimension, generator=torch.Generator().manual_seed(rows)).half().numpy()
    DIRECTIONS.build(keys).save(folder, with_keys=False)
    return sum(f.stat().st_size for f in folder.iterdir())


def account(rows: int) -> Cost:
    """Calls, as `redi info` counts them."""
    solver, plan = served()
    fine = Route.lay(check(plan, Defect(), solver), solver.schedule(plan.fine))
    coarse = solver.for_coarse_steps(plan.fine, plan.steps, guidance=7.5)
    route = Route.lay(check(plan, Defect(), coarse), coarse.schedule(plan.fine))
    return Cost(rows, needs(fine, solver).last, route.nfe, route.nfe_full)


def lines(sizes: Sizes, calls_per_second: float, shape: Sequence[int] = SHAPE) -> list[dict[str, Any]]:
    """One for each number of rows and noises."""
    found: list[dict[str, Any]] = []
    for noises in NOISES:
        for rows in ROWS:
            cost = account(rows * noises)
            found.append(
                {
                    "rows_per_noise": rows,
                    "noises": noises,
                    "model_calls": cost.model_calls,
                    **cost.to_json(),
                    "hours": cost.model_calls / calls_per_second / 3600,
                    "bytes": sizes.of(rows, noises, math.prod(shape)),
                }
            )
    return found


def markdown(document: dict[str, Any]) -> str:
    """The tables of docs/cost.md."""
    rate = document["calls_per_second"]
    said = [
        "| noises | rows of each | model calls | paid for after | rows | table | index | "
        f"hours at {rate:g} calls a second (assumed) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in document["lines"]:
        b = line["bytes"]
        weights = " | ".join(weight(b[name]) for name in ("rows", "table", "index"))
        said.append(
            f"| {line['noises']} | {line['rows_per_noise']:,} | {line['model_calls']:,} | "
            f"{line['break_even']:,} pictures | {weights} | {line['hours']:,.1f} |"
        )
    return "\n".join(said) + "\n"


def weight(count: float) -> str:
    """Bytes, in a unit of a thousand."""
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.5:
            return f"{count:.3g} {unit}"
    return f"{count / 1000:.3g} TB"


def main(argv: Sequence[str] | None = None, shape: Sequence[int] = SHAPE) -> int:
    """Measure, and say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls-per-second", type=float, required=True, metavar="C", help="guided, of your GPU")
    parser.add_argument("--json", type=Path, default=Path("bench/cost/cost.json"), metavar="FILE")
    parser.add_argument("--rows", type=int, default=256, help="of the smaller knowledge base that is weighed")
    parser.add_argument("--quick", action="store_true", help="few rows")
    given = parser.parse_args(argv)
    if not given.calls_per_second > 0 or given.rows < 1:
        parser.error("--calls-per-second must be positive, and --rows at least 1")
    rows = 8 if given.quick else given.rows
    given.json.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.json.parent) as folder:
        sizes = measured(Path(folder), rows, shape)
    document = {
        "command": "python -m benchmarks.cost " + " ".join(sys.argv[1:] if argv is None else argv),
        "calls_per_second": given.calls_per_second,
        "plan": PLAN,
        "solver": SOLVER,
        "sample_shape": list(shape),
        "weighed_rows": [rows, 2 * rows],
        "sizes": asdict(sizes),
        "lines": lines(sizes, given.calls_per_second, shape),
        "machine": platform.processor() or platform.machine(),
        "versions": {"redi": redi.__version__, "torch": torch.__version__},
    }
    given.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    said = markdown(document)
    given.json.with_suffix(".md").write_text(said, encoding="utf-8")
    print(said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
