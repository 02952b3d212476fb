"""Whether rows may enter a knowledge base: all in the shapes it promises, each of them finite as it is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redi.errors import InvalidInputError
from redi.knowledge_base import layout
from redi.knowledge_base.config import Config
from redi.types import Rows


def admit(
    rows: Rows, path: Path, config: Config, known: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Tensor], dict[int, str]]:
    """Copies of rows in host memory as they will be stored, and row → reason for each row that cannot be.

    Args:
        rows: on any device and of any floating dtype.
        path: the knowledge base, for messages.
        config: of the knowledge base.
        known: tensor → shape of one row in the rows before; empty if there are none.

    Raises:
        InvalidInputError: entries or shapes are not those of the configuration.
    """
    given = layout.flatten(rows)
    _check(rows, given, path, config, known)
    stored: dict[str, Tensor] = {}
    reasons = {i: "the prompt is not valid Unicode" for i, p in enumerate(rows.prompts) if not _is_unicode(p)}
    for name, tensor in given.items():
        stored[name], broken = _cast(name, tensor, layout.dtype(name, config))
        reasons = broken | reasons
    return stored, reasons


def _check(
    rows: Rows, given: Mapping[str, Tensor], path: Path, config: Config, known: Mapping[str, tuple[int, ...]]
) -> None:
    n, shapes = len(rows), {name: tuple(tensor.shape[1:]) for name, tensor in given.items()}
    wrong = [
        f"{name} has first dimension {tuple(t.shape)[:1]}, there are {n} prompts"
        for name, t in given.items()
        if tuple(t.shape)[:1] != (n,)
    ]
    wrong += layout.wrong(shapes, config)
    if frozenset(rows.history) != config.record.history:
        wrong.append(f"history is at entries {sorted(rows.history)}")
    if not wrong and known and shapes != known:
        names = sorted(name for name in {*shapes, *known} if shapes.get(name) != known.get(name))
        wrong.append(f"{', '.join(names)} differ from the rows before: {known}, now {shapes}")
    wrong += [
        f"{name} must be floating, given {t.dtype}"
        for name, t in given.items()
        if name != layout.NOISE_ID and not t.is_floating_point()
    ]
    bank: Any = config.noise.get("size")
    ids = rows.noise_ids
    if not wrong and (int(ids.min()) < 0 or (isinstance(bank, int) and int(ids.max()) >= bank)):
        wrong.append(f"noise ids run from {int(ids.min())} to {int(ids.max())}, the bank has 0 … {bank} − 1")
    if wrong:
        r = config.record
        raise InvalidInputError(
            f"rows of {path} hold samples of shape {config.fingerprint.sample_shape} at entries "
            f"{sorted(r.samples)}, denoised at {sorted(r.denoised)}, history at {sorted(r.history)}, unconditional at "
            f"{sorted(r.unconditional)}; "
            f"given: {'; '.join(wrong)}"
        )


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, dict[int, str]]:
    """A copy in host memory as it will be stored, and row → reason for each row that cannot be."""
    source = tensor.detach()
    # a copy always: the caller may reuse its buffers before the shard is full
    stored = source.to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
    broken: dict[int, str] = {}
    for i in _rows_not_finite(stored):
        row = source[i].double()
        if bool(torch.isfinite(row).all()):
            broken[i] = f"{name} reaches {float(row.abs().max()):.3g}, beyond {dtype}; store it as float32 or bfloat16"
        else:
            broken[i] = f"{name} is not finite"
    return stored, broken


def _rows_not_finite(tensor: Tensor) -> Sequence[int]:
    finite = torch.isfinite(tensor).reshape(len(tensor), -1).all(1)
    return (~finite).nonzero().flatten().tolist()


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
