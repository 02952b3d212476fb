"""Exact search that is really exact on latents: approximate distances with a certificate, then a direct re-rank.

In float32 ‖q‖² − 2 q·x + ‖x‖² names the wrong neighbour for half the queries in a tight cluster far from the origin.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Final, final

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from numpy import ndarray
from torch import Tensor

from redi.backends.base import Retriever, at_least, needed
from redi.backends.codes import Codes
from redi.backends.distances import nearest
from redi.backends.index import Index
from redi.backends.keys import Keys, Stored, gathered

# columns multiplied in one go, which bounds the length of a float32 sum and so its error:
_LONGEST: Final = 1 << 16  # for one query, whose product is fastest over whole rows
_WIDE: Final = 2048  # for several
_NEAR: Final = 1 << 19  # bytes of a tile that is converted for one query, so that it is still in the level-2 cache
_USEFUL: Final = 2.0**-5  # a bound looser than this share of ‖y‖² tells few keys apart
_SCORES: Final = 1 << 23  # approximate distances held at once
_STRETCH: Final = 1 << 20  # elements converted to float64 at once
_TRIED: Final = 4  # keys that codes are tried on, at least,
_TYPICAL: Final = 64  # and neighbours that are looked for
_COPIED: Final = 1 << 26  # bytes of a float32 copy of half-precision keys: it halves what a single query costs


@final
@dataclass(frozen=True, eq=False)
class ExactIndex(Index):
    """Keys as they were given, their centre, and their squared distances to it.

    From the first search on, eight-bit codes of them are held too where the processor multiplies such quickly; where it
    does not, half-precision keys that take at most 64 MB as float32 are held as that.

    Args:
        keys: float16 or float32; may be a memory map.
        centre: float32, their mean.
        norms: ‖x_i − c‖².
        chunk_bytes: size of the float32 tile that is worked on.
        code_bytes: memory that codes may take.
    """

    keys: Float[Tensor, "n d"]
    centre: Float32[Tensor, " d"]
    norms: Float64[Tensor, " n"]
    chunk_bytes: int
    code_bytes: int

    @property
    def shape(self) -> tuple[int, int]:
        """Number of keys and their dimension."""
        n, d = self.keys.shape
        return n, d

    @cached_property
    def _offset(self) -> float:
        """‖c‖."""
        return float(self.centre.double().norm())

    @cached_property
    def _lengths(self) -> Float64[Tensor, " n"]:
        """‖x_i − c‖."""
        return self.norms.sqrt()

    @cached_property
    def _spread(self) -> float:
        """The root of the mean ‖x_i − c‖²."""
        return float(self.norms.mean().sqrt())

    @cached_property
    def _codes(self) -> Codes | None:
        """Eight-bit codes, where they are quick and tell some of the keys themselves from the others."""
        if not Codes.pay(self.keys, self.code_bytes):
            return None
        codes = Codes.of(self.keys, self.centre, self.norms)
        n, k = len(self.keys), min(_TYPICAL, len(self.keys))
        u = self.keys[:: max(1, n // _TRIED)].double() - self.centre.double()
        return codes if few(within(*codes.compared(u), k), k) else None

    @cached_property
    def _multiplied(self) -> Float[Tensor, "n d"]:
        """The keys as products read them."""
        return self.keys.float() if 4 * self.keys.numel() <= _COPIED else self.keys

    def _search(
        self, queries: Float32[ndarray, "b d"], k: int
    ) -> tuple[Int64[ndarray, "b k"], Float64[ndarray, "b k"]]:
        ids = np.empty((len(queries), k), np.int64)
        distances = np.empty((len(queries), k), np.float64)
        some = max(1, _SCORES // len(self.keys))
        for start in range(0, len(queries), some):
            batch = queries[start : start + some]
            u = torch.from_numpy(batch).to(self.keys.device).double() - self.centre.double()
            candidates = self._candidates(u, k).cpu().numpy()
            for row, query in enumerate(batch, start):
                found = np.flatnonzero(candidates[row - start])
                ids[row], distances[row] = nearest(self._rows, found, query, k)
        return ids, distances

    def _candidates(self, u: Float64[Tensor, "b d"], k: int) -> Tensor:
        """Mask (b, n) of all keys that can be among the k nearest, u = q − c.

        Keys are compared by their codes where that tells them apart; else multiplied as they lie; or seen from the
        centre where that leaves a bound too loose to be of use.
        """
        if self._codes is not None:
            candidates = within(*self._codes.compared(u), k)
            if few(candidates, k):
                return candidates
        width = _LONGEST if len(u) == 1 else _WIDE
        if error_of_sums(self.keys.shape[1], width) * (self._offset + self._spread) <= _USEFUL * self._spread:
            candidates = self._candidates_by(u, k, width, centred=False)
            if few(candidates, k):
                return candidates
        return self._candidates_by(u, k, width, centred=True)

    def _candidates_by(self, u: Float64[Tensor, "b d"], k: int, width: int, *, centred: bool) -> Tensor:
        """The same, from one pass over the keys.

        Up to a constant of the query, ‖q − x_i‖² is ‖x_i − c‖² − 2 u·x_i =: a_i, and u·(x_i − c) may stand for u·x_i.
        """
        products = self._products(u.float(), width, centred=centred).T
        a = torch.sub(self.norms, products.to(torch.float64, memory_format=torch.contiguous_format), alpha=2)
        offset = 0.0 if centred else self._offset
        tau = error_bound(self._lengths, u.norm(dim=1), self.keys.shape[1], width, offset, _input_rounding(u.device))
        return within(a, tau, k)

    def _products(self, u: Float32[Tensor, "b d"], width: int, *, centred: bool) -> Float32[Tensor, "n b"]:
        """u·x_i, or u·(x_i − c), tile by tile; a tile that needs no arithmetic is used where it lies."""
        keys = self._multiplied
        n, d = keys.shape
        width = min(d, width)
        one = len(u) == 1
        in_place = keys.dtype == torch.float32 and not centred
        anywhere = in_place or keys.device.type != "cpu"
        chunk_bytes = self.chunk_bytes if anywhere else min(self.chunk_bytes, _NEAR if one else 2 * _NEAR)
        rows = n if one and in_place else min(n, max(1, chunk_bytes // (4 * width)))
        products = torch.zeros(n, len(u), dtype=torch.float32, device=u.device)
        tile = torch.empty(0 if in_place else rows * width, dtype=torch.float32, device=u.device)
        for top in range(0, n, rows):
            out = products[top : top + rows]
            for left in range(0, d, width):
                y = keys[top : top + rows, left : left + width]
                if not in_place:
                    room = tile[: y.numel()].view(y.shape)
                    y = torch.sub(y, self.centre[left : left + width], out=room) if centred else room.copy_(y)
                part = u[:, left : left + width]
                if one:  # a matrix-vector product reads memory once; a product with one column need not
                    out[:, 0].addmv_(y, part[0])
                else:
                    out.addmm_(y, part.T)
        return products

    def _rows(self, ids: Int64[ndarray, " m"]) -> Float[ndarray, "m d"]:
        """Keys by id in float32, to which torch widens many times as fast as numpy; a single one need not be copied."""
        rows = self.keys[int(ids[0])][None] if len(ids) == 1 else self.keys[torch.from_numpy(ids)]
        return rows.float().cpu().numpy()

    @property
    def stored_keys(self) -> ndarray:
        """The keys, as they were given."""
        return self.keys.cpu().numpy()

    def _save(self, folder: Path) -> None:
        np.save(folder / "centre.npy", self.centre.cpu().numpy(), allow_pickle=False)
        np.save(folder / "norms.npy", self.norms.cpu().numpy(), allow_pickle=False)

    def _add(self, keys: Keys) -> ExactIndex:
        added = torch.from_numpy(keys.array(np.float32, np.float16)).to(self.keys.device)
        norms = torch.from_numpy(_norms(added.cpu().numpy(), self.centre.cpu().numpy().astype(np.float64)))
        return ExactIndex(
            torch.cat([self.keys, added]),
            self.centre,
            torch.cat([self.norms, norms.to(added.device)]),
            self.chunk_bytes,
            self.code_bytes,
        )


@final
@dataclass(frozen=True, slots=True)
class Exact(Retriever):
    """Search every key; the k nearest by float64 distance, without exception.

    Args:
        chunk_bytes: size of the float32 tile that is multiplied; a megabyte at most where a CPU must convert it.
        device: where keys are held and multiplied. On "cpu" they stay where they are, memory map or not.
        code_bytes: memory that eight-bit codes of the keys may take, one for each number of a key (and 32 for the key);
            0 keeps none. The first search makes them; they narrow all on CPUs that multiply such integers quickly.
    """

    chunk_bytes: int = 1 << 24
    device: str = "cpu"
    code_bytes: int = 1 << 28
    index_type: ClassVar[type[Index]] = ExactIndex

    def __post_init__(self) -> None:
        at_least(1, chunk_bytes=self.chunk_bytes)
        at_least(0, code_bytes=self.code_bytes)

    def _build(self, keys: Keys) -> ExactIndex:
        whole = keys.array(np.float32, np.float16)
        centre, norms = _centred(whole)
        return self._index(whole, centre.astype(np.float32), norms)

    def _load(self, folder: Path, keys: Stored | None) -> ExactIndex:
        whole = gathered(needed(keys, folder))
        centre = np.load(folder / "centre.npy", allow_pickle=False)
        norms = np.load(folder / "norms.npy", allow_pickle=False)
        n, d = whole.shape
        if whole.dtype.type not in (np.float16, np.float32) or (centre.shape, norms.shape) != ((d,), (n,)):
            raise ValueError(f"{whole.dtype} keys {whole.shape}, centre {centre.shape} and norms {norms.shape}")
        return self._index(whole, centre, norms)

    def _index(self, keys: ndarray, centre: ndarray, norms: ndarray) -> ExactIndex:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nor is it written to
            shared = torch.from_numpy(keys)
        to = torch.device(self.device)
        on_device = (shared.to(to), torch.from_numpy(centre).to(to), torch.from_numpy(norms).to(to))
        return ExactIndex(*on_device, self.chunk_bytes, self.code_bytes)


def within(a: Float64[Tensor, "b n"], tau: Float64[Tensor, "b n"], k: int) -> Tensor:
    """Mask of all keys that can be among the k nearest, where a_i is known up to τ_i.

    A key is out if even the least value its a_i can have exceeds what at least k keys surely have.
    """
    surely = torch.topk(a + tau, k, largest=False, sorted=False).values.amax(1, keepdim=True)
    return a - tau <= surely


def few(candidates: Tensor, k: int) -> bool:
    """Whether so few keys are left that another pass over all of them, which queries share, costs more than these."""
    return int(candidates.sum()) <= max(candidates.shape[1] // 8, 4 * k * len(candidates))


def error_of_sums(d: int, width: int) -> float:
    """Relative error of a float32 product of d terms, summed in stretches of at most `width`.

    With v = 2⁻²⁴: a float32 sum of w products, in any order, is within γ_w Σ|u_j x_j|, γ_m = m v / (1 − m v) (Higham
    2002, §3.1); ⌈d/w⌉ of them are added, u and x were rounded once each, and five more pay for what is done in float64.
    No rounding is assumed to be random.
    """
    w = min(d, width)
    m = w + -(-d // w) + 7
    return m / (2**24 - m)


def error_bound(
    y: Float64[Tensor, " n"], u: Float64[Tensor, " b"], d: int, width: int, offset: float = 0.0, inputs: float = 0.0
) -> Float64[Tensor, "b n"]:
    """How far a_i can be from the truth when the products in it are computed by `ExactIndex._products`.

    Σ|u_j x_j| ≤ ‖u‖‖x‖, and ‖x‖ ≤ ‖y‖ + ‖c‖. Products below float32's smallest normal number may be flushed to zero.

    Args:
        y: norms ‖x_i − c‖.
        u: norms ‖u‖.
        d: dimension.
        width: longest sum.
        offset: ‖c‖ where u·x_i is computed, 0 where u·(x_i − c) is.
        inputs: further relative rounding of every u_j and y_j.
    """
    relative = (1 + inputs) ** 2 * (1 + error_of_sums(d, width)) - 1
    x, tiny = y + offset, d * 2.0**-124
    return torch.addcmul(2.0**-22 * y.square() + tiny * (1 + x), u[:, None], 2 * relative * x + tiny)


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
    """The mean c of the keys, rounded to float32, and ‖x_i − c‖²: where the error of a product is least."""
    n, d = keys.shape
    rows = max(1, _STRETCH // d)
    mean = np.zeros(d)
    for start in range(0, n, rows):
        mean += keys[start : start + rows].sum(axis=0, dtype=np.float64) / n
    centre = mean.astype(np.float32).astype(np.float64)
    return centre, _norms(keys, centre)


def _norms(keys: Float[ndarray, "n d"], centre: Float64[ndarray, " d"]) -> Float64[ndarray, " n"]:
    """‖x_i − c‖², a few rows at a time."""
    rows = max(1, _STRETCH // len(centre))
    return np.concatenate(
        [np.square(keys[i : i + rows].astype(np.float64) - centre).sum(axis=1) for i in range(0, len(keys), rows)]
    )
