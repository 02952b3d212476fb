"""Exact search against what the machine can do and what others do, as ratios of the same run on one thread.

python -m benchmarks.retrievers.ratios JOB.json
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray


def main(job: dict[str, Any]) -> None:
    import torch

    from benchmarks.retrievers.keys import Data
    from redi.backends import Exact

    torch.set_num_threads(job["threads"])
    data = Data.of(job["data"])
    source = data.open(job["rows"])
    keys = np.empty((job["rows"], data.dimension), np.float32)
    at = 0
    for chunk in source.chunks():
        keys[at : at + len(chunk)] = chunk
        at += len(chunk)
    queries = np.resize(np.load(data.queries), (64, data.dimension))
    x, q, half = torch.from_numpy(keys), torch.from_numpy(queries), torch.from_numpy(keys[: len(keys) // 4]).half()
    exact, exact_half, flat = Exact().build(keys), Exact().build(half.numpy()), _flat(keys, job["threads"])
    floats, floats_half = Exact(code_bytes=0).build(keys), Exact(code_bytes=0).build(half.numpy())
    one = {
        "read: torch.sum": x.sum,
        "read: torch.max": x.max,
        "read: torch.mv": lambda: torch.mv(x, q[0]),
        "Exact": lambda: exact.search(queries[:1], 2),
        "Exact, without codes": lambda: floats.search(queries[:1], 2),
    }
    many = {
        "sgemm": lambda: torch.mm(x, q.T),
        "Exact": lambda: exact.search(queries, 2),
        "Exact, without codes": lambda: floats.search(queries, 2),
    }
    if flat is not None:
        one["IndexFlatL2"] = lambda: flat.search(queries[:1], 2)
        many["IndexFlatL2"] = lambda: flat.search(queries, 2)
    first, batch = interleaved(one, job["repeats"]), interleaved(many, max(2, job["repeats"] // 3))
    quarter = interleaved(
        {
            "Exact, float16 keys": lambda: exact_half.search(queries[:1], 2),
            "Exact, float16 keys, without codes": lambda: floats_half.search(queries[:1], 2),
        },
        job["repeats"],
    )
    readers = [name for name in first if name.startswith("read")]
    result: dict[str, Any] = {
        "keys": {"data": data.name, "rows": job["rows"], "dimension": data.dimension, "dtype": "float32"},
        "threads": job["threads"],
        "repeats": job["repeats"],
        "milliseconds_batch_1": {name: _spread(v) for name, v in (first | quarter).items()},
        "milliseconds_batch_64": {name: _spread(v) for name, v in batch.items()},
        "read_gb_per_s": keys.nbytes / min(min(first[name]) for name in readers) / 1e9,
        "exact_of_read_bandwidth": _times(first, readers, "Exact"),
        "exact_of_sgemm": _times(batch, ["sgemm"], "Exact"),
        "codes_over_floats_batch_1": _times(first, ["Exact, without codes"], "Exact"),
        "codes_over_floats_batch_64": _times(batch, ["Exact, without codes"], "Exact"),
        "codes_over_floats_float16": _times(quarter, ["Exact, float16 keys, without codes"], "Exact, float16 keys"),
        "float16_rows": len(half),
        "clustered": clustered(job["cluster_rows"], data.dimension, job["threads"], job["repeats"]),
    }
    if flat is not None:
        result["exact_over_faiss_batch_1"] = _times(first, ["IndexFlatL2"], "Exact")
        result["exact_over_faiss_batch_64"] = _times(batch, ["IndexFlatL2"], "Exact")
    Path(job["out"], "result.json").write_text(json.dumps(result))


def interleaved(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, one after the other in every round, so that a busy machine slows them alike."""
    for call in calls.values():
        call()
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            took[name].append(time.perf_counter() - start)
    return took


def tight_cluster(n: int, d: int) -> tuple[ndarray, ndarray]:
    """Keys 0.01 apart at latents of standard deviation 14.6, and 64 queries between them."""
    rng = np.random.default_rng(0)
    origin = 14.6 * rng.normal(size=d)
    rows = np.empty((n + 64, d), np.float32)
    for i in range(len(rows)):
        step = rng.normal(size=d)
        rows[i] = origin + step * (0.01 / np.linalg.norm(step))
    return rows[:n], rows[n:]


def clustered(n: int, d: int, threads: int, repeats: int) -> dict[str, Any]:
    """How many of 8, 32 and 64 queries get a wrong nearest key, and what they cost."""
    from benchmarks.retrievers.truth import nearest
    from redi.backends import Exact

    keys, queries = tight_cluster(n, d)
    truth = nearest([keys], keys.__getitem__, queries, 1, lambda _: None).ids[:, 0]
    exact, flat = Exact().build(keys), _flat(keys, threads)
    said: dict[str, Callable[[ndarray], ndarray]] = {"Exact": lambda q: exact.search(q, 1).ids[:, 0]}
    if flat is not None:
        said["IndexFlatL2"] = lambda q: flat.search(q, 1)[1][:, 0]
    sizes = (8, 32, 64)
    wrong = {name: {b: int((ask(queries[:b]) != truth[:b]).sum()) for b in sizes} for name, ask in said.items()}
    took = {
        b: interleaved(
            {name: (lambda ask=ask, b=b: ask(queries[:b])) for name, ask in said.items()}, max(2, repeats // 3)
        )
        for b in (1, 64)
    }
    spread = {f"milliseconds_batch_{b}": {name: _spread(v) for name, v in t.items()} for b, t in took.items()}
    return {"rows": n, "dimension": d, "wrong_nearest_of": wrong, **spread}


def _times(took: Mapping[str, list[float]], others: Sequence[str], ours: str) -> dict[str, float]:
    """How many times as long the fastest of the others takes: of medians, and of what each takes undisturbed."""
    return {
        "medians": float(min(np.median(took[name]) for name in others) / np.median(took[ours])),
        "least": min(min(took[name]) for name in others) / min(took[ours]),
    }


def _flat(keys: ndarray, threads: int) -> Any:
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatL2(keys.shape[1])
    index.add(keys)
    return index


def _spread(seconds: list[float]) -> dict[str, float]:
    return {"median": 1e3 * float(np.median(seconds)), "least": 1e3 * min(seconds), "most": 1e3 * max(seconds)}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
