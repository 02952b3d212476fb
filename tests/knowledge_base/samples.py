"""Configurations and rows to write, drawn or made to measure."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import strategies as st
from torch import Tensor

from redi.knowledge_base import Config, Fingerprint, KnowledgeBase, Writer
from redi.types import Record, Rows

RECORD = Record(samples=frozenset({0, 5, 40}), denoised=frozenset({0, 5}), history=frozenset({5}))


def fingerprint(**changed: object) -> Fingerprint:
    settings: dict[str, object] = {
        "model": "a/model",
        "weights": "ab" * 32,
        "adapters": ("ink",),
        "pipeline": "StableDiffusionPipeline",
        "scheduler": "DPMSolverMultistepScheduler",
        "scheduler_config": {
            "solver_order": 2,
            "lambda_min_clipped": -float("inf"),
            "trained_betas": None,
            "nested": {"a": [1, 2], "b": "text"},
            "_diffusers_version": "0.36",
        },
        "steps": 40,
        "guidance": 3.0,
        "guidance_rescale": 0.0,
        "negative_prompt": "",
        "height": 32,
        "width": None,
        "dtype": "float32",
        "sample_shape": (2, 3),
    }
    return Fingerprint(**(settings | changed))  # type: ignore[arg-type]


def config(record: Record = RECORD, storage: str = "float16", noises: int = 3, **changed: object) -> Config:
    noise = {"seed": 7, "size": noises, "shape": [2, 3], "diversity": 0.0}
    return Config(fingerprint(**changed), record, noise, ("coarse:8/40",), storage)


def rows(of: Config, first: int, stop: int, width: int = 4, dtype: torch.dtype = torch.float32) -> Rows:
    """Rows `first` … `stop` − 1 of one endless sequence: the same row whatever the range it is asked for in."""

    def numbers(salt: int, shape: tuple[int, ...]) -> Tensor:
        each = [
            torch.randn(shape, generator=torch.Generator().manual_seed(salt * 100_003 + i)) for i in range(first, stop)
        ]
        return (torch.stack(each) if each else torch.empty(0, *shape)).to(dtype)

    shape, record, noises = of.fingerprint.sample_shape, of.record, int(of.noise["size"])
    ids = torch.arange(first, stop)
    return Rows(
        samples={e: numbers(1 + e, shape) for e in record.samples},
        denoised={e: numbers(1001 + e, shape) for e in record.denoised},
        history={
            e: {leaf: numbers(2001 + e + 50 * j, shape) for j, leaf in enumerate(("ets.0", "last_sample"))}
            for e in record.history
        },
        noise_ids=ids % noises,
        embeddings=numbers(3001, (width,)),
        prompts=[f"prompt {i // noises}, “quoted” 🦊\n" for i in range(first, stop)],
        unconditional={e: numbers(4001 + e, shape) for e in record.unconditional},
    )


def make(path: Path, of: Config | None = None, count: int = 20, shard_rows: int = 8) -> KnowledgeBase:
    of = of or config()
    with Writer.open(path, of, shard_rows) as writer:
        writer.append(rows(of, 0, count))
    return KnowledgeBase.open(path)


def leaves(given: Rows) -> dict[str, Tensor]:
    return {
        **{f"sample {e}": t for e, t in given.samples.items()},
        **{f"denoised {e}": t for e, t in given.denoised.items()},
        **{f"unconditional {e}": t for e, t in given.unconditional.items()},
        **{f"history {e} {leaf}": t for e, of in given.history.items() for leaf, t in of.items()},
        "noise": given.noise_ids,
        "embedding": given.embeddings,
    }


def same(left: Rows, right: Rows, dtype: torch.dtype) -> bool:
    """Whether `left` is `right` stored as `dtype`, bit for bit."""
    a, b = leaves(left), leaves(right)
    return (
        list(left.prompts) == list(right.prompts)
        and a.keys() == b.keys()
        and all(torch.equal(a[n], b[n].to(dtype) if b[n].is_floating_point() else b[n]) for n in a)
        and all(a[n].dtype == (dtype if b[n].is_floating_point() else torch.int64) for n in a)
    )


_entries = st.frozensets(st.integers(0, 99_999), max_size=3)
records = st.builds(Record, _entries, _entries, _entries, _entries).filter(lambda r: bool(r.samples | r.denoised))
storages = st.sampled_from(["float16", "float32", "bfloat16"])
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
