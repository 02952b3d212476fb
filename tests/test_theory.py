"""Lipschitz constants against closed forms, and bounds against leaps in a world whose constants are known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from redi import theory
from redi.combiners import Affine, Kriging, LeastSquares, Nearest, combine
from redi.engine import ReDiEngine
from redi.errors import InvalidInputError
from redi.plan import Plan, Route
from redi.recorder import trajectory
from redi.schedules import Grid
from redi.solvers import DiffusersSolver
from redi.transports import Defect, Residual, Transport, Value, brackets, needs
from redi.types import Record
from tests.worlds import SHAPE, D, world

SOLVERS = {
    "ddim": DiffusersSolver.of(DDIMScheduler(timestep_spacing="trailing", clip_sample=False)),
    "dpmsolver++": DiffusersSolver.of(DPMSolverMultistepScheduler(use_karras_sigmas=True)),
}


@dataclass
class Mixture:
    """The exact denoiser of three equal Gaussians of variance S about means that the condition moves; ε-prediction."""

    grid: Grid
    S: float = 0.3
    seed: int = 0
    calls: int = 0

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        self.means = torch.randn(3, D, generator=g, dtype=torch.float64) * 0.5
        self.b = torch.randn(D, 6, generator=g, dtype=torch.float64) * 0.3
        self.levels = {float(t): (float(a), float(s)) for t, a, s in self.points()}
        self.calls = 0

    def points(self) -> zip[tuple[Tensor, Tensor, Tensor]]:
        return zip(self.grid.timesteps, self.grid.signal, self.grid.noise, strict=False)

    def __call__(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        self.calls += 1
        a, s = self.levels[float(t)]
        means = self.means + (c.double() @ self.b.T)[:, None]
        y, v = x.flatten(1).double() / a, (s / a) ** 2
        share = torch.softmax(-(y[:, None] - means).square().sum(2) / (2 * (self.S + v)), 1)
        denoised = (self.S * y + v * (share[..., None] * means).sum(1)) / (self.S + v)
        return ((y - denoised) * a / s).view_as(x).to(x.dtype)

    def denoiser(self, v: float) -> float:
        """Lipschitz constant of D at σ̄² = v: the posterior covariance of means is at most (diameter / 2)²."""
        radius = float(torch.pdist(self.means).max()) / 2
        return (self.S + v * radius**2 / (self.S + v)) / (self.S + v)

    def rates(self) -> Tensor:
        """Lipschitz constant of D − x̄ at every entry but the end, and of D in the shift of the means."""
        v = (self.grid.noise / self.grid.signal).square()[:-1].tolist()
        return torch.tensor([max(x / (self.S + x), self.denoiser(x) - 1) for x in v], dtype=torch.float64)


def matrix(seed: int, d: int = D) -> Tensor:
    return torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@given(seed=st.integers(0, 10**6), size=st.floats(1e-3, 1e3))
def test_norms_of_a_linear_map_are_those_of_its_matrix(seed: int, size: float) -> None:
    A = matrix(seed, 6) * size

    def f(x: Tensor) -> Tensor:
        return (x.flatten(1) @ A.T).view_as(x) + 1

    x = torch.zeros(2, 2, 3, dtype=torch.float64)
    much = {"tolerance": 1e-12}
    found = theory.operator_norm(f, x, generator=seeded(), **much)
    assert found.tolist() == pytest.approx([np.linalg.norm(A.numpy(), 2)] * 2, rel=1e-8)
    found = theory.logarithmic_norm(f, x, generator=seeded(), **much)
    largest = np.linalg.eigvalsh((A + A.T).numpy() / 2)[-1]
    assert found.tolist() == pytest.approx([largest] * 2, rel=1e-8, abs=1e-8 * size)


def test_norms_are_taken_at_each_sample_by_itself() -> None:
    A, x = matrix(3, 5), torch.randn(4, 5, generator=seeded(), dtype=torch.float64)
    found = theory.operator_norm(lambda x: torch.tanh(x @ A.T), x, generator=seeded(), tolerance=1e-10)
    jacobians = (1 - torch.tanh(x @ A.T).square())[..., None] * A
    assert found.tolist() == pytest.approx(torch.linalg.matrix_norm(jacobians, 2).tolist(), rel=1e-5)


def test_a_map_that_is_constant_has_norm_zero() -> None:
    found = theory.operator_norm(lambda x: 0 * x, torch.ones(2, 3), generator=seeded())
    assert found.tolist() == [0, 0]


def test_the_right_hand_side_of_gaussian_data() -> None:
    """Data of variances S have D(x̄) = S/(S + σ̄²) x̄: L = σ̄²/(S + σ̄²) of the least S, μ is minus that of the most."""
    grid = SOLVERS["ddim"].schedule(10)
    S = torch.linspace(0.1, 2.0, D, dtype=torch.float64)
    for at in (0, 5, 9):
        a, s = float(grid.signal[at]), float(grid.noise[at])
        v = (s / a) ** 2

        def denoise(x: Tensor, t: Tensor, a: float = a, s: float = s, v: float = v) -> Tensor:
            y = x.flatten(1) / a
            return ((y - S / (S + v) * y) * a / s).view_as(x)

        f = theory.right_hand_side(denoise, grid, at)
        x = torch.randn(3, *SHAPE, generator=seeded(), dtype=torch.float64)
        assert torch.allclose(f(x).flatten(1), (S / (S + v) - 1) * x.flatten(1))
        much = {"generator": seeded(), "tolerance": 1e-9}
        assert theory.operator_norm(f, x, **much).tolist() == pytest.approx([v / (0.1 + v)] * 3, rel=1e-6)
        assert theory.logarithmic_norm(f, x, **much).tolist() == pytest.approx([-v / (2.0 + v)] * 3, rel=1e-6)


@given(rate=st.floats(-3, 3), push=st.floats(0, 2), epsilon=st.floats(0, 10))
def test_the_bound_is_the_solution_where_the_flow_is_scalar_and_linear(
    rate: float, push: float, epsilon: float
) -> None:
    t = torch.linspace(0, 1.5, 7, dtype=torch.float64)
    one = torch.ones(7, dtype=torch.float64)
    e = torch.tensor([epsilon], dtype=torch.float64)
    forced = 1.5 if abs(rate) < 1e-12 else math.expm1(1.5 * rate) / rate
    exact = math.exp(1.5 * rate) * epsilon + push * forced
    assert float(theory.value_bound(e, rate * one, t, push * one)) == pytest.approx(exact, rel=1e-9, abs=1e-9)


def test_the_logarithmic_norm_makes_the_bound_tight_for_gaussian_data() -> None:
    """With one variance S, x̄ − mean goes as √(S + σ̄²): the sharp bound is that, Lipschitz constants can only grow."""
    t, S = torch.linspace(-2, 3, 400, dtype=torch.float64), 0.5
    v = torch.exp(-2 * t)
    one = torch.ones(1, dtype=torch.float64)
    exact = float(torch.sqrt((S + v[-1]) / (S + v[0])))
    assert float(theory.value_bound(one, -v / (S + v), t)) == pytest.approx(exact, rel=1e-3)
    assert float(theory.value_bound(one, v / (S + v), t)) == pytest.approx(1 / exact, rel=1e-3)


numbers = st.floats(0, 5)


@given(L=st.lists(numbers, min_size=2, max_size=6), m=numbers, low=numbers, more=numbers)
def test_bounds_rise_with_epsilon_and_vanish_with_it(L: list[float], m: float, low: float, more: float) -> None:
    rates, t = torch.tensor(L, dtype=torch.float64), torch.linspace(0, 1, len(L), dtype=torch.float64)
    push = torch.full_like(rates, m)
    both = torch.tensor([low, low + more], dtype=torch.float64)
    for bound in (theory.value_bound, theory.residual_bound):
        a, b = bound(both, rates, t, push).tolist()
        assert 0 <= a <= b * (1 + 1e-12) + 1e-12
        assert float(bound(torch.zeros(1, dtype=torch.float64), rates, t)) == 0
        assert float(bound(both[:1], rates, t)) <= a * (1 + 1e-12) + 1e-12
    C = torch.tensor(L, dtype=torch.float64)
    a, b = theory.defect_bound(C, torch.ones_like(C), both).tolist()
    assert 0 <= a <= b
    assert float(theory.defect_bound(C, C, torch.zeros(1))) == 0


def test_no_leap_no_residual_bound() -> None:
    one = torch.ones(1, dtype=torch.float64)
    assert float(theory.residual_bound(one, one, one)) == 0


@pytest.mark.parametrize("clock", [[0.0, math.inf], [1.0, 0.0]])
def test_a_clock_that_cannot_be_integrated_over_is_refused(clock: list[float]) -> None:
    with pytest.raises(InvalidInputError, match="finite and ascending"):
        theory.value_bound(torch.ones(1), torch.ones(2).double(), torch.tensor(clock, dtype=torch.float64))


def test_the_clock_of_a_grid() -> None:
    grid = SOLVERS["dpmsolver++"].schedule(12)
    t = theory.clock(grid)
    assert bool((t.diff() > 0).all())
    assert float(t[-1]) == math.inf
    assert float(torch.exp(-t[3])) == pytest.approx(float(grid.noise[3] / grid.signal[3]))


# Leaps in a world whose constants are known.


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("transport", [Value(), Residual()])
@pytest.mark.parametrize(("key", "value"), [(8, 12), (4, 20), (16, 38)])
def test_a_jump_errs_by_no_more_than_its_bound(
    solver: str, transport: Transport, key: int, value: int, tmp_path: Path
) -> None:
    grid = SOLVERS[solver].schedule(40)
    model = Mixture(grid)
    known = world(tmp_path / "kb", SOLVERS[solver], Plan.jump(key, value, 40), model, rows=12, noises=1)
    asked = torch.randn(16, 6, generator=seeded())
    record = Record(frozenset({key, value}))
    ids = torch.zeros(16, dtype=torch.int64)
    start = known.noise(ids)
    _, mine = trajectory(model, start, SOLVERS[solver], 40, record, noise_ids=ids, prompts=[""] * 16, condition=asked)
    t, L = theory.clock(grid)[key : value + 1], model.rates()[key : value + 1]
    for combiner, h in ((Nearest(), 1), (Affine(), 4)):
        engine = ReDiEngine(
            known.kb, SOLVERS[solver], Plan.jump(key, value, 40), transport, combiner=combiner, neighbors=h
        )
        recall = engine.recall(mine.samples[key], ids, 0)
        state = SOLVERS[solver].at(engine.route.grid, key)
        x, _ = transport.propagate(mine.samples[key], None, state, engine.route.leaps[0], SOLVERS[solver])
        error = (engine.leap(x, recall, 0) - mine.samples[value]).flatten(1).norm(dim=1).double()
        bound = torch.zeros(16, dtype=torch.float64)
        for k in range(h):  # Σ |w_i| of each neighbour's own bound
            rows = known.kb.gather(recall.ids[:, k])
            far = (rows.samples[key] - mine.samples[key]).flatten(1).norm(dim=1) / grid.signal[key]
            conditions = known.conditions[[int(p) for p in rows.prompts]]
            shift = ((conditions - asked).double() @ model.b.T).norm(dim=1)
            of = theory.residual_bound if isinstance(transport, Residual) else theory.value_bound
            each = torch.cat([of(far[i : i + 1], L, t, L * shift[i]) for i in range(16)])
            bound += recall.weights[:, k].abs().double() * each * grid.signal[value]
        assert bool((error > 1e-4).all())
        assert bool((error <= bound * (1 + 1e-3) + 1e-4).all())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("calls", [4, 8])
def test_a_corrected_plan_errs_by_no_more_than_its_bound(solver: str, calls: int, tmp_path: Path) -> None:
    taken, plan = SOLVERS[solver], Plan.coarse(calls, 40)
    grid = taken.schedule(40)
    model = Mixture(grid)
    known = world(tmp_path / "kb", taken, plan, model, rows=12, noises=1)
    asked, ids = torch.randn(16, 6, generator=seeded()), torch.zeros(16, dtype=torch.int64)
    start, route = known.noise(ids), Route.lay(plan, grid)
    end, mine = trajectory(
        model, start, taken, 40, needs(route, taken), noise_ids=ids, prompts=[""] * 16, condition=asked
    )
    own = brackets(mine, route, Defect(), taken)
    for combiner, h in ((Nearest(), 1), (Kriging(), 8)):
        engine = ReDiEngine(known.kb, taken, plan, Defect(), combiner=combiner, neighbors=h)
        made, _ = engine.sample(model, start, condition=asked, noise_ids=ids)
        recall = engine.recall(mine.denoised[0], ids, 0)
        keys = engine.table.keys(recall.ids, 0)
        epsilon = theory.Interpolation.of(recall.weights, keys, mine.denoised[0].flatten(1)).spread
        C = torch.tensor([largest(engine, mine.denoised[0], own[:, j], j) for j in range(calls)], dtype=torch.float64)
        bound = theory.defect_bound(C, propagation(taken, route.grid, model), epsilon)
        error = (made - end).flatten(1).norm(dim=1).double()
        assert float(error.mean()) > 1e-4  # well above float32's rounding
        assert bool((error <= bound * (1 + 1e-3) + 1e-5).all())


def largest(engine: ReDiEngine, keys: Tensor, own: Tensor, leap: int) -> float:
    """The largest difference quotient of a leap's defect over rows and queries: the true constant of this set."""
    rows = torch.arange(len(engine.knowledge_base))[None]
    q = torch.cat([engine.table.keys(rows, 0)[0], keys.flatten(1)])
    g = torch.cat([engine.table.bracket(rows, leap)[0], own])
    pairs = torch.combinations(torch.arange(len(q)), 2)
    return theory.Differences.between(q, g, pairs).lipschitz()


def propagation(solver: DiffusersSolver, grid: Grid, model: Mixture) -> Tensor:
    """Λ_j: how an error after leap j grows, from the step's own coefficients of x, D and the last D before it."""
    steps: list[tuple[float, float, float]] = []
    state, x = solver.init(grid), torch.zeros(1, 1, 1, 3)
    for at in range(len(grid)):
        x = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 1, 1, 3)
        d = torch.tensor([0.0, 1.0, 0.0]).reshape(1, 1, 1, 3)
        leaves = {name: torch.tensor([0.0, 0.0, 1.0]).reshape(1, 1, 1, 3) for name in state.leaves()}
        before = solver.at(grid, at, leaves) if at and leaves else state
        out, _ = solver.step(grid.model_output(d, x, at), x, before)
        _, state = solver.step(torch.zeros_like(x), x, state)
        steps.append(tuple(out.flatten().abs().tolist()))
    v = [(float(grid.noise[i]) / float(grid.signal[i])) ** 2 for i in range(len(grid))]
    D_of = [model.denoiser(x) / float(grid.signal[i]) for i, x in enumerate(v)]  # in x itself
    found: list[float] = []
    for j in range(len(grid)):
        errors = [0.0] * (len(grid) + 1)
        errors[j + 1] = 1.0
        for i in range(j + 1, len(grid)):
            alpha, beta, gamma = steps[i]
            errors[i + 1] = (alpha + beta * D_of[i]) * errors[i] + gamma * D_of[i - 1] * errors[i - 1]
        found.append(errors[-1])
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpmsolver++", 2)])
def test_constants_of_defects_shrink_with_the_step_as_its_order_says(solver: str, order: int) -> None:
    """C = O(h^{p+1}), p the solver's order; a value's constant does not shrink."""
    fine, middle, taken = 500, 300, SOLVERS[solver]
    grid = taken.schedule(fine)
    model, ids = Mixture(grid), torch.zeros(24, dtype=torch.int64)
    conditions = torch.randn(24, 6, generator=seeded())
    noise = torch.randn(1, *SHAPE, generator=seeded()).expand(24, -1, -1, -1).double()
    wide = (32, 16, 8)
    routes = [Route.lay(Plan.of([0, middle - h, middle, middle + h], fine), grid) for h in wide]
    record = Record()
    for route in routes:
        record |= needs(route, taken)
    _, rows = trajectory(model, noise, taken, fine, record, noise_ids=ids, prompts=[""] * 24, condition=conditions)
    keys, t = rows.denoised[0].flatten(1), theory.clock(grid)
    pairs = torch.combinations(torch.arange(24), 2)

    def constants(of: Transport) -> list[float]:
        found: list[float] = []
        for route in routes:
            g = brackets(rows, route, of, taken)[:, 2]
            found.append(theory.Differences.between(keys, g, pairs).lipschitz(0.5))
        return found

    lengths = [float(t[middle + h] - t[middle]) for h in wide]
    slope = np.polyfit(np.log(lengths), np.log(constants(Defect())), 1)[0]
    assert order + 0.7 < slope < order + 1.3
    flat = [theory.Differences.between(keys, rows.samples[middle + h], pairs).lipschitz(0.5) for h in wide]
    assert max(flat) < 2 * min(flat)


def test_the_first_order_defect_of_a_denoiser_that_moves_evenly() -> None:
    """D(τ) = G τ: the step keeps D = 0, the solution is ∫ e^{−(h−τ)} G τ dτ, by the midpoint rule."""
    h, G = 0.7, 1.3
    tau = (torch.arange(10_000, dtype=torch.float64) + 0.5) * h / 10_000
    exact = float((torch.exp(tau - h) * G * tau).sum() * h / 10_000)
    assert theory.first_order_defect(h, G) == pytest.approx(exact, rel=1e-6)
    assert theory.first_order_defect(1e-3, G) == pytest.approx(G * 1e-6 / 2, rel=1e-3)


# Interpolation.


@given(seed=st.integers(0, 10**6), bend=st.floats(0, 2), k=st.integers(1, 6))
def test_smooth_functions_err_by_the_residual_and_the_curvature(seed: int, bend: float, k: int) -> None:
    g = torch.Generator().manual_seed(seed)
    keys, q = torch.randn(5, k, 4, generator=g).double(), torch.randn(5, 4, generator=g).double()
    A = torch.randn(4, 4, generator=g).double()
    w = Affine(0.01).weights(keys, q)
    terms = theory.Interpolation.of(w, keys, q)

    def f(x: Tensor) -> Tensor:
        return x @ A.T + bend / 2 * x.square()  # its derivative is A + bend · diag(x)

    error = (f(q) - combine(w, f(keys))).norm(dim=1)
    slope = torch.linalg.matrix_norm(A + bend * torch.diag_embed(q), 2)
    assert bool((error <= slope * terms.residual + bend / 2 * terms.curvature + 1e-6).all())
    assert bool((terms.residual <= terms.spread + 1e-6).all())
    assert bool((terms.missing <= 1e-6).all())


def test_the_residual_alone_bounds_nothing() -> None:
    """|x| between two keys: the query is interpolated without residual, its value is not. The spread holds."""
    keys, q, w = torch.tensor([[[-1.0], [1.0]]]), torch.zeros(1, 1), torch.tensor([[0.5, 0.5]])
    terms = theory.Interpolation.of(w, keys, q)
    error = float((q.abs() - combine(w, keys.abs())).norm())
    assert float(terms.residual) == 0
    assert error == 1 == float(terms.spread)


def test_a_single_neighbour_makes_all_terms_one() -> None:
    keys, q = torch.tensor([[[3.0, 4.0]]]), torch.zeros(1, 2)
    terms = theory.Interpolation.of(torch.ones(1, 1), keys, q)
    assert [float(v) for v in (terms.residual, terms.spread, terms.curvature, terms.missing)] == [5, 5, 25, 0]


def test_quotients_are_those_of_the_pairs() -> None:
    keys = torch.tensor([[0.0], [1.0], [3.0], [3.0]])
    found = theory.Differences.between(keys, keys.square()[..., None], torch.combinations(torch.arange(4), 2))
    assert found.lipschitz() == 4  # |3² − 1²| / |3 − 1|; equal keys do not count
    assert found.lipschitz(0.0) == 1
    assert found.size == (0 + 1 + 81 + 81) / 4


def test_equal_keys_have_no_quotient() -> None:
    pairs = torch.tensor([[0, 1]])
    with pytest.raises(InvalidInputError, match="all are equal"):
        theory.Differences.between(torch.ones(2, 3), torch.ones(2, 3), pairs).lipschitz()


@given(seed=st.integers(0, 10**6), n=st.integers(2, 12), k=st.integers(1, 14))
def test_nearest_pairs_are_the_nearest(seed: int, n: int, k: int) -> None:
    keys = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    pairs = theory.nearest_pairs(keys, k)
    distances = (keys[:, None] - keys).norm(dim=2)
    distances.fill_diagonal_(torch.inf)
    for i in range(n):
        mine = pairs[pairs[:, 0] == i, 1].tolist()
        assert len(set(mine)) == len(mine) == min(k, n - 1)
        assert distances[i, mine].max() <= distances[i].sort().values[min(k, n - 1) - 1]


def test_pairs_of_one_row_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="at least 2 rows"):
        theory.nearest_pairs(torch.ones(1, 3), 1)


def field(seed: int, wide: int = 4096) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values of a random linear field with noise, whose variogram is 1.4 + 0.6 r²; the last is the query's."""
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(40, 5, generator=g, dtype=torch.float64)
    A = torch.randn(5, wide, generator=g, dtype=torch.float64) * (0.6 / wide) ** 0.5
    values = keys @ A + torch.randn(40, wide, generator=g, dtype=torch.float64) * (0.7 / wide) ** 0.5
    return keys[:-1], values[:-1], keys[-1:], values[-1:]


def test_a_variogram_is_found_and_foretells_the_error_of_any_weights() -> None:
    keys, values, q, g = field(0)
    found = theory.Variogram.fit(
        theory.Differences.between(keys, values, torch.combinations(torch.arange(len(keys)), 2))
    )
    assert found.nugget == pytest.approx(1.4, rel=0.2)
    assert found.slope == pytest.approx(0.6, rel=0.1)
    for combiner, k in ((Nearest(), 1), (Affine(), 8), (Kriging(), 39), (Affine(1e-6), 20)):
        near = (keys - q).norm(dim=1).argsort()[:k]
        w = combiner.weights(keys[near][None], q)
        error = float((g - combine(w, values[near][None])).norm())
        assert float(found.expected(w, keys[near][None], q)) == pytest.approx(error, rel=0.12)


def test_weights_that_do_not_sum_to_one_are_charged_with_the_size() -> None:
    law = theory.Variogram(nugget=0.5, slope=2.0, size=9.0)
    keys, q = torch.ones(1, 2, 3), torch.zeros(1, 3)
    assert float(law.expected(torch.zeros(1, 2), keys, q)) == 3.0
    short = LeastSquares().weights(torch.ones(1, 1, 3), 2 * torch.ones(1, 3))  # weight 2 explains the query
    assert float(law.expected(short, torch.ones(1, 1, 3), 2 * torch.ones(1, 3))) > 3.0


@given(seed=st.integers(0, 10**6), k=st.integers(1, 9))
def test_one_more_neighbour_is_no_worse_under_the_law_itself(seed: int, k: int) -> None:
    """The best weights for a variogram cannot lose by having more rows to choose from; a mean of all is one of them."""
    keys, _, q, _ = field(seed, wide=1)
    law = theory.Variogram(nugget=1.0, slope=0.0, size=1.0)
    means = [torch.full((1, n), 1 / n) for n in (k, k + 1)]
    a, b = (float(law.expected(w, keys[None, : w.shape[1]], q)) for w in means)
    assert b <= a


# Calibration.


@given(power=st.floats(0.1, 3), factor=st.floats(1e-3, 1e3), seed=st.integers(0, 10**6))
def test_a_power_law_is_found(power: float, factor: float, seed: int) -> None:
    b = torch.rand(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 9 + 0.1
    found = theory.Calibrated.fit(b, factor * b**power)
    assert found.power == pytest.approx(power, rel=1e-6)
    assert torch.allclose(found.expected(b), factor * b**power)
    assert found.margin == pytest.approx(1)


@given(seed=st.integers(0, 10**6), level=st.floats(0.5, 0.95), turn=st.booleans())
def test_calibration_rises_keeps_the_mean_and_covers(seed: int, level: float, turn: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    b = torch.rand(60, generator=g, dtype=torch.float64) + 0.1
    e = (1 / b if turn else b) * torch.exp(torch.randn(60, generator=g, dtype=torch.float64))
    found = theory.Calibrated.fit(b, e, level)
    steps = found.expected(torch.linspace(0.01, 10, 50)).diff()
    assert bool((steps >= 0).all())
    assert float(found.expected(b).mean()) == pytest.approx(float(e.mean()))
    assert found.coverage(b, e) >= level
    assert found.coverage(b, e) <= level + 0.05


def test_equal_bounds_foretell_the_mean() -> None:
    found = theory.Calibrated.fit(torch.ones(3), torch.tensor([1.0, 2.0, 6.0]))
    assert found.expected(torch.tensor([0.5, 1.0])).tolist() == pytest.approx([3, 3])


@pytest.mark.parametrize(
    ("bound", "error", "level"),
    [
        ([1.0], [1.0], 0.9),
        ([1.0, 0.0], [1.0, 1.0], 0.9),
        ([1.0, 2.0], [1.0, math.nan], 0.9),
        ([1.0, 2.0], [1.0, 1.0], 1.0),
    ],
)
def test_what_cannot_be_calibrated_is_refused(bound: list[float], error: list[float], level: float) -> None:
    with pytest.raises(InvalidInputError, match="positive, finite"):
        theory.Calibrated.fit(torch.tensor(bound), torch.tensor(error), level)
