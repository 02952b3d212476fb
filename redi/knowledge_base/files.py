"""Files on disk, handled with care: plain files only, strict JSON in and out, replaced whole or not at all.

Nothing here knows what the files mean.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

from redi.errors import InvalidInputError, KnowledgeBaseError

TEMPORARY: Final = ".tmp"
_FLOAT: Final = "$float"  # JSON has no infinity, and `lambda_min_clipped` of DPM-Solver++ is −∞
_NO_FOLLOW: Final[int] = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def size(path: Path) -> int:
    """Bytes of a plain file.

    Raises:
        KnowledgeBaseError: it is missing, a link, or not a file; the message begins with what is wrong.
    """
    try:
        status = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        raise KnowledgeBaseError(f"{path}: missing") from None
    except OSError as e:
        raise KnowledgeBaseError(f"{path}: cannot be read ({e.strerror})") from e
    if stat.S_ISLNK(status.st_mode):
        raise KnowledgeBaseError(f"{path}: is a link, which may lead anywhere; put the file itself there")
    if not stat.S_ISREG(status.st_mode):
        raise KnowledgeBaseError(f"{path}: is not a plain file")
    return status.st_size


def open_to_read(path: Path) -> int:
    """A descriptor of a plain file, open for reading, links refused.

    Raises:
        KnowledgeBaseError: as `size`, or it cannot be opened.
    """
    size(path)
    try:
        return os.open(path, os.O_RDONLY | _NO_FOLLOW)
    except OSError as e:
        raise KnowledgeBaseError(f"{path}: cannot be read ({e.strerror})") from e


def read_bytes(path: Path) -> bytes:
    """The content of a plain file.

    Raises:
        KnowledgeBaseError: as `open_to_read`.
    """
    try:
        with open(open_to_read(path), "rb") as file:
            return file.read()
    except OSError as e:
        raise KnowledgeBaseError(f"{path}: cannot be read ({e.strerror})") from e


def read_json(path: Path) -> Any:
    """The JSON value of a plain file.

    Raises:
        KnowledgeBaseError: as `open_to_read`, or it is not JSON.
    """
    return parse_json(read_bytes(path), path)


def parse_json(data: bytes, path: Path) -> Any:
    """The JSON value of bytes read from `path`.

    Raises:
        KnowledgeBaseError: it is not JSON.
    """
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:  # of which a UnicodeDecodeError is one
        raise KnowledgeBaseError(f"{path}: is not JSON ({e})") from e


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def dump(value: Any, *, indent: int | None = 1) -> bytes:
    """The one way a JSON value is written: keys sorted, no NaN, UTF-8, newline at the end."""
    separators = (",", ":") if indent is None else (",", ": ")
    text = json.dumps(value, sort_keys=True, indent=indent, allow_nan=False, ensure_ascii=False, separators=separators)
    return (text + "\n").encode("utf-8")


def digest(data: bytes) -> str:
    """sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of a plain file.

    Raises:
        KnowledgeBaseError: as `open_to_read`.
    """
    try:
        with open(open_to_read(path), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise KnowledgeBaseError(f"{path}: cannot be read ({e.strerror})") from e


@contextmanager
def replacing(path: Path, *, durable: bool = True, shared: bool = False) -> Generator[Path, None, None]:
    """A temporary path in the same folder, put in the place of `path` when the block ends well.

    A reader sees the old file or the whole new one, also after a power cut: the content reaches the disk before the
    name does (unless `durable` is false). Nothing stays behind when the block raises. Where other processes may write
    the same file (`shared`), the temporary path is this call's own.
    """
    own = f".{secrets.token_hex(4)}" if shared else ""
    temporary = path.with_name(path.name + own + TEMPORARY)
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        sync(path.parent)


def write(path: Path, data: bytes, *, durable: bool = True, shared: bool = False) -> None:
    """Replace `path` with `data`, whole or not at all; arguments as for `replacing`."""
    with replacing(path, durable=durable, shared=shared) as temporary:
        temporary.write_bytes(data)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def encode(value: object, where: str) -> Any:
    """A plain JSON value for `value`: tuples become lists, NumPy scalars Python numbers, −∞ a tagged string.

    Raises:
        InvalidInputError: something JSON cannot hold.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            # a NumPy double is a float too, and would print as one
            return float(value) if math.isfinite(value) else {_FLOAT: repr(float(value))}
        case Mapping():
            named = cast("Mapping[object, object]", value)
            if not all(isinstance(k, str) for k in named):
                raise InvalidInputError(f"{where} must have strings for keys, given {list(named)}")
            return {str(k): encode(v, f"{where}.{k}") for k, v in named.items()}
        case list() | tuple():
            return [encode(v, f"{where}[{i}]") for i, v in enumerate(cast("list[object]", value))]
        case _ if hasattr(value, "tolist"):
            return encode(cast(Any, value).tolist(), where)
        case _:
            raise InvalidInputError(f"{where} must be JSON (numbers, text, lists, mappings), given {value!r}")


def decode(value: Any) -> Any:
    """What `encode` was given, with lists for tuples."""
    if isinstance(value, dict):
        named = cast("dict[str, Any]", value)
        if set(named) == {_FLOAT}:
            return float(named[_FLOAT])
        return {k: decode(v) for k, v in named.items()}
    if isinstance(value, list):
        return [decode(v) for v in cast("list[Any]", value)]
    return value
