"""Exact search that is really exact on latents: approximate distances with a certificate, then a direct re-rank.

In float32 ‖q‖² − 2 q·x + ‖x‖² names the wrong neighbour for half the queries in a tight cluster far from the origin.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, final

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from numpy import ndarray
from torch import Tensor

from redi.backends.base import Index, Retriever
from redi.errors import InvalidInputError

_WIDTH: Final = 1024  # columns multiplied in one go: bounds the length of a float32 sum, and so its error
_SCORES: Final = 1 << 22  # approximate distances held at once
_STRETCH: Final = 1 << 20  # elements converted to float64 at once


@final
@dataclass(frozen=True, eq=False)
class ExactIndex(Index):
    """Keys as they were given, the centre they are seen from, and their squared distances to it.

    Args:
        keys: float16 or float32; may be a memory map.
        centre: float32. Zero unless the keys are far from the origin compared with their spread.
        norms: ‖x_i − c‖².
        chunk_bytes: size of the float32 tile that is worked on.
    """

    keys: Float[Tensor, "n d"]
    centre: Float32[Tensor, " d"]
    norms: Float64[Tensor, " n"]
    chunk_bytes: int

    @property
    def shape(self) -> tuple[int, int]:
        """Number of keys and their dimension."""
        n, d = self.keys.shape
        return n, d

    def _search(
        self, queries: Float32[ndarray, "b d"], k: int
    ) -> tuple[Int64[ndarray, "b k"], Float64[ndarray, "b k"]]:
        ids = np.empty((len(queries), k), np.int64)
        distances = np.empty((len(queries), k), np.float64)
        some = max(1, _SCORES // len(self.keys))
        for start in range(0, len(queries), some):
            batch = queries[start : start + some]
            u = torch.from_numpy(batch).to(self.keys.device).double() - self.centre.double()
            candidates = self._candidates(u, k)
            for row, query in enumerate(batch, start):
                found = candidates[:, row - start].nonzero().flatten()
                true = self._distances(found, query.astype(np.float64))
                found = found.cpu().numpy()
                best = np.lexsort((found, true))[:k]
                ids[row], distances[row] = found[best], true[best]
        return ids, distances

    def _candidates(self, u: Float64[Tensor, "b d"], k: int) -> Tensor:
        """Mask (n, b) of all keys that can be among the k nearest, u = q − c.

        ‖q − x_i‖² − ‖u‖² = ‖y_i‖² − 2 u·y_i =: a_i with y_i = x_i − c. A key is out if even the least value its a_i
        can have exceeds what at least k keys surely have.
        """
        a = self.norms[:, None] - 2 * self._products(u.float()).double()
        tau = error_bound(self.norms[:, None].sqrt(), u.norm(dim=1), self.keys.shape[1], _input_rounding(u.device))
        surely = torch.kthvalue(a + tau, k, dim=0).values
        return a - tau <= surely

    def _products(self, u: Float32[Tensor, "b d"]) -> Float32[Tensor, "n b"]:
        """u·y_i tile by tile; a tile that is float32 and seen from the origin is used where it lies."""
        n, d = self.keys.shape
        width = min(d, _WIDTH)
        rows = min(n, max(1, self.chunk_bytes // (4 * width)))
        products = torch.zeros(n, len(u), device=u.device)
        in_place = self.keys.dtype == torch.float32 and not self.centre.any()
        tile = torch.empty(0 if in_place else rows * width, device=u.device)
        for top in range(0, n, rows):
            out = products[top : top + rows]
            for left in range(0, d, width):
                y = self.keys[top : top + rows, left : left + width]
                if not in_place:
                    y = torch.sub(y, self.centre[left : left + width], out=tile[: y.numel()].view(y.shape))
                part = u[:, left : left + width]
                if len(u) == 1:  # a matrix-vector product reads memory once; a product with one column need not
                    out[:, 0].addmv_(y, part[0])
                else:
                    out.addmm_(y, part.T)
        return products

    def _distances(self, ids: Int64[Tensor, " m"], query: Float64[ndarray, " d"]) -> Float64[ndarray, " m"]:
        """‖q − x_i‖² from float64 differences. numpy sums each row by itself, so equal rows come out equal."""
        true = np.empty(len(ids))
        some = max(1, _STRETCH // len(query))
        for start in range(0, len(ids), some):
            difference = self.keys[ids[start : start + some]].cpu().numpy().astype(np.float64) - query
            true[start : start + some] = np.square(difference, out=difference).sum(axis=1)
        return true

    def _save(self, folder: Path) -> None:
        np.save(folder / "keys.npy", self.keys.cpu().numpy(), allow_pickle=False)
        np.save(folder / "centre.npy", self.centre.cpu().numpy(), allow_pickle=False)
        np.save(folder / "norms.npy", self.norms.cpu().numpy(), allow_pickle=False)


@final
@dataclass(frozen=True, slots=True)
class Exact(Retriever):
    """Search every key; the k nearest by float64 distance, without exception.

    Args:
        chunk_bytes: size of the float32 tile that is worked on; half the level-2 cache of one core is about right.
        device: where keys are held and multiplied. On "cpu" they stay where they are, memory map or not.
    """

    chunk_bytes: int = 1 << 20
    device: str = "cpu"
    index_type: ClassVar[type[Index]] = ExactIndex
    accepts: ClassVar[tuple[type[np.floating], ...]] = (np.float32, np.float16)

    def __post_init__(self) -> None:
        if self.chunk_bytes < 1:
            raise InvalidInputError(f"chunk_bytes must be at least 1, given {self.chunk_bytes}")

    def _build(self, keys: Float[ndarray, "n d"]) -> ExactIndex:
        centre, norms = _centred(keys)
        return self._index(keys, centre.astype(np.float32), norms)

    def _load(self, folder: Path) -> ExactIndex:
        keys = np.load(folder / "keys.npy", mmap_mode="r", allow_pickle=False)
        centre = np.load(folder / "centre.npy", allow_pickle=False)
        norms = np.load(folder / "norms.npy", allow_pickle=False)
        n, d = keys.shape
        if keys.dtype not in (np.float16, np.float32) or (centre.shape, norms.shape) != ((d,), (n,)):
            raise ValueError(f"{keys.dtype} keys {keys.shape}, centre {centre.shape} and norms {norms.shape}")
        return self._index(np.asarray(keys), centre, norms)

    def _index(self, keys: ndarray, centre: ndarray, norms: ndarray) -> ExactIndex:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nor is it written to
            shared = torch.from_numpy(keys)
        to = torch.device(self.device)
        return ExactIndex(
            shared.to(to), torch.from_numpy(centre).to(to), torch.from_numpy(norms).to(to), self.chunk_bytes
        )


def error_bound(
    y: Float64[Tensor, "n 1"], u: Float64[Tensor, " b"], d: int, inputs: float = 0.0
) -> Float64[Tensor, "n b"]:
    """How far ‖y‖² − 2 u·y can be from the truth when u·y is computed by `ExactIndex._products`.

    With v = 2⁻²⁴: u and y are rounded once each (2 v); a float32 sum of w products, in any order, is within
    w v Σ|u_j y_j| (Higham 2002, §3.1); ⌈d/w⌉ of them are added; and Σ|u_j y_j| ≤ ‖u‖‖y‖. Five v more pay for the
    second order and for the float64 norms. No rounding is assumed to be random. Products below float32's smallest
    normal number may be flushed to zero.

    Args:
        y: norms ‖y_i‖.
        u: norms ‖u‖.
        d: dimension.
        inputs: further relative rounding of every u_j and y_j.
    """
    w = min(d, _WIDTH)
    v = 2.0**-24
    relative = (w + -(-d // w) + 7) * v + 2 * inputs + inputs**2
    return 2 * relative * y * u + 4 * v * y.square() + d * 2.0**-124 * (1 + y + u)


def _input_rounding(device: torch.device) -> float:
    """What `torch.set_float32_matmul_precision` and its successors allow: products of rounded float32 numbers."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    for place in (getattr(backend, "matmul", None), backend, torch.backends):  # the more particular setting wins
        precision = getattr(place, "fp32_precision", "none")
        if precision != "none":
            break
    else:
        precision = torch.get_float32_matmul_precision()
    return {"medium": 2.0**-8, "bf16": 2.0**-8, "high": 2.0**-10, "tf32": 2.0**-10}.get(precision, 0.0)


def _centred(keys: Float[ndarray, "n d"]) -> tuple[Float64[ndarray, " d"], Float64[ndarray, " n"]]:
    """Where to look at the keys from, and ‖x_i − c‖².

    The error of a product grows with ‖x_i − c‖, so c is the mean, which makes that least. But subtracting it costs a
    pass over the keys in every search, so c is 0 as long as that makes the error no more than √2 times larger.
    """
    n, d = keys.shape
    rows = max(1, _STRETCH // d)
    mean = np.zeros(d)
    for start in range(0, n, rows):
        mean += keys[start : start + rows].sum(axis=0, dtype=np.float64) / n
    centre = mean.astype(np.float32).astype(np.float64)

    def norms(c: ndarray) -> ndarray:
        return np.concatenate(
            [np.square(keys[i : i + rows].astype(np.float64) - c).sum(axis=1) for i in range(0, n, rows)]
        )

    around = norms(centre)
    if np.square(centre).sum() <= around.mean():
        return np.zeros(d), norms(np.zeros(d))
    return centre, around
