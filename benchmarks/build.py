"""What building costs: against a naive loop, with more ranks, in memory and bytes; and what opening and fetching cost.

    python benchmarks/build.py --out bench          # --quick for a look

Every measurement is a process of its own, but for redi and the naive loops, which take turns batch by batch in one: a
machine's speed drifts within minutes by more than what is to be told apart. Rates are by the wall clock, and again by
processor time, which a machine with other work on it disturbs less. Leaves build.json and prints the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLAN, STEPS, GUIDANCE, BATCH = "jump:10:30/50", 50, 3.0, 16


@dataclass(frozen=True)
class Figure:
    """One measured figure, and what it shall reach."""

    name: str
    value: float
    wanted: str  # ">= 1.6", or "" where nothing is asked for

    @property
    def reached(self) -> bool | None:
        """Whether it is what was wanted."""
        if not self.wanted:
            return None
        sign, bound = self.wanted.split()
        return self.value >= float(bound) if sign == ">=" else self.value <= float(bound)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--rows", type=int, default=192, help="of every build")
    parser.add_argument("--repeats", type=int, default=3, help="turns of everything that is compared")
    parser.add_argument("--opened", type=int, default=100_000, help="rows of the knowledge base that is opened")
    parser.add_argument("--fetched", type=int, default=4_000, help="rows of 3 × 32 KiB to fetch 8 from")
    parser.add_argument("--quick", action="store_true", help="a look: figures of this size say little")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.part:
        answer = PARTS[given.part](given.folder, given.rows)
        if answer is not None:
            print(json.dumps(answer))
        return 0
    if given.quick:
        given.rows, given.repeats, given.opened, given.fetched = 32, 1, 5_000, 300
    with tempfile.TemporaryDirectory(prefix="redi-build-") as folder:
        measured = measure(given, Path(folder))
    figures = judge(measured)
    document = {
        "command": " ".join(["python", *sys.argv]) if argv is None else list(argv),
        "quick": given.quick,
        "model": "emoji",
        "plan": PLAN,
        "batch": BATCH,
        "rows": given.rows,
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "figures": [{**vars(f), "reached": f.reached} for f in figures],
        "measured": measured,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "build.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for f in figures:
        print(f"{f.name:58} {f.value:10.4g}   {f.wanted and f'wanted {f.wanted}'}")
    return 0


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every part, `repeats` times in turn."""
    found: dict[str, list[Any]] = {}
    for turn in range(given.repeats):
        found.setdefault("in_turn", []).append(run("in_turn", folder / f"in_turn{turn}", given.rows, threads=0))
        for name in ("one_rank", "two_ranks")[:: 1 if turn % 2 == 0 else -1]:
            found.setdefault(name, []).append(run(name, folder / f"{name}{turn}", given.rows, threads=1))
    for name in ("naive", "redi"):
        found[name] = [run(name, folder / name, given.rows, threads=0)]
    found["redi_twice_the_rows"] = [run("redi", folder / "twice", 2 * given.rows, threads=0)]
    found["naive_twice_the_rows"] = [run("naive", folder / "naive_twice", 2 * given.rows, threads=0)]
    run("write_many", folder / "many", given.opened, threads=0)
    run("write_large", folder / "large", given.fetched, threads=0)
    for _ in range(max(3, given.repeats)):
        found.setdefault("open", []).append(run("open", folder / "many", given.opened, threads=0))
        found.setdefault("fetch", []).append(run("fetch", folder / "large", given.fetched, threads=0))
    return found


def judge(measured: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Figure]:
    """The ratios, each the median over turns."""

    def ratio(of: str, to: str, what: str) -> float:
        return statistics.median(a[what] / b[what] for a, b in zip(measured[of], measured[to], strict=True))

    def median(of: str, what: str) -> float:
        return statistics.median(m[what] for m in measured[of])

    def turns(of: str, what: str) -> float:
        return statistics.median(m[f"{of}_{what}_s"] / m[f"redi_{what}_s"] for m in measured["in_turn"])

    growth = {
        name: measured[f"{name}_twice_the_rows"][0]["peak_mb"] - median(name, "peak_mb") for name in ("naive", "redi")
    }
    return [
        Figure("rows/s, redi to the naive loop that ends with latents", turns("naive", "wall"), ">= 1.6"),
        Figure("rows/s, redi to the naive loop that ends with pictures", turns("naive_pictures", "wall"), ""),
        Figure("bytes per row, redi to the naive loop", ratio("redi", "naive", "bytes_per_row"), "<= 0.1"),
        Figure("rows/s, two ranks of a thread to one", ratio("two_ranks", "one_rank", "rows_per_s"), ">= 1.85"),
        Figure("processor time, the naive loop to redi", turns("naive", "processor"), ">= 1.6"),
        Figure(
            "processor time, one rank of a thread to two", ratio("one_rank", "two_ranks", "processor_s"), ">= 0.925"
        ),
        Figure("MB more at the peak for twice the rows, redi", growth["redi"], "<= 10"),
        Figure("MB more at the peak for twice the rows, naive loop", growth["naive"], ""),
        Figure("ms to open", median("open", "ms"), "<= 100"),
        Figure("MB resident after opening", median("open", "mb"), "<= 50"),
        Figure("ms to fetch 8 rows of 3 × 32 KiB, warm", median("fetch", "ms"), "<= 0.5"),
    ]


def run(part: str, folder: Path, rows: int, threads: int) -> Any:
    """One part in a process of its own, or two."""
    env = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [sys.executable, str(Path(__file__).resolve())]
    if part == "two_ranks":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", command[-1]]
    told = ["--part", part, "--folder", str(folder), "--rows", str(rows)]
    done = subprocess.run([*command, *told], env=env, stdout=subprocess.PIPE, text=True, check=True)
    said = done.stdout.strip().splitlines()
    answer = json.loads(said[-1]) if said else None
    if answer is not None:
        for others in folder.parent.glob(f"{folder.name}.seconds.*"):  # other ranks' processors worked too
            answer["processor_s"] += float(others.read_text())
        answer["load"] = os.getloadavg()[0]
    print(f"{part}: {json.dumps(answer) if answer else 'done'}", file=sys.stderr, flush=True)
    return answer


def pipeline(rows: int) -> tuple[Any, Any, list[str]]:
    """The bundled model, the fine solver, and prompts."""
    from redi import zoo
    from redi.cli import models, names

    models.hush()
    pipe = zoo.load("emoji")
    return pipe, names.solver("dpmsolver++", pipe.scheduler), zoo.prompts("emoji", "train")[:rows]


class NaiveLoop:
    """The loop one would write: call the pipeline for each batch, keep all latents, pickle them at the end."""

    def __init__(self, rows: int, output: str) -> None:
        import torch

        self.pipe, solver, self.prompts = pipeline(rows)
        self.pipe.scheduler = solver.scheduler()
        self.noise = torch.randn(1, self.pipe.unet.config.in_channels, *(self.pipe.unet.config.sample_size,) * 2)
        self.output, self.kept = output, []

    def batch(self, at: int) -> None:
        """The rows from `at` on."""
        import torch

        batch, latents = self.prompts[at : at + BATCH], []

        def keep(_pipe: Any, _i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            latents.append(tensors["latents"].clone())
            return {}

        start = self.noise.expand(len(batch), -1, -1, -1).clone()
        self.pipe(
            batch,
            latents=start,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            output_type=self.output,
            callback_on_step_end=keep,
        )
        self.kept.append((batch, torch.stack([start, *latents], 1)))

    def save(self, folder: Path) -> None:
        """Pickle what was kept."""
        folder.mkdir(parents=True)
        with open(folder / "latents.pkl", "wb") as file:
            pickle.dump(self.kept, file)


def naive(folder: Path, rows: int) -> dict[str, float]:
    """The naive loop alone."""
    loop = NaiveLoop(rows, "latent")
    clock = Clock()
    for at in range(0, rows, BATCH):
        loop.batch(at)
    loop.save(folder)
    return costs(rows, clock, folder)


def built(folder: Path, rows: int, progress: Callable[[Any], None]) -> None:
    """`redi.build` of so many rows."""
    from redi import Plan, build

    pipe, solver, prompts = pipeline(rows)
    build(
        pipe,
        prompts,
        folder,
        plans=[Plan.parse(PLAN)],
        solver=solver,
        guidance=GUIDANCE,
        batch_size=BATCH,
        progress=progress,
    )


def redi(folder: Path, rows: int) -> dict[str, float]:
    """`redi.build`, from its first batch to its last file."""
    clocks: list[Clock] = []
    built(folder, rows, lambda now: clocks.append(Clock()))
    return costs(rows, clocks[0], folder)


def in_turn(folder: Path, rows: int) -> dict[str, float]:
    """`redi.build` and the naive loops by turns, a batch each: what slows the machine down slows all of them."""
    loops = {name: NaiveLoop(rows, output) for name, output in (("naive", "latent"), ("naive_pictures", "pil"))}
    spent = {name: {"wall": 0.0, "processor": 0.0} for name in ("redi", *loops)}

    def charge(name: str, clock: Clock) -> None:
        spent[name]["wall"] += clock.wall()
        spent[name]["processor"] += clock.processor()

    since: list[Clock] = []

    def others(now: Any) -> None:
        if since:  # at the first report nothing is built yet
            charge("redi", since.pop())
        for name, loop in loops.items():
            if now.done < rows:
                clock = Clock()
                loop.batch(now.done)
                charge(name, clock)
        since.append(Clock())

    built(folder / "redi", rows, others)
    charge("redi", since.pop())
    for name, loop in loops.items():
        clock = Clock()
        loop.save(folder / name)
        charge(name, clock)
    return {f"{name}_{what}_s": seconds for name, of in spent.items() for what, seconds in of.items()}


def two_ranks(folder: Path, rows: int) -> dict[str, float] | None:
    """The same by the ranks that torchrun started."""
    import torch

    from redi import Plan, lightning
    from redi.launch import is_first, launched
    from redi.recipe import Recipe

    torch.set_num_threads(1)
    pipe, solver, prompts = pipeline(rows)
    lightning.hush()
    clocks = [Clock()]
    lightning.build(
        pipe,
        Recipe.of(pipe, plans=[Plan.parse(PLAN)], solver=solver, guidance=GUIDANCE),
        lightning.PromptData(prompts, BATCH),
        folder,
        devices=launched(),
        accelerator="cpu",
        progress=lambda now: clocks.append(Clock()),
    )
    if is_first():
        return costs(rows, clocks[1], folder)
    folder.with_name(f"{folder.name}.seconds.{os.environ['RANK']}").write_text(str(clocks[0].processor()))
    return None


class Clock:
    """Seconds since it was made: of the wall, and of this process's processors."""

    def __init__(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def wall(self) -> float:
        """By the clock on the wall."""
        return time.perf_counter() - self.began[0]

    def processor(self) -> float:
        """By all threads of this process together."""
        return time.process_time() - self.began[1]


def costs(rows: int, clock: Clock, folder: Path) -> dict[str, float]:
    wall, processor = clock.wall(), clock.processor()
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rows_per_s": rows / wall, "processor_s": processor, "bytes_per_row": size / rows, "peak_mb": peak}


def synthetic(folder: Path, rows: int, shape: tuple[int, ...]) -> None:
    """A knowledge base of random rows of three samples each."""
    import torch

    from redi.knowledge_base import Config, Fingerprint, Writer
    from redi.types import Record, Rows

    mark = Fingerprint(
        model="synthetic",
        weights="",
        adapters=(),
        pipeline="",
        scheduler="DDIMScheduler",
        scheduler_config={},
        steps=STEPS,
        guidance=GUIDANCE,
        guidance_rescale=0.0,
        negative_prompt="",
        height=None,
        width=None,
        dtype="float32",
        sample_shape=shape,
    )
    noise = {"seed": 0, "size": 1, "shape": list(shape), "diversity": 0.0}
    config = Config(mark, Record(frozenset({0, 10, 30})), noise, (PLAN,))
    generator = torch.Generator().manual_seed(0)
    with Writer.open(folder, config) as writer:
        for at in range(0, rows, 256):
            count = min(256, rows - at)
            samples = {e: torch.randn(count, *shape, generator=generator) for e in (0, 10, 30)}
            prompts = [f"a caption of about fifty letters, number {i}" for i in range(at, at + count)]
            ids = torch.zeros(count, dtype=torch.int64)
            writer.append(Rows(samples, {}, {}, ids, torch.zeros(count, 8), prompts))


def write_many(folder: Path, rows: int) -> None:
    synthetic(folder, rows, (4, 2, 2))


def write_large(folder: Path, rows: int) -> None:
    synthetic(folder, rows, (4, 64, 64))


def open_(folder: Path, rows: int) -> dict[str, float]:
    from redi.knowledge_base import KnowledgeBase

    before, began = resident(), time.perf_counter()
    kb = KnowledgeBase.open(folder)
    seconds = time.perf_counter() - began
    assert len(kb) == rows
    return {"ms": 1e3 * seconds, "mb": resident() - before}


def fetch(folder: Path, rows: int) -> dict[str, float]:
    import torch

    from redi.knowledge_base import KnowledgeBase

    kb, generator = KnowledgeBase.open(folder), torch.Generator().manual_seed(0)
    kb.gather(torch.arange(rows))  # warm
    took: list[float] = []
    for _ in range(300):
        ids = torch.randint(rows, (8,), generator=generator)
        began = time.perf_counter()
        kb.gather(ids)
        took.append(time.perf_counter() - began)
    return {"ms": 1e3 * statistics.median(took), "ms_p90": 1e3 * sorted(took)[270]}


def resident() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


PARTS: dict[str, Any] = {
    "naive": naive,
    "redi": redi,
    "in_turn": in_turn,
    "one_rank": redi,
    "two_ranks": two_ranks,
    "write_many": write_many,
    "write_large": write_large,
    "open": open_,
    "fetch": fetch,
}


if __name__ == "__main__":
    sys.exit(main())
