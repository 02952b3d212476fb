"""safetensors files as memory maps: a header of names, dtypes and places, then bytes. Nothing is ever unpickled.

The format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, one buffer).
"""

from __future__ import annotations

import math
import mmap
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, cast, final

import torch
from torch import Tensor

from redi.errors import KnowledgeBaseError
from redi.knowledge_base import files

_NAMES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPES: Final = {dtype: name for name, dtype in _NAMES.items()}
_LONGEST_HEADER: Final = 100_000_000  # the limit of the safetensors library
_ADVISED: Final = 4096  # rows: above this, asking for each costs more than it saves
# Private writable maps of more than the memory are refused unless no swap need be set aside for them.
_NO_RESERVE: Final[int] = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: its dtype and shape, and where its bytes are, counted from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def row(self) -> int:
        """Bytes of a row; none where there are no rows."""
        return (self.stop - self.start) // self.shape[0] if self.shape and self.shape[0] else 0


@final
class TensorFile:
    """A safetensors file, mapped into memory; its tensors are views of the map, read from the disk when touched.

    Writing into a view changes this process's view, never the file.

    Args:
        path: a plain file.

    Raises:
        KnowledgeBaseError: it is missing, a link, or not a whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = _mapped(path)
        self.entries = _header(self._map, path)
        self.tensors: Mapping[str, Tensor] = {name: self._view(e) for name, e in self.entries.items()}

    def _view(self, entry: Entry) -> Tensor:
        if entry.start == entry.stop:
            return torch.empty(entry.shape, dtype=entry.dtype)
        flat = torch.frombuffer(self._map, dtype=entry.dtype, count=math.prod(entry.shape), offset=entry.start)
        return flat.view(entry.shape)

    def gather(self, name: str, ids: Tensor) -> Tensor:
        """Rows `ids` (any shape, within range) of one tensor, copied."""
        tensor, entry = self.tensors[name], self.entries[name]
        if ids.numel() <= _ADVISED and entry.row >= mmap.PAGESIZE:
            self._will_need(entry, ids.unique().tolist())
        return tensor.index_select(0, ids.flatten()).view(ids.shape + tensor.shape[1:])

    def copy(self, name: str, ids: Sequence[int], out: Tensor, target: memoryview, at: Sequence[int]) -> None:
        """Copy rows `ids` of one tensor to the rows `at` of `out`, which is contiguous and of the same dtype.

        A few rows of many small files are a matter of microseconds, of which tensors would take most: so its bytes,
        `raw(out)`, are given too.
        """
        entry = self.entries[name]
        if len(ids) > _ADVISED:
            out[torch.tensor(at)] = self.tensors[name][torch.tensor(ids)]
        elif entry.start != entry.stop:
            self._will_need(entry, ids)
            row, source = entry.row, memoryview(self._map)
            for i, j in zip(ids, at, strict=True):
                target[j * row : (j + 1) * row] = source[entry.start + i * row : entry.start + (i + 1) * row]

    def _will_need(self, entry: Entry, ids: Sequence[int]) -> None:
        """Have the kernel fetch all rows at once: cold rows otherwise come one fault after another."""
        if not hasattr(mmap, "MADV_WILLNEED") or entry.row < mmap.PAGESIZE:  # a page is one fault, whoever asks for it
            return
        for i in ids:
            start = entry.start + i * entry.row
            first = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, first, start + entry.row - first)


def _mapped(path: Path) -> mmap.mmap:
    descriptor = files.open_to_read(path)
    try:
        if os.fstat(descriptor).st_size < 8:
            raise KnowledgeBaseError(f"{path}: truncated, {os.fstat(descriptor).st_size} bytes")
        # Private and writable: torch has no read-only tensors, and writing into a read-only map kills the process.
        if sys.platform == "win32":
            return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
        return mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as e:
        raise KnowledgeBaseError(f"{path}: cannot be mapped ({e.strerror})") from e
    finally:
        os.close(descriptor)


def _header(content: mmap.mmap, path: Path) -> dict[str, Entry]:
    """The tensors of a file: known dtypes, and places that tile the buffer without gaps, overlaps or remainder."""
    length = int.from_bytes(content[:8], "little")
    if length > min(_LONGEST_HEADER, len(content) - 8):
        raise KnowledgeBaseError(f"{path}: is not a safetensors file, or truncated (a header of {length} bytes)")
    header = files.parse_json(content[8 : 8 + length], path)
    if not isinstance(header, dict):
        raise KnowledgeBaseError(f"{path}: is not a safetensors file (its header is no JSON object)")
    base, found = 8 + length, dict[str, Entry]()
    for name, value in cast("dict[str, Any]", header).items():
        if name == "__metadata__":
            continue
        match value:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]} if (
                dtype in _NAMES
                and all(type(n) is int and n >= 0 for n in shape)
                and stop - start == math.prod(shape) * _NAMES[dtype].itemsize
            ):
                found[name] = Entry(_NAMES[dtype], tuple(shape), base + start, base + stop)
            case _:
                raise KnowledgeBaseError(f"{path}: tensor {name!r} has a header that cannot be: {str(value)[:120]}")
    end = base
    for name, entry in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise KnowledgeBaseError(f"{path}: tensor {name!r} leaves a gap or overlaps another")
        if entry.start % entry.dtype.itemsize and entry.start != entry.stop:
            raise KnowledgeBaseError(f"{path}: tensor {name!r} is not aligned to its dtype")
        end = entry.stop
    if end != len(content):
        raise KnowledgeBaseError(f"{path}: expected {end} bytes, given {len(content)}: truncated, or something added")
    return found


def begin(file: IO[bytes], shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Entry]:
    """Write the header of a file whose tensors follow with `put`, in any order; the file gets its full size now.

    Args:
        file: empty, opened for writing.
        shapes: name → dtype and shape.

    Returns:
        Where each tensor goes.
    """
    # widest dtype first keeps every tensor aligned
    order = sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        dtype, shape = shapes[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = files.dump(header, indent=None)
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    base = 8 + len(text)
    file.truncate(base + end)
    return {
        name: Entry(shapes[name][0], shapes[name][1], base + h["data_offsets"][0], base + h["data_offsets"][1])
        for name, h in header.items()
    }


def put(file: IO[bytes], entry: Entry, first: int, rows: Tensor) -> None:
    """Write rows `first`, `first + 1`, … of one tensor."""
    row = (entry.stop - entry.start) // max(1, entry.shape[0])
    file.seek(entry.start + first * row)
    file.write(raw(rows))


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return cast(Any, flat.view(torch.uint8).numpy()).data
