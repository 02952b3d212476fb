"""Keys on their way into a backend: every number is checked once, here, whether they come as one array or as a stream.

A backend may rely on what it gets: finite, C-contiguous, of a dtype it asked for, and as many rows as were promised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, final, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int64
from numpy import ndarray

from redi.errors import InvalidInputError

_STRETCH: Final = 1 << 22  # elements looked at in one go, so that a memory map never comes in whole
_CHUNK: Final = 1 << 24  # elements handed on in one go


@runtime_checkable
class Stored(Protocol):
    """Rows that can be fetched by id: an array, a memory map, or anything that makes them when asked."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of rows and their dimension."""
        ...

    def __getitem__(self, ids: Int64[ndarray, " m"], /) -> Float[ndarray, "m d"]:
        """Rows of these ids, always of one dtype, float16 or float32."""
        ...


@final
@dataclass(frozen=True)
class Keys:
    """What an index is built from: a stream that can be walked as often as needed, checked as it goes by.

    Args:
        source: gives the chunks anew, (m_i, d) each, the same every time.
        shape: n = Σ m_i and d.
    """

    source: Callable[[], Iterable[ndarray]]
    shape: tuple[int, int]

    def chunks(self, *accepts: type[np.floating]) -> Iterator[Float[ndarray, "m d"]]:
        """Consecutive rows, never many at once; float32, or as they are if their dtype is among `accepts`.

        Raises:
            InvalidInputError: keys that no index can take, or more or fewer of them than promised.
        """
        n, d = self.shape
        rows, seen = max(1, _CHUNK // d), 0
        for chunk in self.source():
            require_form(chunk, "keys")
            if chunk.shape[1] != d or seen + len(chunk) > n:
                raise InvalidInputError(
                    f"keys {seen} … {seen + len(chunk) - 1} of the stream have dimension {chunk.shape[1]}; "
                    f"expected {n} keys of dimension {d} in all"
                )
            for start in range(0, len(chunk), rows):
                piece = chunk[start : start + rows]
                yield checked(piece, "keys", accepts or (np.float32,), seen)
                seen += len(piece)
        if seen < n:
            raise InvalidInputError(
                f"the stream ended after {seen} of {n} keys; give a callable that begins a new stream at every call"
            )

    def array(self, *accepts: type[np.floating]) -> Float[ndarray, "n d"]:
        """All keys at once: the very array where there is one and its dtype is accepted, else gathered in memory."""
        first = next(iter(self.source()), None)
        if isinstance(first, ndarray) and first.shape == self.shape:
            return checked(first, "keys", accepts or (np.float32,))
        whole: ndarray | None = None
        start = 0
        for chunk in self.chunks(*accepts):
            if whole is None:
                whole = np.empty(self.shape, chunk.dtype)
            elif chunk.dtype.itemsize > whole.dtype.itemsize:
                whole = whole.astype(chunk.dtype)
            whole[start : start + len(chunk)] = chunk
            start += len(chunk)
        assert whole is not None, "Retriever.build_from lets no empty stream through"
        return whole

    def sample(self, size: int) -> Float32[ndarray, "m d"]:
        """At most `size` rows drawn without replacement: the same ones every time, however the stream is cut."""
        n, d = self.shape
        ids = np.sort(np.random.default_rng(0).choice(n, min(size, n), replace=False))
        rows = np.empty((len(ids), d), np.float32)
        start = 0
        for chunk in self.chunks():
            left, right = np.searchsorted(ids, (start, start + len(chunk)))
            rows[left:right] = chunk[ids[left:right] - start]
            start += len(chunk)
            if right == len(ids):
                break
        return rows


@final
@dataclass(frozen=True)
class Joined:
    """`Stored` rows, and more after them.

    Args:
        first: ids 0 … n − 1.
        then: ids from n on.
    """

    first: Stored
    then: Float[ndarray, "m d"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of rows and their dimension."""
        return self.first.shape[0] + len(self.then), self.then.shape[1]

    def __getitem__(self, ids: Int64[ndarray, " m"], /) -> Float[ndarray, "m d"]:
        """Rows of these ids, of the wider dtype."""
        n = self.first.shape[0]
        old = ids < n
        first, then = self.first[np.where(old, ids, 0)], self.then[np.where(old, 0, ids - n)]
        return np.where(old[:, None], first, then)


def write_rows(keys: Stored, file: Path) -> None:
    """Write rows as one .npy, a few at a time."""
    n, d = keys.shape
    rows = max(1, _CHUNK // d)
    dtype = keys[np.arange(1)].dtype
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (n, d)}
    with file.open("wb") as out:  # not a memory map, which a full disk answers by killing the process
        np.lib.format.write_array_header_1_0(out, header)
        for start in range(0, n, rows):
            out.write(np.ascontiguousarray(keys[np.arange(start, min(start + rows, n))]).data)


def gathered(keys: Stored) -> Float[ndarray, "n d"]:
    """The rows as one array, which they may be already."""
    return np.asarray(keys) if isinstance(keys, ndarray) else keys[np.arange(keys.shape[0])]


def require_form(array: ndarray, what: str) -> None:
    """Refuse what is not a two-dimensional floating-point array.

    Raises:
        InvalidInputError: says what it is instead.
    """
    if not isinstance(array, ndarray):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidInputError(f"{what} must be a numpy array, given {type(array).__name__}; convert with .numpy()")
    if array.ndim != 2 or array.shape[1] < 1:
        raise InvalidInputError(f"{what} must have shape (rows, dimension ≥ 1), given {array.shape}; flatten samples")
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise InvalidInputError(f"{what} must be float16, float32 or float64, given {array.dtype}")


def checked(
    array: ndarray, what: str, accepts: tuple[type[np.floating], ...] = (np.float32,), first: int = 0
) -> Float[ndarray, "n d"]:
    """The array as C-contiguous float32, or as it is if its dtype is accepted; never a copy without need.

    Args:
        array: (n, d), whatever it is.
        what: its name in messages.
        accepts: dtypes to keep.
        first: number of its first row in messages.

    Raises:
        InvalidInputError: not a two-dimensional floating-point array, not finite, or so large that squared distances
            leave float32.
    """
    require_form(array, what)
    keep = array.dtype.isnative and array.dtype.type in accepts
    if keep and array.flags.c_contiguous and array.flags.aligned:
        result = np.asarray(array)
    else:
        result = np.empty(array.shape, array.dtype.type if keep else np.float32)
    # ‖x − q‖² ≤ d (2 limit)² must be a float32, with room for the products it may be computed from.
    limit = float(np.sqrt(np.finfo(np.float32).max / array.shape[1])) / 8
    rows = max(1, _STRETCH // array.shape[1])
    for start in range(0, len(array), rows):
        stretch = array[start : start + rows]
        largest = float(max(stretch.max(), -stretch.min()))
        if not largest <= limit:
            at = first + start + int(np.argmin((np.abs(stretch.astype(np.float64)) <= limit).all(axis=1)))
            raise InvalidInputError(
                f"{what} must be finite and within ±{limit:.1e} (squared distances are float32); row {at} is not"
            )
        if not np.shares_memory(result, array):
            result[start : start + rows] = stretch
    return result
