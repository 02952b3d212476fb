"""What serving one route needs, derived from the stored trajectories: keys with an index per noise, brackets, history.

Nothing here is the truth: a table is computed from a knowledge base and bound to its manifest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
import torch
from jaxtyping import Float, Float32, Int8, Int64
from torch import Tensor

from redi.backends import Retriever
from redi.errors import InvalidInputError, KnowledgeBaseError, PlanError
from redi.guidance import require_halves
from redi.knowledge_base import Derived, KnowledgeBase
from redi.partitions import Partition, open_partition
from redi.plan import Route, Segment
from redi.solvers import DiffusersSolver, SolverAdapter
from redi.solvers.specs import SPECS
from redi.transports import Transport, brackets, needs
from redi.types import Rows

Key = Literal["denoised", "sample", "prompt"]
"""What neighbours are found by: x̂0 after the first call of the leap, x at its start, or the prompt's embedding."""


@final
@dataclass(frozen=True)
class Table:
    """Derived tensors and indexes that serve one route."""

    derived: Derived
    partitions: Mapping[tuple[int, int], Partition]  # (leap, noise id) → rows

    @classmethod
    def build(
        cls,
        kb: KnowledgeBase,
        route: Route,
        transport: Transport,
        solver: SolverAdapter,
        *,
        key: Key,
        retrieve_at: Sequence[int],
        retriever: Retriever | None,
        eight_bits: bool = False,
    ) -> Table:
        """Derive (or find, already derived) what serving `route` from `kb` needs; `require` says whether it can be.

        Args:
            kb: the stored trajectories.
            route: the plan on this solver's schedule.
            transport: which C the brackets are taken against.
            solver: whose steps C makes.
            key: what neighbours are found by.
            retrieve_at: indices of the leaps at which neighbours are looked up.
            retriever: builds one index per leap and noise, which is kept beside the table; None is what suits the rows.
            eight_bits: whether the defects of a coarse plan are kept in int8.
        """

        def compute(rows: Rows) -> dict[str, Tensor]:
            of = brackets(rows, route, transport, solver)
            if small:
                numbers, scales = quantised(of)
                found = {"bracket": numbers, "scale": scales}
            else:
                found = {"bracket": of.to(kb.config.dtype)}  # a bracket needs no more precision than its row had
            for at in retrieve_at:
                found[f"key.{at}"] = key_of(rows, key, route.leaps[at])
            for i in halved:
                found[f"unconditional.{i}"] = rows.unconditional[route.leaps[i].start]
            for i, leap in enumerate(route.leaps):
                for name, leaf in rows.history.get(leap.stop, {}).items() if not route.plan.own_grid else ():
                    found[f"history.{i}.{name}"] = leaf
            return found

        # a jump's bracket may be a whole sample, of which eight bits are not enough
        small = eight_bits and route.plan.own_grid
        halved = [i for i, leap in enumerate(route.leaps) if leap.halved]
        recipe = {
            "plan": str(route.plan),
            "called": [s.called for s in route.leaps],
            "transport": repr(transport),
            "solver": dict(solver.identity()),
            "key": key,
            "retrieve_at": list(retrieve_at),
            **({"bracket": "int8"} if small else {}),
            **({"halved": halved} if halved else {}),
        }
        derived = kb.derive(recipe, compute)
        noise_ids = kb.noise_ids
        rows = {noise_id: (noise_ids == noise_id).nonzero().flatten() for noise_id in noise_ids.unique().tolist()}
        partitions = {
            (at, noise_id): open_partition(derived, f"key.{at}", noise_id, ids, retriever)
            for noise_id, ids in rows.items()
            for at in retrieve_at
        }
        return cls(derived, partitions)

    def search(
        self, query: Float[Tensor, "b d"], noise_ids: Int64[Tensor, " b"], at: int, k: int
    ) -> tuple[Int64[Tensor, "b k"], Float32[Tensor, "b k"]]:
        """Row ids and L2 distances of the k nearest rows of each query's own noise; −1 and inf where there are none.

        No wider than the noise with the most rows: a gather copies a row even where its weight is zero.
        """
        k = min(k, max(part.index.shape[0] for (leap, _), part in self.partitions.items() if leap == at))
        ids = torch.full((len(query), k), -1, dtype=torch.int64)
        distances = torch.full((len(query), k), torch.inf, dtype=torch.float32)
        flat, asked = query.float().cpu().numpy(), noise_ids.numpy()
        for noise_id in sorted(set(asked.tolist())):
            if (part := self.partitions.get((at, noise_id))) is None:
                continue
            mine = np.flatnonzero(asked == noise_id)
            found = part.index.search(flat[mine], min(k, part.index.shape[0]))
            width = found.ids.shape[1]
            ids[mine, :width] = part.ids[torch.from_numpy(found.ids)]
            distances[mine, :width] = torch.from_numpy(found.distances).sqrt()
        return ids, distances

    def keys(self, ids: Int64[Tensor, "b k"], at: int) -> Float[Tensor, "b k d"]:
        """Keys of the given rows, float32."""
        return self.derived.gather(f"key.{at}", ids).float()

    def bracket(self, ids: Int64[Tensor, "b k"], leap: int) -> Float[Tensor, "b k *s"]:
        """Brackets of the given rows for one leap, float32."""
        return self.brackets(ids, [leap])[0].float()

    def brackets(self, ids: Int64[Tensor, "b k"], leaps: Sequence[int]) -> Float[Tensor, "l b k *s"]:
        """Brackets of the given rows for several leaps, in the precision they are stored in, or float32 for int8."""
        table = self.derived["bracket"]
        # whole rows by one number each: indexing by two copies number by number, five times as slow
        at = ids * table.shape[1] + torch.as_tensor(leaps).view(-1, *[1] * ids.ndim)
        found = table.flatten(0, 1).index_select(0, at.flatten()).unflatten(0, at.shape)
        if "scale" not in self.derived.names:
            return found
        scale = self.derived["scale"].flatten(0, 1).index_select(0, at.flatten())
        return found.float().mul_(scale.view(*at.shape, *[1] * (found.ndim - at.ndim)))

    def unconditional(self, ids: Int64[Tensor, "b k"], leap: int) -> Float[Tensor, "b k *s"]:
        """The model's outputs without the prompt at the start of a half call's leap, of the given rows, float32."""
        return self.derived.gather(f"unconditional.{leap}", ids).float()

    def first_of(self, noise_ids: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
        """Some row of each noise, the same one always; −1 where there is none."""
        parts = (self.partitions.get((0, noise_id)) for noise_id in noise_ids.tolist())
        return torch.tensor([-1 if part is None else int(part.ids[0]) for part in parts], dtype=torch.int64)

    def history(self, ids: Int64[Tensor, "b k"], leap: int) -> dict[str, Float[Tensor, "b k *s"]]:
        """Solver history of the given rows at the end of one leap, leaf by leaf."""
        prefix = f"history.{leap}."
        return {
            name.removeprefix(prefix): self.derived.gather(name, ids).float()
            for name in self.derived.names
            if name.startswith(prefix)
        }


def quantised(brackets: Float[Tensor, "n l *s"]) -> tuple[Int8[Tensor, "n l *s"], Float32[Tensor, "n l"]]:
    """Numbers of eight bits and a scale for each row and leap; numbers · scale is within scale / 2 of the brackets."""
    scale = brackets.flatten(2).abs().amax(2) / 127
    safe = scale.clamp(min=torch.finfo(torch.float32).tiny)  # a bracket of zeros stays one
    numbers = brackets / safe.view(*safe.shape, *[1] * (brackets.ndim - 2))
    return numbers.round().to(torch.int8), scale


def require(kb: KnowledgeBase, route: Route, solver: SolverAdapter, *, key: Key, retrieve_at: Sequence[int]) -> None:
    """Refuse what cannot be served; arguments as for `Table.build`, which takes only what passed here.

    Raises:
        InvalidInputError: a leap of `retrieve_at` that the plan does not have.
        PlanError: the key does not exist at a leap where it is asked for.
        KnowledgeBaseError: the rows do not hold what the route needs.
    """
    for at in retrieve_at:
        _check_key(key, route, at)
    mark = kb.fingerprint
    require_halves(
        route.plan,
        scale=mark.guidance,
        rescale=mark.guidance_rescale,
        diversity=kb.bank.diversity,
        begin=route.fine.timetable.begin,
    )
    wanted = needs(route, solver)
    if not wanted <= kb.record:
        raise KnowledgeBaseError(
            f"plan {route.plan} needs samples at entries {sorted(wanted.samples)} and denoised predictions at "
            f"{sorted(wanted.denoised)}; {kb.path} recorded {sorted(kb.record.samples)} and "
            f"{sorted(kb.record.denoised)}"
            + (
                f", and unconditional outputs at {sorted(kb.record.unconditional)}, not {sorted(wanted.unconditional)}"
                if not wanted.unconditional <= kb.record.unconditional
                else ""
            )
            + f"; rebuild it with --plan {route.plan}"
        )
    _check_solver(kb, route, solver)


def _check_solver(kb: KnowledgeBase, route: Route, solver: SolverAdapter) -> None:
    """Rows serve another solver only where it sees the same samples at the same times, and brings no history along."""
    mark = kb.fingerprint
    if mark.scheduler not in SPECS:
        return  # solved by an adapter of the user's own, which nothing on the disk can make again
    own = DiffusersSolver.from_config(mark.scheduler, mark.scheduler_config)
    # solvers may end at other noise levels: a defect leads to where the rows ended
    if not own.schedule(mark.steps).meets(route.fine):
        raise PlanError(
            f"the rows were solved by {own}, whose samples and timesteps are not those of {solver}; "
            "serve them with a solver on the same schedule, or build a knowledge base with this one"
        )
    if not route.plan.own_grid and solver.identity() != own.identity():
        raise PlanError(f"a jump carries the history of the solver of the rows, {own}; given {solver}")


def _check_key(key: Key, route: Route, at: int) -> None:
    if not 0 <= at < len(route.leaps):
        raise InvalidInputError(f"retrieve_at names leap {at}; plan {route.plan} has leaps 0 … {len(route.leaps) - 1}")
    leap = route.leaps[at]
    if key == "denoised" and not leap.called:
        raise PlanError(
            f"leap {leap} makes no model call, so there is no denoised prediction at its start; use key='sample'"
        )
    if leap.halved and at:
        raise PlanError(
            f"leap {at} of plan {route.plan} has a half call, whose other half is foretold by neighbours that were "
            "looked up before; look them up at leaps with whole calls, or at the first"
        )
    if key == "sample" and leap.start == 0:
        raise PlanError("the sample at entry 0 is the shared noise, the same for every row; use key='denoised'")


def key_of(rows: Rows, key: Key, leap: Segment) -> Float[Tensor, "n d"]:
    """What rows are found by at a leap."""
    match key:
        case "denoised":
            return rows.denoised[leap.start].flatten(1)
        case "sample":
            return rows.samples[leap.start].flatten(1)
        case "prompt":
            return rows.embeddings.flatten(1)
