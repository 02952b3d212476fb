"""One setting of one retriever on one set of keys, in a process of its own; its answers go to files, unjudged.

python -m benchmarks.retrievers.measure JOB.json
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

MOST: Final = 200  # repetitions that are enough for a 99th percentile


def main(job: dict[str, Any]) -> None:
    import torch

    from benchmarks.retrievers.keys import Data
    from redi.cli import names

    torch.set_num_threads(job["threads"])
    data = Data.of(job["data"])
    keys, queries = data.open(job["rows"]), np.load(data.queries)
    k = min(job["k"], job["rows"])
    retriever = names.retriever(job["retriever"])
    torch.ones(64, 64) @ torch.ones(64, 64)  # so that the libraries' own memory is not the index's
    source: Any = keys.world if keys.array is None else keys.array
    place = Path(job["index"] or Path(job["out"], "index"))
    said = place.with_suffix(".json")
    if said.exists():  # built for another way of searching it
        index = retriever.load(place, keys=source)
    else:
        before = memory()
        start = time.perf_counter()
        index = (
            retriever.build(source)
            if keys.world is None
            else retriever.build_from(source.chunks, source.shape, keys=source)
        )
        seconds = time.perf_counter() - start
        built = memory()
        index.save(place, with_keys=False)
        figures = {
            "build_seconds": seconds,
            "build_peak_rss_bytes": built["VmHWM"],
            "resident_bytes": built["RssAnon"] - before["RssAnon"],
            "index_bytes": sum(f.stat().st_size for f in place.iterdir()),
        }
        said.write_text(json.dumps(figures))
    result: dict[str, Any] = json.loads(said.read_text())
    result["keys_bytes"] = job["rows"] * data.dimension * 2 if index.stored_keys is not None else 0
    answers: dict[str, np.ndarray] = {}
    for batch in job["batches"]:
        parts = [queries[i : i + batch] for i in range(0, len(queries), batch) if i + batch <= len(queries)]
        if not parts:
            continue
        answers[str(batch)] = np.concatenate([index.search(part, k).ids for part in parts])
        result[f"batch {batch}"] = percentiles(
            lambda i, parts=parts: index.search(parts[i % len(parts)], k), job["seconds"]
        )
    if keys.array is not None:
        found = answers["1"]
        result["gather"] = percentiles(lambda i: keys.fetch(found[i % len(found)]), job["seconds"] / 4)
    result["peak_rss_bytes"] = memory()["VmHWM"]
    np.savez(Path(job["out"]) / "answers.npz", **answers)
    (Path(job["out"]) / "result.json").write_text(json.dumps(result))


def percentiles(call: Callable[[int], Any], seconds: float) -> dict[str, float]:
    """Milliseconds of a call, repeated for so many seconds (but three times at least).

    The processor's time is what a busy machine distorts least; of one thread on an idle machine it is the wall's.
    """
    took: list[float] = []
    worked: list[float] = []
    end = time.perf_counter() + seconds
    while len(took) < 3 or (time.perf_counter() < end and len(took) < MOST):
        start, cpu = time.perf_counter(), time.process_time()
        call(len(took))
        worked.append(1e3 * (time.process_time() - cpu))
        took.append(1e3 * (time.perf_counter() - start))
    p50, p95, p99 = np.percentile(took, (50, 95, 99))
    return {
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "least_ms": min(took),
        "cpu_p50_ms": float(np.median(worked)),
        "repeats": len(took),
    }


def memory() -> dict[str, int]:
    """Bytes of this process: VmHWM, the most it ever had resident, and RssAnon, what it has now that is no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    said = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    return {name: 1024 * int(said[name][0]) for name in ("VmHWM", "RssAnon")}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
