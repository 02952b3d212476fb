"""How rows lie in a shard: which tensors, under which names, with which shapes.

`sample.00012`, `denoised.00012`, `unconditional.00012`, `history.00012.<leaf>`, `noise_id`, `embedding`; every first
dimension is the rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from redi.knowledge_base.config import Config
from redi.types import Record, Rows

NOISE_ID: Final = "noise_id"
EMBEDDING: Final = "embedding"
_LEAF: Final = re.compile(r"history\.([0-9]{5,9})\.([A-Za-z0-9_.]+)", re.ASCII)


def flatten(rows: Rows) -> dict[str, Tensor]:
    """The tensors of rows by the name they have in a shard."""
    return {
        **{f"sample.{e:05d}": x for e, x in rows.samples.items()},
        **{f"denoised.{e:05d}": x for e, x in rows.denoised.items()},
        **{f"unconditional.{e:05d}": x for e, x in rows.unconditional.items()},
        **{f"history.{e:05d}.{leaf}": x for e, leaves in rows.history.items() for leaf, x in leaves.items()},
        NOISE_ID: rows.noise_ids,
        EMBEDDING: rows.embeddings,
    }


def assemble(tensors: Mapping[str, Tensor], prompts: Sequence[str], record: Record) -> Rows:
    """The inverse of `flatten`, for tensors whose names were checked."""
    history: dict[int, dict[str, Tensor]] = {e: {} for e in sorted(record.history)}
    for name, tensor in tensors.items():
        if m := _LEAF.fullmatch(name):
            history[int(m[1])][m[2]] = tensor
    return Rows(
        samples={e: tensors[f"sample.{e:05d}"] for e in sorted(record.samples)},
        denoised={e: tensors[f"denoised.{e:05d}"] for e in sorted(record.denoised)},
        history=history,
        noise_ids=tensors[NOISE_ID],
        embeddings=tensors[EMBEDDING],
        prompts=prompts,
        unconditional={e: tensors[f"unconditional.{e:05d}"] for e in sorted(record.unconditional)},
    )


def dtype(name: str, config: Config) -> torch.dtype:
    """What a tensor is stored as."""
    return torch.int64 if name == NOISE_ID else config.dtype


def wrong(layout: Mapping[str, tuple[int, ...]], config: Config) -> list[str]:
    """What in a layout (tensor → shape of one row) is not as the configuration promises, in words."""
    shape, record = config.fingerprint.sample_shape, config.record
    kinds = {"sample": record.samples, "denoised": record.denoised, "unconditional": record.unconditional}
    plain = {f"{kind}.{e:05d}" for kind, entries in kinds.items() for e in entries}
    found = [f"{name} is missing" for name in sorted(plain | {NOISE_ID, EMBEDDING}) if name not in layout]
    for name, given in layout.items():
        leaf = _LEAF.fullmatch(name)
        if name == NOISE_ID:
            expected = not given
        elif name == EMBEDDING:
            expected = len(given) == 1
        elif name in plain or (
            leaf and int(leaf[1]) in record.history and name == f"history.{int(leaf[1]):05d}.{leaf[2]}"
        ):
            expected = given == shape
        else:
            found.append(f"{name} is not recorded")
            continue
        if not expected:
            found.append(f"a row of {name} has shape {given}, samples have {shape}")
    return found
