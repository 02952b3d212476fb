"""What each bound says of each query in each cell, before anything is sampled, and the error of the leap itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.theory.norms import Norms
from benchmarks.theory.world import CORRECTED, Cell, TheoryWorld
from redi import Defect, ReDiEngine, Residual
from redi.combiners import combine
from redi.theory import Differences, Interpolation, Variogram, nearest_pairs
from redi.transports import brackets

BOUNDS: Final = {
    "exponent": "e^{∫L} alone",
    "theorem": "e^{∫L} ε, ε measured",
    "conditioned": "with μ for L and the conditions",
    "quotients": "largest quotient between rows",
    "mean": "mean square between rows",
}
"""Every bound by name, as it is called in tables."""

PAIRS: Final = 32
"""Each row is compared with so many nearest others."""


@dataclass(frozen=True)
class Foretold:
    """What is known of one cell.

    Args:
        cell: which.
        bounds: name → one number for each query, of the error at the value; where there is none, the name is missing.
        growth: what an error at the value may become at the end, at most and usually.
        error: of the leap at the value, from trajectories alone; None for a corrected plan.
        distance: of the nearest key.
        constants: Lipschitz constants of the bracket between rows, largest and in the mean, for each leap.
    """

    cell: Cell
    bounds: dict[str, Tensor]
    growth: tuple[float, float]
    error: Tensor | None
    distance: Tensor
    constants: list[tuple[float, float]]


def foretell(world: TheoryWorld, norms: Norms, cells: Sequence[Cell]) -> list[Foretold]:
    """Everything that needs no model call."""
    asked, _, _ = world.asked
    own: dict[tuple[str, str], Tensor] = {}
    laws: dict[tuple[str, str, int], list[tuple[Differences, Variogram]]] = {}
    pairs: dict[tuple[str, int, int], Tensor] = {}
    found: list[Foretold] = []
    for cell in tqdm(cells, desc="bounds", unit="cell"):
        engine = world.engine(cell.way, {"rows": world.rows_kb})
        said = (cell.transport, str(engine.plan))
        if said not in own:
            own[said] = brackets(asked, engine.route, engine.transport, engine.solver)
        if (*said, cell.rows) not in laws:
            everyone = torch.arange(len(engine.knowledge_base))[None]
            keys = engine.table.keys(everyone, 0)[0]
            which = (engine.served_key, cell.start, cell.rows)
            if which not in pairs:
                pairs[which] = _pairs(engine, keys)
            between = [
                Differences.between(keys, engine.table.bracket(everyone, j)[0], pairs[which])
                for j in range(len(engine.route.leaps))
            ]
            laws[*said, cell.rows] = [(d, Variogram.fit(d)) for d in between]
        found.append(_one(world, norms, cell, engine, own[said], laws[*said, cell.rows]))
    return found


def _pairs(engine: ReDiEngine, keys: Tensor) -> Tensor:
    """Within each noise."""
    ids = engine.knowledge_base.noise_ids
    parts = [(ids == n).nonzero().flatten() for n in ids.unique().tolist()]
    return torch.cat([mine[nearest_pairs(keys[mine], PAIRS)] for mine in parts])


def _one(
    world: TheoryWorld,
    norms: Norms,
    cell: Cell,
    engine: ReDiEngine,
    own: Tensor,
    laws: Sequence[tuple[Differences, Variogram]],
) -> Foretold:
    asked, _, _ = world.asked
    query = asked.samples[cell.start] if engine.served_key == "sample" else asked.denoised[cell.start]
    recall = engine.recall(query, asked.noise_ids, 0)
    keys, flat, w = engine.table.keys(recall.ids, 0), query.flatten(1), recall.weights
    terms = Interpolation.of(w, keys, flat)
    constants = [(d.lipschitz(), law.slope**0.5) for d, law in laws]
    worst = [c * terms.spread + terms.missing * law.size**0.5 for (c, _), (_, law) in zip(constants, laws, strict=True)]
    mean = [law.expected(w, keys, flat) for _, law in laws]
    bounds: dict[str, Tensor] = {}
    L, mu, K = norms.at("L", max), norms.at("mu", max), norms.at("K", max)
    usual = norms.at("mu", lambda v: sum(v) / len(v))
    a = engine.route.fine.signal

    def at_end(rates: Tensor, entry: int) -> float:
        return float(a[-1] / a[entry]) * norms.growth(rates, entry, engine.route.fine.fine)

    if cell.transport == CORRECTED:
        stops = [leap.stop for leap in engine.route.leaps]
        each = [c * terms.spread for c, _ in constants]
        bounds["theorem"] = _propagated(each, [at_end(L, s) for s in stops])
        bounds["quotients"] = _propagated(worst, [at_end(mu, s) for s in stops])
        bounds["mean"] = _propagated(mean, [at_end(usual, s) for s in stops])
        return Foretold(cell, bounds, (1.0, 1.0), None, recall.distances[:, 0], constants)
    bounds["quotients"], bounds["mean"] = worst[0], mean[0]
    if not isinstance(engine.transport, Defect):
        k, v = cell.start, cell.stop
        grown = float(a[v] / a[k])
        power = norms.growth(L, k, v) - isinstance(engine.transport, Residual)
        bounds["exponent"] = torch.full_like(terms.residual, grown * power)
        bounds["theorem"] = grown * power * terms.residual
        # conditions: each neighbour's own distance in the first denoised prediction
        first = engine.knowledge_base.gather(recall.ids.flatten()).denoised[0].float().view(*w.shape, -1)
        apart = (asked.denoised[0].flatten(1)[:, None] - first).norm(dim=2)
        far = (flat[:, None] - keys).norm(dim=2) / float(a[k])
        if isinstance(engine.transport, Residual):
            each = (norms.growth(L, k, v) - 1) * far + norms.growth(L, k, v, K) * apart
        else:
            each = norms.growth(mu, k, v) * far + norms.growth(mu, k, v, K) * apart
        bounds["conditioned"] = float(a[v]) * (w.abs() * each).sum(1) + terms.missing * laws[0][1].size ** 0.5
    error = (own[:, 0] - combine(w, engine.table.bracket(recall.ids, 0))).flatten(1).norm(dim=1).double()
    growth = at_end(mu, cell.stop), at_end(usual, cell.stop)
    return Foretold(cell, bounds, growth, error, recall.distances[:, 0], constants)


def _propagated(each: Sequence[Tensor], growth: Sequence[float]) -> Tensor:
    """Σ_j Λ_j E_j."""
    return torch.stack([g * e for g, e in zip(growth, each, strict=True)]).sum(0)
