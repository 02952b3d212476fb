"""Tuning by left-out rows, in worlds whose defects are made to order: what can be learnt is, else not believed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from redi.cli import names
from redi.combiners import Affine, Kriging
from redi.engine import ReDiEngine
from redi.errors import InvalidInputError
from redi.gate import NOBODY, Gate, Trust
from redi.knowledge_base import Config, KnowledgeBase, Writer
from redi.noise import NoiseBank
from redi.plan import Plan, Route
from redi.solvers import DiffusersSolver
from redi.transports import needs
from redi.tuned import Tunings
from redi.tuning import Candidate, Held, LeftOut, Sums, candidates, fit, held_out, tune
from redi.tuning.left_out import growth
from redi.types import Rows
from tests.tiny import tiny_pipeline
from tests.worlds import SHAPE, mark_of

PLAN = Plan.parse("coarse:3/12")
SOLVER = DiffusersSolver.from_config(
    "DEISMultistepScheduler", {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
)
Defects = Callable[[Tensor, int], Tensor]
"""Keys (n, d) and a leap's number → defects (n, d)."""


def made(folder: Path, keys: Tensor, defects: Defects, noises: int = 1, plan: Plan = PLAN) -> KnowledgeBase:
    """Rows with these keys whose defects are these; `keys` are shared out among the noises."""
    route = Route.lay(plan, SOLVER.schedule(plan.fine))
    record = needs(route, SOLVER)
    bank = NoiseBank(seed=1, size=noises, shape=SHAPE)
    ids = torch.arange(len(keys)) % noises
    x = bank.noise(ids) * route.grid.initial_scale
    state = SOLVER.init(route.grid)
    samples, denoised = {0: x}, dict[int, Tensor]()
    for j, leap in enumerate(route.leaps):
        denoised[leap.start] = keys.view(-1, *SHAPE)
        m = route.grid.model_output(denoised[leap.start], x, state.position)
        stepped, state = SOLVER.step(m, x, state)
        x = samples[leap.stop] = stepped + defects(keys, j).view(-1, *SHAPE)
    config = Config(mark_of(SOLVER, plan.fine), record, bank.to_json(), (str(plan),), "float32")
    with Writer.open(folder, config) as writer:
        names = [f"prompt {i}" for i in range(len(keys))]
        writer.append(Rows(samples, denoised, {}, ids, torch.zeros(len(keys), 0), names))
    return KnowledgeBase.open(folder)


def keys_of(n: int, seed: int = 0) -> Tensor:
    """Keys in six of thirty-two dimensions, away from the origin."""
    g = torch.Generator().manual_seed(seed)
    return 1 + torch.randn(n, 6, generator=g) @ torch.randn(6, math.prod(SHAPE), generator=g) / 6**0.5


def noise(keys: Tensor, j: int) -> Tensor:
    """Defects that have nothing to do with the keys."""
    return torch.randn(keys.shape, generator=torch.Generator().manual_seed(j)) / 10


def linear(keys: Tensor, j: int) -> Tensor:
    """Defects that are affine in the keys."""
    A = torch.randn(32, 32, generator=torch.Generator().manual_seed(9 + j)) / 50
    return keys @ A + 0.1


def test_defects_that_are_affine_in_the_keys_are_learnt(tmp_path: Path) -> None:
    kb = made(tmp_path / "kb", keys_of(120), linear, noises=2)
    (found,) = tune(kb).values()
    assert found.trust.average < 0.05
    assert min(found.trust.scale) > 0.95
    assert found.trust.error[0] < 0.05
    assert found.rows == 120


def test_defects_that_keys_say_nothing_of_are_not_believed(tmp_path: Path) -> None:
    kb = made(tmp_path / "kb", keys_of(160), noise)
    (found,) = tune(kb).values()
    assert max(found.trust.scale) < 0.3
    assert 0.9 < found.trust.average < 1.05
    # so whoever wants better than the plain solver is not served
    engine = ReDiEngine.serving(kb, max_error=0.7)[0]
    ids = torch.zeros(4, dtype=torch.int64)
    assert not engine.recall(keys_of(4, seed=5).view(-1, *SHAPE), ids, 0).hit.any()


def test_what_all_rows_share_is_learnt_from_any_of_them(tmp_path: Path) -> None:
    kb = made(tmp_path / "kb", keys_of(40), lambda keys, j: torch.full_like(keys, 0.1 + j))
    (found,) = tune(kb).values()
    assert found.trust.average < 1e-3
    assert found.neighbors == 1  # as good as many, and cheaper


@pytest.mark.parametrize("skip", [0, 5])
def test_left_out_rows_are_what_a_loop_over_them_says(tmp_path: Path, skip: int) -> None:
    kb = made(tmp_path / "kb", keys_of(30), linear, noises=2)
    engine = ReDiEngine.serving(kb)[0]
    left = LeftOut(engine, 7)
    combiner, h = Kriging(nugget=0.2), 6
    (sums,) = left.sums([Candidate("denoised", h, combiner)], skip=skip)
    rows = kb.gather(torch.arange(len(kb)))
    keys = rows.denoised[0].flatten(1)
    table = engine.table
    corrections = torch.stack(
        [
            sum((g * table.bracket(torch.tensor([[i]]), j).flatten() for j, g in enumerate(growth(engine.route))))
            for i in range(len(kb))
        ]  # type: ignore
    )
    order, at = [], 0
    for z in (0, 1):
        order += [int(i) for i in left.rows if int(kb.noise_ids[i]) == z]
    for i in order:
        others = [k for k in range(len(kb)) if k != i and kb.noise_ids[k] == kb.noise_ids[i]]
        others.sort(key=lambda k: float((keys[k] - keys[i]).norm()))
        others = others[skip : skip + h]
        w = combiner.weights(keys[others][None], keys[i][None])[0]
        v_hat = (w[:, None] * corrections[others]).sum(0)
        for s in (0.0, 0.4, 1.0):
            typical = corrections[order].square().sum(1).mean().sqrt()
            plain = max(float(corrections[i].norm()), 0.1 * float(typical))
            wanted = float((corrections[i] - s * v_hat).norm()) / plain
            assert float(sums.errors(s)[at]) == pytest.approx(wanted, rel=1e-3, abs=1e-6)
        assert float(sums.distance[at]) == pytest.approx(float((keys[others[0]] - keys[i]).norm()), rel=1e-5)
        at += 1
    assert at == len(left.rows)


def test_a_correction_is_what_the_plain_solver_misses_at_the_end(tmp_path: Path) -> None:
    """Where the denoised prediction does not change, so nothing an error does comes back, but for the noise that is
    left: a step of DDIM multiplies an error in x by the noise's own shrinking, and x̄ = x / a by less."""
    kb = made(tmp_path / "kb", keys_of(10), lambda keys, j: 0.1 * keys if j == 2 else torch.zeros_like(keys))
    left = LeftOut(ReDiEngine.serving(kb)[0], 10)
    rows = kb.gather(torch.arange(10))
    found = left.corrections(torch.arange(10)[:, None])[:, 0]
    torch.testing.assert_close(found, 0.1 * rows.denoised[0].flatten(1), rtol=1e-3, atol=1e-5)


def test_what_was_found_is_what_is_served_until_the_rows_change(tmp_path: Path) -> None:
    kb = made(tmp_path / "kb", keys_of(60), linear)
    found = tune(kb)[str(PLAN)]
    assert Tunings.read(kb).plans[str(PLAN)] == found
    (engine,) = ReDiEngine.serving(kb)
    assert (engine.served_key, engine.neighbors, engine.combiner) == (found.key, found.neighbors, found.combiner)
    assert engine.gate == Gate(trust=found.trust)
    assert tune(kb)[str(PLAN)] == found  # what was found before changes nothing
    more = made(tmp_path / "kb", torch.cat([keys_of(60), keys_of(3, seed=4)]), linear)
    assert len(more) == 63
    (other,) = ReDiEngine.serving(more)
    assert other.gate == Gate()
    assert "redi tune" in other.notes[0]


def test_the_best_candidate_is_taken_or_one_as_good_with_fewer_neighbours(tmp_path: Path) -> None:
    kb = made(tmp_path / "kb", keys_of(90), lambda keys, j: linear(keys, j) + noise(keys, j))
    (found,) = tune(kb).values()
    least = min(found.candidates.values())
    name = str(Candidate(found.key, found.neighbors, found.combiner))
    assert found.candidates[name] <= 1.01 * least
    every = candidates(ReDiEngine.serving(kb)[0], 90)
    assert set(found.candidates) == {str(c) for c in every}
    fewer = [c for c in every if c.neighbors < found.neighbors]
    assert all(found.candidates[str(c)] > 1.01 * least for c in fewer)


@given(st.integers(0, 2**32 - 1), st.integers(2, 200), st.floats(0, 2))
def test_curves_are_curves_and_cover_what_they_are_fitted_on(seed: int, n: int, agreement: float) -> None:
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(n, 5, generator=g)
    distance = torch.rand(n, generator=g, dtype=torch.float64)
    sums = Sums.of(distance, v, agreement * v + distance[:, None] * torch.randn(n, 5, generator=g))
    trust = fit(sums, Sums.of(2 * distance, v, 0.5 * v), unit=0.5)  # its constructor refuses what is no curve
    every = Sums.cat([sums, Sums.of(2 * distance, v, 0.5 * v)])
    within = every.errors(trust.scales(every.distance[:, None])) <= trust.errors(every.distance[:, None], bound=True)
    believed = trust.scales(every.distance[:, None]) > 0
    if believed.sum() > 100:
        assert within[believed].double().mean() > 0.8


def test_errors_of_rows_without_defects() -> None:
    nothing = torch.zeros(2, 3)
    sums = Sums.of(torch.ones(2), nothing, torch.tensor([[0.0, 0, 0], [1, 0, 0]]))
    assert sums.errors(1.0).tolist() == [0, 1]
    assert Sums.of(torch.ones(1), nothing[:1], nothing[:1]).share == 1


def test_rows_that_all_have_one_key_are_served_at_it(tmp_path: Path) -> None:
    kb = made(tmp_path / "kb", keys_of(1).repeat(40, 1), lambda keys, j: torch.full_like(keys, 0.1))
    tune(kb)
    (engine,) = ReDiEngine.serving(kb, max_error=0.5)
    ids = torch.zeros(2, dtype=torch.int64)
    asked = torch.stack([keys_of(1)[0], keys_of(1)[0] + 0.001]).view(2, *SHAPE)
    assert engine.recall(asked, ids, 0).hit.all()


def test_a_row_on_which_the_plain_solver_is_right_does_not_outweigh_the_others(tmp_path: Path) -> None:
    def all_but_one(keys: Tensor, j: int) -> Tensor:
        found = noise(keys, j)
        found[3] *= 1e-6
        return found

    (found,) = tune(made(tmp_path / "kb", keys_of(40), all_but_one)).values()
    assert found.trust.average < 2


@pytest.mark.parametrize(("noises", "rows"), [(2, 2), (16, 3)])
def test_a_few_rows_of_many_noises_say_something(tmp_path: Path, noises: int, rows: int) -> None:
    kb = made(tmp_path / "kb", keys_of(48), linear, noises=noises)
    left = LeftOut(ReDiEngine.serving(kb)[0], rows)
    assert len(kb.noise_ids[left.rows].unique()) == rows if rows <= noises else noises
    (found,) = tune(kb, rows=rows).values()
    assert found.trust.unit > 0


def test_only_what_took_a_correction_is_calibrated_on() -> None:
    believes_half = Trust(1.0, (0.0, 1.0, 1.001), (1.0, 1.0, 0.0), (0.4, 0.5, 0.5), (0.6, 0.8, 0.8), 0.45)
    near, far = torch.full((8,), 0.5, dtype=torch.float64), torch.full((8,), 2.0, dtype=torch.float64)
    ones = torch.ones(8, dtype=torch.float64)
    trust, said = Held(torch.cat([near, far]), torch.cat([0.9 * ones, ones])).calibrate(believes_half)
    assert trust.errors(near[:, None]).tolist() == pytest.approx([0.9] * 8)  # twice what was expected
    assert said["stretch"] == pytest.approx(2)
    assert trust.average == said["measured"] == pytest.approx(0.95)
    nobody, said = Held(far, ones).calibrate(believes_half)
    assert nobody.average == 1
    assert "coverage" not in said
    hopeful = Trust(1.0, (0.0,), (1.0,), (0.0,), (0.0,), 0.0)
    trust, said = Held(near, 0.5 * ones).calibrate(hopeful)
    assert trust.errors(near[:, None]).tolist() == pytest.approx([0.5] * 8)
    assert said["coverage"] == 1


def test_nobody_is_believed_by_a_gate_that_believes_nobody() -> None:
    assert not Gate(trust=NOBODY).opens(torch.tensor([[0.0], [1.0]])).any()


def test_what_is_tuned_beside_a_jump_is_what_is_served(tmp_path: Path) -> None:
    from redi import build

    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    plans = [Plan.parse(p) for p in ("jump:2:5/8", "at:0,1,2,4/8", "coarse:4/8")]
    solver = names.solver("dpmsolver++", pipe.scheduler)
    kb = build(pipe, ["a", "b", "a cat"], tmp_path / "kb", plans=plans, solver=solver)
    found = tune(kb)
    assert set(found) == {"at:0,1,2,4/8", "coarse:4/8"}
    for plan, tuned in found.items():
        (engine,) = ReDiEngine.serving(kb, plan)
        assert engine.gate.trust == tuned.trust
        (other,) = ReDiEngine.serving(kb, plan, solver=solver)  # its defects are others
        assert other.gate == Gate()
        with pytest.raises(InvalidInputError, match=r"tuned with other choices \(solver\)"):
            ReDiEngine.serving(kb, plan, solver=solver, max_error=1.0)
    engines = ReDiEngine.serving(kb, max_error=100.0)
    assert [str(e.plan) for e in engines] == list(found)  # no error of a jump is foretold
    # of two plans with as many steps the one is served whose error is allowed
    errors = {str(e.plan): e.gate.trust.average for e in engines if e.gate.trust}
    least = min(errors, key=lambda plan: errors[plan])
    assert errors[least] < max(errors.values())
    from redi import disable, enable, report

    enable(pipe, kb, max_error=(errors[least] + max(errors.values())) / 2)
    pipe("a", guidance_scale=7.5, output_type="latent")
    assert report(pipe).plan == least
    disable(pipe)


def test_an_interrupt_leaves_what_was_measured_before(tmp_path: Path) -> None:
    kb = made(tmp_path / "kb", keys_of(40), linear)
    found = tune(kb)[str(PLAN)]
    measured = dataclasses.replace(found, validation={"prompts": 8.0, "measured": 0.5})
    Tunings({str(PLAN): measured}).write(kb)
    with pytest.raises(InvalidInputError, match="at least 8 prompts"):
        tune(kb, pipe=object(), prompts=["a"])
    assert Tunings.read(kb).plans[str(PLAN)] == measured


@pytest.mark.parametrize(
    ("name", "value"), [("key", "sample"), ("transport", {"name": "Residual"}), ("neighbors", 0), ("solver", 3)]
)
def test_a_file_that_says_what_cannot_be_is_a_note(tmp_path: Path, name: str, value: object) -> None:
    kb = made(tmp_path / "kb", keys_of(20), linear)
    tune(kb)
    file = kb.path / "derived" / "tuned.json"
    said = json.loads(file.read_text())
    said["plans"][str(PLAN)][name] = value
    file.write_text(json.dumps(said))
    (engine,) = ReDiEngine.serving(kb)
    assert engine.gate == Gate()
    assert "redi tune" in engine.notes[0]


def test_refusals(tmp_path: Path) -> None:
    kb = made(tmp_path / "kb", keys_of(8), linear)
    with pytest.raises(InvalidInputError, match=r"no coarse plan of 7 model calls; there is: 3 \(coarse:3/12\)"):
        tune(kb, calls=7)
    with pytest.raises(InvalidInputError, match="give both pipe= and prompts="):
        tune(kb, prompts=["a"])
    with pytest.raises(InvalidInputError, match="rows must be at least 2"):
        tune(kb, rows=1)
    with pytest.raises(InvalidInputError, match="batch_size must be at least 1"):
        tune(kb, batch_size=0)
    with pytest.raises(InvalidInputError, match="expected a list of prompts"):
        tune(kb, pipe=object(), prompts="a text")
    lonely = made(tmp_path / "lonely", keys_of(3), linear, noises=3)
    with pytest.raises(InvalidInputError, match="no noise with two rows"):
        tune(lonely)
    assert not Tunings.read(lonely).plans


def test_jumps_are_refused_by_name(tmp_path: Path) -> None:
    from redi import build

    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    kb = build(pipe, ["a", "b"], tmp_path / "kb", plans=[Plan.parse("jump:2:5/8")], batch_size=2)
    with pytest.raises(InvalidInputError, match="only coarse plans are tuned, given jump:2:5/8"):
        tune(kb)


def test_errors_on_held_out_prompts_are_the_models_own(tmp_path: Path) -> None:
    from redi import build, disable, enable

    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    solver = names.solver("deis", pipe.scheduler)
    texts = [f"{c} {n}" for c in ("red", "green", "blue") for n in ("apple", "face", "star", "cat")]
    plans = [Plan.parse("coarse:3/8"), Plan.parse("coarse:4/8")]
    kb = build(pipe, texts[:8], tmp_path / "kb", plans=plans, solver=solver, noises=2, guidance=2.0, storage="float32")
    new = [*texts[8:], "dog", "a star", "noto", "heart style", "a face"]
    scheduler, said = pipe.scheduler, []
    found = tune(kb, pipe=pipe, prompts=new, batch_size=5, progress=said.append)
    assert pipe.scheduler is scheduler
    assert [(p.done, p.total) for p in said if p.what == "held-out prompts"] == [(0, 9), (5, 9), (9, 9)]
    for plan in map(str, plans):
        v = found[plan].validation
        assert v is not None
        assert v["prompts"] == 9
        assert 0 <= v["coverage"] <= 1
        engine = ReDiEngine.serving(kb, plan)[0]
        assert engine.gate.trust == found[plan].trust
    # one prompt by hand, with the curves as they were before they were stretched
    engine = ReDiEngine.serving(kb, "coarse:4/8", gate=Gate())[0]
    (held,) = held_out(pipe, [engine], new, batch_size=9)
    start = kb.bank.noise(torch.tensor([1]))
    given = {"prompt": [new[2]], "latents": start, "guidance_scale": 2.0, "output_type": "latent"}
    pipe.scheduler = solver.scheduler()
    fine = pipe(num_inference_steps=8, **given).images
    pipe.scheduler = scheduler
    ends = []
    for gate in (Gate(), Gate(max_distance=0.0)):
        chosen = {n: getattr(engine, n) for n in ("combiner", "neighbors", "key")}
        enable(pipe, kb, plan="coarse:4/8", gate=gate, **chosen)
        ends.append(float((pipe(num_inference_steps=4, **given).images - fine).norm()))
        disable(pipe)
    assert float(held.error[2]) == pytest.approx(ends[0] / ends[1], rel=1e-3)
    with pytest.raises(InvalidInputError, match="knowledge base's own"):
        tune(kb, pipe=pipe, prompts=[*new, texts[0]])
    with pytest.raises(InvalidInputError, match="at least 8 prompts"):
        tune(kb, pipe=pipe, prompts=new[:7])


def test_affine_is_among_what_is_tried(tmp_path: Path) -> None:
    kb = made(tmp_path / "kb", keys_of(4), linear)
    assert {type(c.combiner) for c in candidates(ReDiEngine.serving(kb)[0], 4)} >= {Affine, Kriging}
