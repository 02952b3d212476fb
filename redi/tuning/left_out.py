"""What a knowledge base would have said of its own rows, had it not known them: no model is called.

A leap's error reaches the end of the run. In x̄ = x / a it is taken to stay as it is on the way there, so all that the
leaps of one run miss is Σ_j (a_N / a_j) defect_j: the row's *correction*. With zero weights it is what the plain solver
misses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from redi.combiners import Affine, Combiner, Kriging, LeastSquares, Nearest, combine
from redi.engine import ReDiEngine
from redi.errors import InvalidInputError
from redi.knowledge_base import Derived
from redi.partitions import Partition, open_partition
from redi.plan import Route
from redi.table import Key, key_of

NEIGHBORS: Final = (8, 16, 64, 256)
COMBINERS: Final[Sequence[Combiner]] = (
    *(Kriging(nugget=n) for n in (0.01, 0.03, 0.1, 0.3, 1.0)),
    *(Affine(ridge=r) for r in (0.1, 1.0)),
    LeastSquares(),
)
_AT_ONCE: Final = 1 << 24  # numbers of neighbours' keys held together


@final
@dataclass(frozen=True)
class Candidate:
    """One way to serve a plan.

    Args:
        key: what neighbours are found by.
        neighbors: H, how many.
        combiner: how they are weighed.
    """

    key: Key
    neighbors: int
    combiner: Combiner

    def __str__(self) -> str:
        return f"{self.key} key, {self.neighbors} neighbours, {self.combiner}"


@final
@dataclass(frozen=True)
class Sums:
    """What is left to know of rows that were left out: the error of any share s of the correction follows.

    ‖v − s v̂‖² = own − 2 s across + s² found, where v is a row's correction and v̂ what its neighbours say it is.

    Args:
        distance: L2, to the nearest key that was looked at.
        own: ‖v‖².
        across: ⟨v, v̂⟩.
        found: ‖v̂‖².
    """

    distance: Float64[Tensor, " n"]
    own: Float64[Tensor, " n"]
    across: Float64[Tensor, " n"]
    found: Float64[Tensor, " n"]

    @classmethod
    def of(cls, distance: Tensor, v: Float[Tensor, "n d"], v_hat: Float[Tensor, "n d"]) -> Sums:
        """Of these corrections."""
        v, v_hat = v.double(), v_hat.double()
        return cls(distance.double(), v.square().sum(1), (v * v_hat).sum(1), v_hat.square().sum(1))

    @classmethod
    def cat(cls, parts: Sequence[Sums]) -> Sums:
        """Several as one."""
        return cls(*(torch.cat([getattr(p, n) for p in parts]) for n in ("distance", "own", "across", "found")))

    @property
    def share(self) -> float:
        """The share of the correction, in [0, 1], with the least squared error over all of them."""
        found = float(self.found.sum())
        return min(1.0, max(0.0, float(self.across.sum()) / found)) if found else 1.0

    def errors(self, share: Tensor | float) -> Float64[Tensor, " n"]:
        """‖v − s v̂‖ / ‖v‖, the error as a fraction of the plain solver's, see `fractions`."""
        left = (self.own - 2 * share * self.across + share**2 * self.found).clamp(min=0).sqrt()
        return fractions(left, self.own.sqrt())


def fractions(left: Float64[Tensor, " n"], plain: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """What is left of the plain solver's errors.

    One that is less than a tenth of the typical counts as a tenth: a row on which the plain solver happens to be right
    would outweigh all others. Where it errs on none, what is left counts as all of it.
    """
    least = 0.1 * plain.square().mean().sqrt()
    return left / plain.clamp(min=float(least)) if least > 0 else (left > 0).double()


def candidates(engine: ReDiEngine, rows: int) -> list[Candidate]:
    """Everything that is compared for a plan.

    Args:
        engine: of the plan, with its default choices.
        rows: of the noise with the most rows, of which one is left out.
    """
    embedded = engine.knowledge_base.gather(torch.zeros(1, dtype=torch.int64)).embeddings.any()
    keys: list[Key] = ["denoised", "prompt"] if embedded else ["denoised"]  # the first sample is the noise, of all rows
    counts = sorted({min(h, rows - 1) for h in NEIGHBORS})
    found = [Candidate(k, 1, Nearest()) for k in keys]
    return found + [Candidate(k, h, c) for k in keys for h in counts for c in COMBINERS]


@final
class LeftOut:
    """Some rows of a knowledge base, evenly spread, each left out in turn.

    Args:
        engine: of a coarse plan, with its default choices.
        limit: rows at most.

    Raises:
        InvalidInputError: no noise has two rows.
    """

    def __init__(self, engine: ReDiEngine, limit: int) -> None:
        self.engine = engine
        ids = engine.knowledge_base.noise_ids
        counts = ids.bincount()
        usable = (counts[ids] > 1).nonzero().flatten()
        usable = usable[ids[usable].argsort(stable=True)]  # noise by noise, so that every one has its share
        if not len(usable):
            raise InvalidInputError(
                f"{engine.knowledge_base.path} has no noise with two rows, so no row can be left out; build more"
            )
        spread = torch.linspace(0, len(usable) - 1, min(limit, len(usable)), dtype=torch.float64)
        self.rows = usable[spread.round().long().unique()]
        self.most = int(counts.max())
        self._kept: dict[Key, tuple[Derived, Mapping[int, Partition]]] = {}

    def sums(
        self,
        chosen: Sequence[Candidate],
        *,
        skip: int = 0,
        told: Callable[[int], None] = lambda rows: None,
    ) -> list[Sums]:
        """What each candidate, all of one key, says of the rows.

        Args:
            chosen: the candidates.
            skip: how many of the nearest neighbours are left out besides the row, to see what distance does.
            told: after every batch, how many rows it had.
        """
        key = chosen[0].key
        parts: list[list[Sums]] = [[] for _ in chosen]
        for mine, ids, distances in self._neighbors(key, max(c.neighbors for c in chosen), skip):
            q, keys = self._keys(key, mine[:, None])[:, 0], self._keys(key, ids)
            v, near = self.corrections(mine[:, None])[:, 0], self.corrections(ids)
            for candidate, found in zip(chosen, parts, strict=True):
                h = candidate.neighbors
                weights = candidate.combiner.weights(keys[:, :h], q)
                found.append(Sums.of(distances[:, 0], v, combine(weights, near[:, :h])))
            told(len(mine))
        return [Sums.cat(found) for found in parts]

    def apart(self, key: Key) -> float:
        """Distance between the keys of two rows of one noise, in the median over some pairs; 1 where it is zero."""
        found: list[Tensor] = []
        for part in self._partitions(key).values():
            some = part.ids[torch.linspace(0, len(part.ids) - 1, min(256, len(part.ids))).round().long()]
            found.append(torch.pdist(self._keys(key, some[None])[0]))
        return float(torch.cat(found).median()) or 1.0

    def corrections(self, ids: Int64[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
        """Σ_j (a_N / a_j) defect_j of rows, float32."""
        table, route = self.engine.table, self.engine.route
        total = torch.zeros(*ids.shape, *self.engine.knowledge_base.bank.shape)
        for j, g in enumerate(growth(route)):
            total += g * table.bracket(ids, j)
        return total.flatten(2)

    def _neighbors(self, key: Key, most: int, skip: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of rows with their nearest others: ids and distances, nearest first."""
        for mine in self._by_noise(key):
            part = self._partitions(key)[int(self.engine.knowledge_base.noise_ids[mine[0]])]
            k = min(most + skip + 1, len(part.ids))
            width = max(1, min(most, k - 1 - skip))
            numbers = part.index.shape[1] + math.prod(self.engine.knowledge_base.bank.shape)
            for some in mine.split(max(1, _AT_ONCE // (k * numbers))):
                found = part.index.search(self._keys(key, some[:, None])[:, 0].numpy(), k)
                ids, far = part.ids[torch.from_numpy(found.ids)], torch.from_numpy(found.distances).sqrt()
                # the row itself goes last, and a search that missed it loses its farthest
                order = (ids == some[:, None]).int().argsort(dim=1, stable=True)[:, : k - 1]
                first = min(skip, k - 1 - width)
                order = order[:, first : first + width]
                yield some, ids.gather(1, order), far.gather(1, order)

    def _by_noise(self, key: Key) -> Iterator[Tensor]:
        noise_ids = self.engine.knowledge_base.noise_ids[self.rows]
        for noise in self._partitions(key):
            if len(mine := self.rows[noise_ids == noise]):
                yield mine

    def _partitions(self, key: Key) -> Mapping[int, Partition]:
        return self._of(key)[1]

    def _keys(self, key: Key, ids: Int64[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
        return self._of(key)[0].gather("key.0", ids).float()

    def _of(self, key: Key) -> tuple[Derived, Mapping[int, Partition]]:
        """Where keys of a kind are kept, and each noise's rows by them."""
        if key not in self._kept:
            engine, kb = self.engine, self.engine.knowledge_base
            if key == engine.served_key:
                parts = {noise: part for (at, noise), part in engine.table.partitions.items() if at == 0}
                self._kept[key] = engine.table.derived, parts
            else:  # keys alone: the defects that go with them are there already
                leap = engine.route.leaps[0]
                derived = kb.derive({"keys": key, "entry": leap.start}, lambda rows: {"key.0": key_of(rows, key, leap)})
                rows = {noise: (kb.noise_ids == noise).nonzero().flatten() for noise in kb.noise_ids.unique().tolist()}
                self._kept[key] = (
                    derived,
                    {noise: open_partition(derived, "key.0", noise, ids, None) for noise, ids in rows.items()},
                )
        return self._kept[key]


def growth(route: Route) -> list[float]:
    """a_N / a_j for the end of each leap."""
    grid = route.grid
    a = grid.signal
    return [float(a[-1] / a[grid.entries.index(leap.stop)]) for leap in route.leaps]


def serving(engine: ReDiEngine, candidate: Candidate) -> ReDiEngine:
    """The engine that serves a plan this way."""
    return replace(engine, key=candidate.key, neighbors=candidate.neighbors, combiner=candidate.combiner)
