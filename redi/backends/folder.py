"""How an index lies on disk: a folder of plain files, and beside them `index.json`, which says what each must be."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from redi.errors import InvalidInputError, KnowledgeBaseError

STORED: Final = "stored_keys.npy"
_MANIFEST: Final = "index.json"
_FORMAT: Final = 2


@contextmanager
def writing(path: Path, kind: str, shape: tuple[int, int], bound_to: str) -> Generator[Path]:
    """A folder beside `path` to write into, which takes its place once it is complete.

    Args:
        path: where the index is to be.
        kind: which type of index this is.
        shape: of its keys.
        bound_to: hash of what they were computed from; "" if nobody says.

    Raises:
        InvalidInputError: `path` is neither free, nor an empty folder, nor an index.
    """
    path = Path(path).absolute()
    if path.exists() and not (path.is_dir() and ((path / _MANIFEST).is_file() or not any(path.iterdir()))):
        raise InvalidInputError(f"{path} is not an index and not an empty folder; save to another place")
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # another thread or process may write it too
    beside.mkdir(parents=True)
    try:
        yield beside
        files = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(beside.iterdir())}
        manifest = {"format": _FORMAT, "index": kind, "shape": list(shape), "bound_to": bound_to, "files": files}
        (beside / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        if path.exists():
            _remove(path)
        os.replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def reading(path: Path, kind: str, bound_to: str | None) -> tuple[Path, tuple[int, int]]:
    """The folder of an index and the shape of its keys, once every file in it is found to be as it was written.

    Args:
        path: where the index is.
        kind: which type of index is expected.
        bound_to: what it must be bound to; None for anything.

    Raises:
        KnowledgeBaseError: it is missing, damaged, of another type, or bound to something else.
    """
    path = Path(path)
    manifest = _manifest(path)
    if manifest.index != kind:
        raise KnowledgeBaseError(f"{path} holds a {manifest.index}, expected a {kind}; load it with what saved it")
    if bound_to is not None and manifest.bound_to != bound_to:
        raise KnowledgeBaseError(f"index {path} is stale: it was built from other rows; build it again")
    for name, (size, digest) in manifest.files.items():
        file = path / name
        try:
            if not file.is_file() or file.is_symlink():
                raise KnowledgeBaseError(f"index {path} lacks its file {name!r}; delete it and build it again")
            whole = file.stat().st_size == size and _sha256(file) == digest
        except OSError as e:  # it may be replaced this very moment
            raise KnowledgeBaseError(f"file {name!r} of index {path} cannot be read ({e.strerror})") from e
        if not whole:
            raise KnowledgeBaseError(f"file {name!r} of index {path} is damaged; delete it and build it again")
    return path, manifest.shape


@final
@dataclass(frozen=True)
class _Manifest:
    index: str
    shape: tuple[int, int]
    bound_to: str
    files: dict[str, tuple[int, str]]


def _manifest(path: Path) -> _Manifest:
    try:
        said: Any = json.loads((path / _MANIFEST).read_bytes())
        if said["format"] != _FORMAT:
            raise ValueError(f"format {said['format']!r}, this version reads {_FORMAT}")
        n, d = (int(x) for x in said["shape"])
        files = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in said["files"].items()}
        if wrong := [name for name in files if name != Path(name).name or name in ("", ".", "..", _MANIFEST)]:
            raise ValueError(f"file names {wrong} are not plain names")
        return _Manifest(str(said["index"]), (n, d), str(said["bound_to"]), files)
    except OSError as e:
        raise KnowledgeBaseError(f"there is no index at {path}: no readable {_MANIFEST}") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise KnowledgeBaseError(f"{path / _MANIFEST} does not describe an index ({e!r}); build it again") from e


def _remove(path: Path) -> None:
    """Delete an old index, but nothing that it does not name."""
    if (path / _MANIFEST).is_file():
        for name in _manifest(path).files:
            (path / name).unlink(missing_ok=True)
        (path / _MANIFEST).unlink()
    if any(path.iterdir()):
        raise InvalidInputError(f"{path} holds other files than an index; save to another place")
    path.rmdir()


def _sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
