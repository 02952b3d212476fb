"""Derived tables: tensors computed once from all rows, kept on the disk, memory-mapped when read.

A table is bound to the manifest it was computed from; it may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast, final

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from redi.errors import InvalidInputError, KnowledgeBaseError
from redi.knowledge_base import files, tensorfile
from redi.knowledge_base.fields import HASH, NATURAL, OBJECT, POSITIVE, take
from redi.knowledge_base.manifest import MANIFEST
from redi.knowledge_base.tensorfile import TensorFile
from redi.types import Rows

FOLDER: Final = "derived"
RECIPE: Final = "recipe.json"
TABLE: Final = "table.safetensors"
_SCHEMA: Final = 1
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*", re.ASCII)
_HASHED_WHEN_OPENED: Final = 64 << 20  # bytes: a tenth of a second; larger tables are left to `verify`
_FORSAKEN: Final = 24 * 3600  # seconds after which an unfinished table belongs to nobody alive
_READ_ONLY: Final = (errno.EACCES, errno.EPERM, errno.EROFS)


@final
@dataclass(frozen=True)
class Source:
    """What a table is computed from: the knowledge base's folder, its manifest's hash, its rows and their chunks."""

    path: Path
    manifest_hash: str
    rows: int
    chunks: Callable[[], Iterator[Rows]]


@final
class Derived:
    """Tensors of shape (n, …), one row for each row of the knowledge base.

    Attributes:
        recipe: what they are.
        path: their folder, where an index may keep its own files beside them; None if they are in memory only,
            because the knowledge base cannot be written.
    """

    def __init__(
        self, recipe: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path | None, file: TensorFile | None
    ) -> None:
        self.recipe, self.path = recipe, path
        self._tensors, self._file = tensors, file

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors, sorted."""
        return tuple(sorted(self._tensors))

    def __len__(self) -> int:
        return len(next(iter(self._tensors.values())))

    def __getitem__(self, name: str) -> Shaped[Tensor, "n ..."]:
        """A whole tensor: a view of the file, to be read only."""
        if name not in self._tensors:
            raise InvalidInputError(f"expected one of {', '.join(self.names)}, given {name!r}")
        return self._tensors[name]

    def gather(self, name: str, ids: Int64[Tensor, "b k"]) -> Shaped[Tensor, "b k ..."]:
        """Copies of the rows of these ids.

        Raises:
            InvalidInputError: an unknown name, or an id out of range.
        """
        table = self[name]
        check_ids(ids, len(table))
        return table[ids.cpu()] if self._file is None else self._file.gather(name, ids.cpu())


def check_ids(ids: Tensor, rows: int) -> None:
    """Refuse ids that are no rows: −1, as some indexes pad with, would silently be the last row.

    Raises:
        InvalidInputError: an id is out of range.
    """
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < rows):
        raise InvalidInputError(f"row ids must be 0 … {rows - 1}, given {int(ids.min())} … {int(ids.max())}")


def derive(source: Source, recipe: Mapping[str, Any], compute: Callable[[Rows], Mapping[str, Tensor]]) -> Derived:
    """The table of a recipe: found, or computed and kept; see `KnowledgeBase.derive`."""
    plain: dict[str, Any] = files.encode(recipe, "recipe")
    identity = {"schema": _SCHEMA, "recipe": plain, "manifest": source.manifest_hash}
    folder = source.path / FOLDER / _folder_name(identity)
    if folder.parent.is_symlink():
        raise KnowledgeBaseError(f"{folder.parent}: is a link, which may lead anywhere; remove it")
    with contextlib.suppress(KnowledgeBaseError):  # whatever is wrong with it, it can be computed again
        return _load(folder, identity, source.rows)
    try:
        temporary = _begin(source, folder)
    except OSError as e:
        if e.errno not in _READ_ONLY:
            raise KnowledgeBaseError(f"{source.path / FOLDER} cannot be written ({e.strerror}); see to the disk") from e
        return Derived(plain, _in_memory(source, compute), None, None)
    try:
        _write(temporary, identity, source, compute)
        _put_in_place(temporary, folder, identity, source.rows)
    except OSError as e:
        raise KnowledgeBaseError(f"{folder} cannot be written ({e.strerror}); see to the disk and try again") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _load(folder, identity, source.rows)


def listing(path: Path, manifest_hash: str) -> list[dict[str, Any]]:
    """The tables in a knowledge base's folder: recipe, size, and whether they are of this manifest."""
    found: list[dict[str, Any]] = []
    for folder in _tables(path):
        with contextlib.suppress(KnowledgeBaseError):
            said = _said(folder)
            current = said["identity"]["manifest"] == manifest_hash
            found.append(
                {
                    "name": folder.name,
                    "recipe": said["identity"]["recipe"],
                    "bytes": said["bytes"],
                    "current": current,
                }
            )
    return found


def damaged(path: Path, manifest_hash: str) -> Iterator[tuple[str, str]]:
    """(file, what is wrong with it) for every table of this manifest that is not what was written."""
    for folder in _tables(path):
        try:
            said = _said(folder)
            if folder.name != _folder_name(said["identity"]):
                raise KnowledgeBaseError(f"{folder / RECIPE}: is of another table: changed, damaged or misplaced")
            if said["identity"]["manifest"] == manifest_hash:
                _load(folder, said["identity"], said["rows"], thoroughly=True)
        except KnowledgeBaseError as e:
            yield f"{FOLDER}/{folder.name}", f"{e}; delete this folder, it will be computed again"


def _folder_name(identity: Mapping[str, Any]) -> str:
    return files.digest(files.dump(identity))[:32]


def _tables(path: Path) -> list[Path]:
    folder = path / FOLDER
    return (
        sorted(p for p in folder.iterdir() if p.is_dir() and not p.is_symlink() and p.suffix != files.TEMPORARY)
        if folder.is_dir()
        else []
    )


def _said(folder: Path) -> dict[str, Any]:
    said = take(
        files.read_json(folder / RECIPE),
        {"identity": OBJECT, "rows": NATURAL, "bytes": POSITIVE, "sha256": HASH},
        str(folder / RECIPE),
    )
    take(said["identity"], {"schema": POSITIVE, "recipe": OBJECT, "manifest": HASH}, str(folder / RECIPE))
    return said


def _load(folder: Path, identity: Mapping[str, Any], rows: int, *, thoroughly: bool = False) -> Derived:
    """A finished table.

    Raises:
        KnowledgeBaseError: there is none, or it is not what was written.
    """
    if folder.is_symlink():
        raise KnowledgeBaseError(f"{folder}: is a link, which may lead anywhere")
    said, path = _said(folder), folder / TABLE
    if said["identity"] != identity or said["rows"] != rows:
        raise KnowledgeBaseError(f"{folder / RECIPE}: is of another table")
    if files.size(path) != said["bytes"]:
        raise KnowledgeBaseError(f"{path}: expected {said['bytes']} bytes, given {files.size(path)}")
    if (thoroughly or said["bytes"] <= _HASHED_WHEN_OPENED) and files.digest_file(path) != said["sha256"]:
        raise KnowledgeBaseError(f"{path}: its sha256 differs: changed or damaged")
    file = TensorFile(path)
    if not file.tensors or any(not t.ndim or len(t) != rows for t in file.tensors.values()):
        raise KnowledgeBaseError(f"{path}: expected tensors of {rows} rows")
    return Derived(identity["recipe"], file.tensors, folder, file)


def _begin(source: Source, folder: Path) -> Path:
    """A temporary folder to compute into; what can no longer be of use is removed first."""
    folder.parent.mkdir(exist_ok=True)
    temporary = folder.parent / f"{folder.name}.{secrets.token_hex(4)}{files.TEMPORARY}"
    temporary.mkdir()
    for other in folder.parent.glob(f"*{files.TEMPORARY}"):
        newest = max((p.stat().st_mtime for p in [other, *other.glob("*")]), default=0.0)
        if other != temporary and time.time() - newest > _FORSAKEN:
            shutil.rmtree(other, ignore_errors=True)
    # Old tables go, unless it is this view of the knowledge base that is old.
    if files.digest_file(source.path / MANIFEST) == source.manifest_hash:
        for old in _tables(source.path):
            with contextlib.suppress(KnowledgeBaseError):
                if _said(old)["identity"]["manifest"] != source.manifest_hash:
                    shutil.rmtree(old, ignore_errors=True)
    return temporary


def _write(
    folder: Path, identity: Mapping[str, Any], source: Source, compute: Callable[[Rows], Mapping[str, Tensor]]
) -> None:
    path = folder / TABLE
    with path.open("wb") as file:
        entries: dict[str, tensorfile.Entry] = {}
        for first, chunk in _computed(source, compute):
            if not entries:
                entries = tensorfile.begin(
                    file, {name: (t.dtype, (source.rows, *t.shape[1:])) for name, t in chunk.items()}
                )
            for name, tensor in chunk.items():
                tensorfile.put(file, entries[name], first, tensor)
    files.sync(path)
    said = {
        "identity": identity,
        "rows": source.rows,
        "bytes": files.size(path),
        "sha256": files.digest_file(path),
    }
    files.write(folder / RECIPE, files.dump(said))


def _put_in_place(temporary: Path, folder: Path, identity: Mapping[str, Any], rows: int) -> None:
    """Rename to the final name; of two processes that computed the same table the first one's stays."""
    with contextlib.suppress(KnowledgeBaseError):
        _load(folder, identity, rows)
        return
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)
    files.sync(folder.parent)


def _in_memory(source: Source, compute: Callable[[Rows], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    tables: dict[str, Tensor] = {}
    for first, chunk in _computed(source, compute):
        for name, tensor in chunk.items():
            if name not in tables:
                tables[name] = torch.empty((source.rows, *tensor.shape[1:]), dtype=tensor.dtype)
            tables[name][first : first + len(tensor)] = tensor
    return tables


def _computed(
    source: Source, compute: Callable[[Rows], Mapping[str, Tensor]]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(first row, tensors) chunk by chunk, checked.

    Raises:
        InvalidInputError: they are not finite tensors of consistent names, dtypes and shapes.
    """
    first, known = 0, dict[str, tuple[torch.dtype, tuple[int, ...]]]()
    for rows in source.chunks():
        chunk = {name: tensor.detach().cpu() for name, tensor in compute(rows).items()}
        if not chunk or not all(_NAME.fullmatch(name) for name in chunk):
            raise InvalidInputError(
                f"a derived table needs tensors named by letters, digits, _ and ., given {[*chunk]}"
            )
        if short := {n: tuple(t.shape) for n, t in chunk.items() if tuple(t.shape)[:1] != (len(rows),)}:
            raise InvalidInputError(f"derived tensors must have first dimension {len(rows)}, given {short}")
        shapes = {name: (t.dtype, tuple(t.shape[1:])) for name, t in chunk.items()}
        known = known or shapes
        if shapes != known:
            raise InvalidInputError(f"derived tensors must be alike in every chunk: {known}, from row {first} {shapes}")
        for name, tensor in chunk.items():
            bad = (~torch.isfinite(tensor).reshape(len(rows), -1).all(1)).nonzero().flatten() + first
            if len(bad):
                which = ", ".join(map(str, cast("list[int]", bad[:8].tolist()))) + (", …" if len(bad) > 8 else "")
                raise InvalidInputError(f"derived tensor {name!r} is not finite in {len(bad)} rows: {which}")
        yield first, chunk
        first += len(rows)
