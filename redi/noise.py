"""The noise bank: the fixed starting noises that trajectories share, and how a picture gets one.

Trajectories can only stand in for each other if they start from the same noise; the seed picks which.
"""

from __future__ import annotations

import functools
import hashlib
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, final

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from redi.errors import NoiseError

_FEW: Final = 1 << 22  # numbers of a bank
_SURE: Final = 6.0  # standard deviations; a coincidence of this size happens once in 10⁹


@final
@dataclass(frozen=True)
class NoiseBank:
    """`size` fixed noises of unit variance, each a function of (seed, id) alone, the same on every machine.

    Args:
        seed: which bank.
        size: number of noises; ids are 0 … size − 1.
        shape: of one noise, without the batch.
        diversity: η in √(1 − η²)·bank + η·fresh, the share of fresh noise in what `draw` gives. With 0 a bank can
            start `size` different pictures of one prompt; above 0, every key gives its own.
    """

    seed: int
    size: int
    shape: tuple[int, ...]
    diversity: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise NoiseError(f"a noise bank needs at least one noise, given size={self.size}")
        if not self.shape or min(self.shape) < 1:
            raise NoiseError(f"a noise needs a shape of positive sizes, given {self.shape}")
        if not 0 <= self.diversity < 1:
            raise NoiseError(f"diversity must be in [0, 1), given {self.diversity}: at 1 nothing of the bank is left")

    def noise(self, ids: Int64[Tensor, " b"]) -> Float32[Tensor, "b *s"]:
        """The bank's noises of these ids.

        Raises:
            NoiseError: an id that the bank does not have.
        """
        wanted = ids.tolist()
        if wrong := [i for i in wanted if not 0 <= i < self.size]:
            raise NoiseError(f"noise ids {wrong} are not in this bank of {self.size}")
        rows = [_normal(self.shape, "bank", str(self.seed), str(i)) for i in wanted]
        return torch.stack(rows) if rows else torch.empty(0, *self.shape)

    def near(self, ids: Int64[Tensor, " b"], keys: Sequence[bytes]) -> Float32[Tensor, "b *s"]:
        """√(1 − η²)·bank + η·fresh: noises of these ids, each with a fresh direction of its own.

        Args:
            ids: bank noises.
            keys: what seeds each picture's fresh noise. Pictures with the same key get different ones, in order.
        """
        bank = self.noise(ids)
        if len(keys) != len(bank):
            raise NoiseError(f"{len(keys)} keys for {len(bank)} pictures; give one per picture")
        if self.diversity == 0:
            return bank
        earlier: dict[bytes, int] = {}
        for row, key in zip(bank, keys, strict=True):
            nth = earlier[key] = earlier.get(key, -1) + 1
            fresh = _normal(self.shape, "fresh", key, str(nth))
            row.mul_(math.sqrt(1 - self.diversity**2)).add_(fresh, alpha=self.diversity)
        return bank

    def draw(
        self, keys: Sequence[bytes], count: int | None = None
    ) -> tuple[Int64[Tensor, " b"], Float32[Tensor, "b *s"]]:
        """Starting noises for the pictures of one call: no id comes twice as long as the bank has others.

        A picture takes the first id not yet taken in this call from a permutation that its key seeds. So what it gets
        depends on its key alone, except where two pictures of the call would take the same.

        Args:
            keys: one per picture, or one for all of them; bytes derived from whatever seeds the call.
            count: number of pictures, where one key is given for all.

        Returns:
            Ids, and noise of unit variance.

        Raises:
            NoiseError: more pictures than noises, in a bank without diversity.
        """
        count = len(keys) if count is None else count
        keys = list(keys) * count if len(keys) == 1 else list(keys)
        if len(keys) != count:
            raise NoiseError(f"{len(keys)} keys for {count} pictures; give one per picture, or one for all")
        if count > self.size and self.diversity == 0:
            raise NoiseError(
                f"asked for {count} different pictures from a bank of {self.size} noises; ask for at most {self.size}, "
                "or build the knowledge base with more noises or with diversity above 0"
            )
        permutations = {key: _permutation(self.size, "order", str(self.seed), key) for key in dict.fromkeys(keys)}
        ids: list[int] = []
        taken: set[int] = set()
        for key in keys:
            if len(taken) == self.size:
                taken.clear()
            ids.append(next(i for i in permutations[key] if i not in taken))
            taken.add(ids[-1])
        found = torch.tensor(ids, dtype=torch.int64)
        return found, self.near(found, keys)

    def match(self, noise: Float[Tensor, "b *s"], tolerance: float = 1e-2, scale: float = 1.0) -> Int64[Tensor, " b"]:
        """Which bank noise each of these is, or is near as `draw` makes it; −1 for a stranger.

        Near means a cosine of at least √(1 − η²) and the same length, both within `tolerance` and the spread that
        fresh noise has in this many dimensions.

        Args:
            noise: of any precision, unit variance times `scale`.
            tolerance: what rounding may take away; bfloat16 takes 10⁻⁵ of the cosine and at most 4·10⁻³ of the length.
            scale: a solver's initial scale, where the noise is already multiplied by it.

        Raises:
            NoiseError: noise of another shape.
        """
        if tuple(noise.shape[1:]) != tuple(self.shape):
            raise NoiseError(f"the bank's noises have shape {tuple(self.shape)}, given {tuple(noise.shape[1:])}")
        bank, long = _bank(self)
        d = bank.shape[1]
        x = noise.detach().cpu().double().reshape(len(noise), d) / scale
        dots = (x.to(bank.dtype) @ bank.T).double()
        short = x.norm(dim=1)
        spread = tolerance + _SURE * self.diversity / math.sqrt(d)
        least = math.sqrt(1 - self.diversity**2) - spread
        if self.diversity > 0:  # never what a stranger reaches by chance, as far as this many dimensions allow
            least = max(least, min(_SURE / math.sqrt(d), 1 - tolerance))
        near = (dots >= least * short[:, None] * long) & ((short[:, None] - long).abs() <= spread * long)
        cosine, best = (dots / long).where(near, -torch.inf).max(dim=1)
        return best.where(cosine > -torch.inf, -1)

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads."""
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> NoiseBank:
        """The bank that `to_json` described.

        Raises:
            NoiseError: fields that are missing, unknown or of the wrong type.
        """
        if (names := {f.name for f in fields(cls)}) != set(said):
            raise NoiseError(f"a noise bank is described by {sorted(names)}, given {sorted(said)}")
        try:
            shape = tuple(operator.index(s) for s in said["shape"])
            return cls(operator.index(said["seed"]), operator.index(said["size"]), shape, float(said["diversity"]))
        except (TypeError, ValueError) as e:
            raise NoiseError(f"this does not describe a noise bank: {dict(said)} ({e})") from e


@functools.lru_cache(maxsize=2)
def _bank(bank: NoiseBank) -> tuple[Float[Tensor, "m d"], Float64[Tensor, " m"]]:
    """All noises of a bank as rows, and their lengths; a cache: to make them takes a second, and every call matches.

    In float64 where they are few and that costs little.
    """
    rows = bank.noise(torch.arange(bank.size)).flatten(1)
    return rows.double() if rows.numel() < _FEW else rows, rows.norm(dim=1).double()


def _normal(shape: tuple[int, ...], *name: str | bytes) -> Float32[Tensor, "*s"]:
    """Standard normal numbers that belong to `name`.

    torch seeds its generator with 32 bits and promises its stream for one version and machine only. Philox is keyed
    with 128 bits and its stream is fixed (NEP 19); the inverse of the normal distribution in float64 leaves nothing
    that a machine could round differently in float32, but once in 10⁸ numbers.
    """
    raw = _philox(*name).random_raw(math.prod(shape))
    # The middle of 2⁵² equal parts of (0, 1): never 0 or 1, where the inverse is infinite.
    uniform = ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return torch.special.ndtri(torch.from_numpy(uniform)).float().reshape(shape)


def _permutation(size: int, *name: str | bytes) -> list[int]:
    """A permutation of 0 … size − 1 that belongs to `name`."""
    return np.argsort(_philox(*name).random_raw(size), kind="stable").tolist()


def _philox(*name: str | bytes) -> np.random.Philox:
    digest = hashlib.blake2b(digest_size=16, person=b"redi noise")
    for part in name:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)  # with its length, so that no two names run together
    return np.random.Philox(key=int.from_bytes(digest.digest(), "little"))
