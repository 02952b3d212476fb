"""The benchmark's command line; see `benchmarks.retrievers`.

    python -m benchmarks.retrievers --quick --json bench/retrievers.json

Leaves the JSON, and beside it a CSV and two plots. Run again, it goes on: rows that were measured are kept.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.retrievers import grid, plots
from benchmarks.retrievers.data import SHAPES, Scale, real, synthetic
from benchmarks.retrievers.keys import Data
from benchmarks.retrievers.leap import Leap
from benchmarks.retrievers.truth import Truth, nearest, score
from redi.cli.console import write_json

ROOT = Path(__file__).parents[2]
PACKAGES = ("redi", "torch", "numpy", "faiss-cpu", "faiss-gpu", "hnswlib", "scann")
MOST_SAVED = 6 * 1024**3  # bytes of keys that are put on the disk; more are made as they are asked for


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.retrievers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, default=Path("bench/retrievers.json"), metavar="FILE")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="for keys; by default beside the JSON")
    parser.add_argument("--quick", action="store_true", help="everything once, on little data, in under a minute")
    parser.add_argument(
        "--only", nargs="+", metavar="DATA", help="denoised@0, sample@…, or a shape: " + ", ".join(SHAPES)
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 80_000], help="of the synthetic keys")
    parser.add_argument("--retrievers", nargs="+", metavar="R", help="instead of the grid")
    parser.add_argument("--neighbors", type=int, default=16, metavar="H")
    parser.add_argument("--queries", type=int, default=128, help="held-out ones")
    parser.add_argument("--real-rows", type=int, default=1000, help="trajectories of the bundled model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="of repeating each measurement")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds after which a setting is given up")
    parser.add_argument("--ratio-rows", type=int, default=20_000, help="0 leaves the ratios out")
    parser.add_argument("--repeats", type=int, default=15, help="of each call in the ratios")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    if given.quick:
        given.rows, given.queries, given.real_rows, given.seconds = [500], 8, 48, 0.1
        given.ratio_rows, given.repeats, given.timeout = min(given.ratio_rows, 1000), 5, 60.0
    cache = given.cache or given.json.parent / "retrievers-cache"
    cache.mkdir(parents=True, exist_ok=True)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    fine, steps, entries = (8, 4, (2,)) if given.quick else (40, 8, (10, 20))
    scale = Scale(fine, steps, given.real_rows, given.queries, entries)
    document: dict[str, Any] = json.loads(given.json.read_text()) if given.json.exists() else {"rows": [], "ratios": {}}
    document |= {
        "command": " ".join(["python -m benchmarks.retrievers", *(sys.argv[1:] if argv is None else argv)]),
        "machine": machine(),
        "versions": versions(),
        "seed": given.seed,
        "neighbors": given.neighbors,
        "plan": str(scale.coarse),
        "latency_is": "milliseconds of a call with so many queries, re-rank included; RSS counts pages of mapped keys",
    }
    train, heldout, found = real(cache, scale, given.seed)
    leap = Leap(train, heldout, scale)

    def wanted(name: str) -> bool:
        return not given.only or name in given.only

    todo: list[tuple[Data, int, str]] = []
    for data in filter(lambda d: wanted(d.name), found):
        todo += [(data, data.rows, s) for s in given.retrievers or settings(given, data, data.rows)]
    for name in filter(wanted, ["4x64x64"] if given.quick else SHAPES):
        saved = [n for n in given.rows if 2 * n * int(np.prod(SHAPES[name])) <= MOST_SAVED]
        for n in given.rows:
            data = synthetic(
                cache, train, name, n if n not in saved else max(saved), scale, given.seed, stream=n not in saved
            )
            todo += [(data, n, s) for s in given.retrievers or settings(given, data, n)]

    if given.ratio_rows and str(given.ratio_rows) not in document["ratios"]:
        data = synthetic(cache, train, "4x64x64", given.ratio_rows, scale, given.seed, stream=True)
        job = {"rows": given.ratio_rows, "repeats": given.repeats, "cluster_rows": min(4000, given.ratio_rows)}
        status, result, _ = apart("ratios", job, data, given)
        document["ratios"][str(given.ratio_rows)] = {"status": status, **result}
        write_json(given.json, document)

    document["rows"] = [row for row in document["rows"] if row["status"] == "ok"]  # what failed is tried again
    done = {identity(row) for row in document["rows"]}
    with tqdm(todo, desc="measuring", unit="setting") as bar:
        for data, n, setting in bar:
            row: dict[str, Any] = {
                "data": data.name,
                "synthetic": data.synthetic,
                "rows": n,
                "dimension": data.dimension,
                "retriever": setting,
                "threads": given.threads,
            }
            bar.set_postfix_str(f"{data.name} {n:,} {setting}")
            if identity(row) in done:
                continue
            job = {
                "rows": n,
                "retriever": setting,
                "k": given.neighbors,
                "batches": [1, 8, 64],
                "seconds": given.seconds,
                "index": shared_index(data, n, setting, todo, cache),
            }
            status, result, answers = apart("measure", job, data, given)
            row |= {"status": status, **result}
            if status == "ok":
                row |= judged(data, n, answers, given, cache, leap)
            document["rows"].append(row)
            write_json(given.json, document)
    finish(document, given.json)
    return 0


def shared_index(data: Data, n: int, setting: str, todo: Sequence[tuple[Data, int, str]], cache: Path) -> str | None:
    """Where the index of this setting is kept, if others search the same one in another way."""
    build = grid.build_of(setting)
    if sum((d, m, grid.build_of(s)) == (data, n, build) for d, m, s in todo) < 2:
        return None
    return str((cache / f"index-{data.file.stem}-{n}-{build.replace(':', '-')}").absolute())


def settings(given: argparse.Namespace, data: Data, n: int) -> Sequence[str]:
    if given.quick:
        return ["exact"] if data.name.startswith("sample") else grid.QUICK
    return grid.settings(n, data.dimension, stream=data.file.suffix == ".npz")


def apart(
    what: str, job: dict[str, Any], data: Data, given: argparse.Namespace
) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """Run one measurement in a new process: "ok" or what became of it, its figures, and its answers by batch size."""
    threads = str(given.threads)
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    with tempfile.TemporaryDirectory(prefix="redi-bench-") as out:
        job = job | {"data": dataclasses.asdict(data), "threads": given.threads, "out": out}
        file = Path(out) / "job.json"
        file.write_text(json.dumps(job, default=lambda p: str(p.absolute())))
        try:
            ran = subprocess.run(
                [sys.executable, "-m", f"benchmarks.retrievers.{what}", str(file)],
                cwd=ROOT,
                env=os.environ | limits | {"OMP_WAIT_POLICY": "PASSIVE"},
                capture_output=True,
                text=True,
                timeout=given.timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"given up after {given.timeout:g} s", {}, {}
        if ran.returncode:
            last = (ran.stderr.strip().splitlines() or [""])[-1]
            return (f"killed by signal {-ran.returncode}" if ran.returncode < 0 else last), {}, {}
        result = json.loads((Path(out) / "result.json").read_text())
        answers = Path(out) / "answers.npz"
        with np.load(answers) if answers.exists() else tempfile.TemporaryFile() as f:
            return "ok", result, dict(f) if answers.exists() else {}


def judged(
    data: Data, n: int, answers: dict[str, np.ndarray], given: argparse.Namespace, cache: Path, leap: Leap
) -> dict[str, Any]:
    """How good the answers are, by batch size where it makes a difference, and the error of the leap made of them."""
    keys, queries = data.open(n), np.load(data.queries)
    file = cache / f"truth-{data.file.stem}-{n}-{len(queries)}-{given.neighbors}.npz"
    if not file.exists():
        with tqdm(desc=f"the truth about {data.name}", total=n, unit="row", leave=False) as bar:
            truth = nearest(keys.chunks(), keys.fetch, queries, given.neighbors, bar.update)
        np.savez(file, ids=truth.ids, distances=truth.distances)
    with np.load(file) as f:
        truth = Truth(f["ids"], f["distances"])
    ids = answers["1"]
    row: dict[str, Any] = {"recall": score(truth, ids, keys.fetch, queries)}
    for batch, other in answers.items():
        if not np.array_equal(other, ids[: len(other)]):
            some = Truth(truth.ids[: len(other)], truth.distances[: len(other)])
            row[f"recall in batches of {batch}"] = score(some, other, keys.fetch, queries[: len(other)])
    if data.name == "denoised@0":
        row["leap"] = {
            "latent_error": leap.error(ids),
            "exact": leap.error(truth.ids),
            "no_neighbours": leap.error(None),
        }
    return row


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("data", "rows", "retriever", "threads"))


def finish(document: dict[str, Any], path: Path) -> None:
    """The CSV and the plots."""
    flat = [flattened(row) for row in document["rows"]]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(flat)
    plots.pareto(document["rows"], path.with_name(f"{path.stem}-pareto.png"))
    plots.crossover(document["rows"], path.with_name(f"{path.stem}-crossover.png"))


def flattened(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, inner in value.items():
        result |= flattened(inner, f"{prefix}{name}/") if isinstance(inner, dict) else {prefix + name: inner}
    return result


def machine() -> dict[str, Any]:
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": cpu[0].partition(": ")[2] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "load": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
