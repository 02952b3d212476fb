"""Half calls: what rows foretell of the unconditional half, and how a network is asked without it."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import redi
from redi import zoo
from redi.combiners import Affine, LeastSquares, Nearest
from redi.engine import ReDiEngine
from redi.errors import FingerprintMismatchError, InvalidInputError, KnowledgeBaseError, PlanError
from redi.gate import Gate, Trust
from redi.guidance import guided, rejoined, unconditional_half, without
from redi.look import doubles
from redi.plan import Plan
from redi.solvers import DiffusersSolver
from redi.tuned import Tunings
from redi.tuning import Progress, tune
from tests.worlds import SHAPE, Curved, Guided, Linear, World, world

WHOLE, HALF = Plan.parse("at:0,4,9,14/20"), Plan.parse("at:0h,4h,9,14h/20")
SOLVERS = {
    "dpm": ("DPMSolverMultistepScheduler", {}),
    "deis-v": ("DEISMultistepScheduler", {"prediction_type": "v_prediction"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "flow": ("FlowMatchEulerDiscreteScheduler", {}),
}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def guided_world(folder: Path, model: Linear | Curved, solver: str = "dpm", **more: Any) -> World:
    return world(folder, DiffusersSolver.from_config(*SOLVERS[solver]), HALF, Guided(model), **more)


def sample(w: World, engine: ReDiEngine, conditions: Tensor, noise: Tensor) -> tuple[Tensor, redi.LeapReport]:
    model: Any = w.model
    half = {"conditional": model.conditional} if engine.plan.halved else {}
    return engine.sample(model, noise, condition=conditions, **half)


def both(w: World, conditions: Tensor, noise: Tensor, **choices: Any) -> tuple[Tensor, Tensor]:
    """With half calls, and with whole ones."""
    made = [ReDiEngine(w.kb, w.solver, plan, **choices) for plan in (HALF, WHOLE)]
    first, second = (sample(w, engine, conditions, noise)[0] for engine in made)
    return first, second


@pytest.mark.parametrize("solver", SOLVERS)
def test_in_an_affine_world_half_calls_change_nothing(tmp_path: Path, solver: str) -> None:
    """All that a model says is affine in the condition: weights that sum to one foretell u as they foretell x.

    They must reproduce the query's condition, so the neighbours are more than it has dimensions.
    """
    w = guided_world(tmp_path, Linear(), solver, rows=24)
    ids = torch.tensor([0, 1, 0, 1, 1])
    conditions = w.conditions[:5] * 0.5 + w.conditions[5:10] * 0.5
    half, whole = both(w, conditions, w.noise(ids), neighbors=24, combiner=Affine(ridge=0.0))
    assert relative(half, whole) < 1e-4


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("combiner", [Nearest(), Affine(), LeastSquares()], ids=lambda c: type(c).__name__)
def test_a_rows_own_query_gets_the_fine_run(tmp_path: Path, solver: str, combiner: Any) -> None:
    w = guided_world(tmp_path, Curved(), solver)
    engine = ReDiEngine(w.kb, w.solver, HALF, combiner=combiner, neighbors=1)
    noise = w.noise(torch.zeros(len(w.conditions), dtype=torch.int64))
    x, report = sample(w, engine, w.conditions, noise)
    assert relative(x, w.fine(noise, w.conditions, 20)) < 1e-4
    assert report.nfe == 2.5


def test_the_first_half_call_is_exact_whatever_the_neighbours_are(tmp_path: Path) -> None:
    w = guided_world(tmp_path, Curved())
    noise = w.noise(torch.tensor([1, 0, 1]))
    strange = torch.randn(3, 6, generator=torch.Generator().manual_seed(5))
    first = Plan.parse("at:0h,4,9,14/20")
    half, report = sample(w, ReDiEngine(w.kb, w.solver, first), strange, noise)
    whole, _ = sample(w, ReDiEngine(w.kb, w.solver, WHOLE), strange, noise)
    assert relative(half, whole) < 1e-5
    assert report.nfe == 3.5


def test_calls_that_are_counted_are_those_that_are_made(tmp_path: Path) -> None:
    w = guided_world(tmp_path, Curved())
    model: Any = w.model
    model.halves = 0
    _, report = sample(w, ReDiEngine(w.kb, w.solver, HALF), w.conditions, w.noise(torch.zeros(8, dtype=torch.int64)))
    assert model.halves == 8 * 2 * report.nfe == 8 * 5


def test_strangers_and_those_shut_out_get_the_plain_solver_by_whole_calls(tmp_path: Path) -> None:
    w = guided_world(tmp_path, Curved())
    noise = w.noise(torch.zeros(3, dtype=torch.int64))
    noise[1] = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    plain, _ = sample(w, ReDiEngine(w.kb, w.solver, WHOLE, gate=Gate(0.0)), w.conditions[:3], noise)
    leapt, report = sample(w, ReDiEngine(w.kb, w.solver, HALF), w.conditions[:3], noise)
    assert report.leapt == (True, False, True)
    assert report.nfe == 4  # the most that a picture of the batch took
    assert relative(leapt[1], plain[1]) < 1e-5
    shut, report = sample(
        w, ReDiEngine(w.kb, w.solver, HALF, gate=Gate(0.0)), w.conditions[3:6], noise[:1].repeat(3, 1, 1, 1)
    )
    open_, _ = sample(
        w, ReDiEngine(w.kb, w.solver, WHOLE, gate=Gate(0.0)), w.conditions[3:6], noise[:1].repeat(3, 1, 1, 1)
    )
    assert report.nfe == 3.5  # what the first call leaves out every row knows
    assert relative(shut, open_) < 1e-5


def test_a_sample_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    w = guided_world(tmp_path, Curved())
    noise = w.noise(torch.tensor([0, 1, 0, 1]))
    noise[2] = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    engine = ReDiEngine(w.kb, w.solver, HALF)
    together, _ = sample(w, engine, w.conditions[:4], noise)
    alone = torch.cat([sample(w, engine, w.conditions[i : i + 1], noise[i : i + 1])[0] for i in range(4)])
    assert relative(together, alone) < 1e-5


def test_a_shrunk_correction_shrinks_no_unconditional_half(tmp_path: Path) -> None:
    """A gate that takes a part of every correction leaves outputs what they are."""
    w = guided_world(tmp_path, Curved(), rows=24)
    ids = torch.tensor([0, 1, 1])
    found: list[Tensor] = []
    for share in (1.0, 0.6):
        trust = Trust(1.0, (0.0,), (share,), (0.5,), (1.0,), 0.5)
        engine = ReDiEngine(w.kb, w.solver, HALF, gate=Gate(trust=trust))
        recall = engine.recall(torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1)), ids, 0)
        u, known = engine.unconditional(1, ids, recall)
        assert known.all()
        found.append(u)
    assert relative(*found) < 1e-6


def test_what_cannot_be_halved_is_refused(tmp_path: Path) -> None:
    w = guided_world(tmp_path / "a", Curved())
    engine = ReDiEngine(w.kb, w.solver, HALF)
    with pytest.raises(InvalidInputError, match="conditional="):
        engine.sample(w.model, w.noise(torch.tensor([0])), condition=w.conditions[:1])
    with pytest.raises(PlanError, match=r"leap 1 of plan .* half call"):
        replace(engine, retrieve_at=(0, 1))
    with pytest.raises(InvalidInputError, match="conditional must return a tensor of shape"):
        engine.sample(
            w.model, w.noise(torch.tensor([0])), condition=w.conditions[:1], conditional=lambda x, t, c: x[..., :1]
        )
    whole = world(tmp_path / "b", w.solver, WHOLE, Guided(Curved()))
    with pytest.raises(KnowledgeBaseError, match=r"unconditional outputs at \[\], not \[0, 4, 14\]; rebuild"):
        ReDiEngine(whole.kb, w.solver, HALF)
    apart = guided_world(tmp_path / "c", Curved(), diversity=0.2)
    with pytest.raises(PlanError, match=r"diversity 0\.2"):
        ReDiEngine(apart.kb, w.solver, HALF)
    unguided = world(tmp_path / "d", w.solver, HALF, Guided(Curved(), scale=1.0))
    with pytest.raises(PlanError, match="guidance 1"):
        ReDiEngine(unguided.kb, w.solver, HALF)
    with pytest.raises(InvalidInputError, match="unconditional="):
        world(tmp_path / "e", w.solver, HALF, Curved())
    for plan in ("at:0,4h/20", "jump:2h:4/20"):
        with pytest.raises(PlanError):
            Plan.parse(plan)
    with pytest.raises(PlanError, match="only called steps"):
        Plan.of([0, 4], 20, halved=[0, 5])


def test_left_out_rows_alone_tune_no_half_calls(tmp_path: Path) -> None:
    w = guided_world(tmp_path, Curved())
    with pytest.raises(InvalidInputError, match="half calls err by"):
        tune(w.kb)
    assert str(WHOLE) in tune(w.kb, WHOLE)


# How a network is asked without the unconditional half of some pictures, and what the pipeline gets.


def network(sample: Tensor, t: Any, states: Tensor, more: Any = None) -> Tensor:
    """Something of each sample's own arguments; its second half of channels is a variance."""
    beside = 0 if more is None else sum(v.flatten(1).mean(1) for v in more["list"]) + more["deep"]["x"][:, 0]
    said = sample * float(torch.as_tensor(t).flatten()[0]) + (states.mean((1, 2)) + beside).view(-1, 1, 1, 1)
    return torch.cat([said, said.square()], 1)


@given(st.integers(1, 5), st.data())
def test_asking_for_less_gives_the_whole(pictures: int, data: st.DataObject) -> None:
    unasked = torch.tensor(sorted(data.draw(st.sets(st.integers(0, pictures - 1), min_size=1))))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    x = torch.randn(pictures, 2, 3, 3, generator=g).repeat(2, 1, 1, 1)
    states = torch.randn(2 * pictures, 5, 4, generator=g)
    more = {
        "list": [torch.randn(2 * pictures, 3, generator=g), torch.randn(2 * pictures, 2, 2, generator=g)],
        "deep": {"x": torch.randn(2 * pictures, 1, generator=g), "scale": 0.5, "none": None},
    }
    by_name = data.draw(st.booleans())
    args, kwargs = ((), {"sample": x, "t": 7, "states": states}) if by_name else ((x, 7, states), {})
    whole = network(*args, **kwargs, more=more)
    found = without(args, {**kwargs, "more": more}, unasked, pictures)
    assert found is not None
    less = network(*found[0], **found[1])
    assert len(less) == 2 * pictures - len(unasked)
    foretold = whole[:pictures, :2].clone()
    kind = data.draw(st.sampled_from(["tensor", "tuple", "output"]))
    given_: Any = {"tensor": less, "tuple": (less, "more"), "output": UNet2DConditionOutput(less)}[kind]
    joined = rejoined(given_, foretold, unasked)
    got = joined if kind == "tensor" else joined[0] if kind == "tuple" else joined.sample
    assert torch.allclose(got[:, :2], whole[:, :2])
    assert torch.equal(got[pictures:], less[-pictures:])


def test_a_batch_that_is_not_doubled_is_left_alone() -> None:
    x = torch.zeros(3, 2, 4, 4)
    assert without((x,), {}, torch.tensor([0]), 3) is None
    assert without((), {"t": 3, "x": x}, torch.tensor([0]), 1) is None


def test_the_unconditional_half_is_checked_against_what_the_pipeline_made_of_it() -> None:
    u, c = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    m, doubled = guided(u, c, 3.0), torch.cat([u, c])
    asked = (torch.zeros(6, 4, 4, 4),), {"states": torch.zeros(6, 5)}
    variance = torch.cat([doubled, doubled], 1)
    for output in (doubled, UNet2DConditionOutput(doubled), (variance,)):
        assert torch.equal(unconditional_half(asked, output, m, 3.0), u)
    several = (asked[0], {"states": torch.zeros(12, 5)})  # a row for each frame of a video
    for question, output, given_ in (
        (asked, torch.cat([c, u]), m),  # the other way around
        (asked, c, m),  # one call for each half
        (asked, doubled, 0.7 * m),  # rescaled
        (asked, ("no tensor",), m),
        (several, doubled, m),
        (None, doubled, m),
    ):
        with pytest.raises(PlanError, match="half calls needs a pipeline that guides"):
            unconditional_half(question, output, given_, 3.0)


# Inside a pipeline.

PLANS = ("at:0h,3h,6,8/10", "at:0,3,6,8/10")
CALL: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
QUERIES = zoo.prompts("emoji", "heldout")[:2]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, redi.KnowledgeBase]:
    pipe = zoo.load("emoji")
    pipe.set_progress_bar_config(disable=True)
    kb = redi.build(
        pipe,
        zoo.prompts("emoji", "train")[:12],
        tmp_path_factory.mktemp("halves") / "kb",
        plans=[Plan.parse(p) for p in PLANS],
        guidance=3.0,
        noises=2,
        batch_size=8,
    )
    return pipe, kb


@pytest.fixture
def noise(served: tuple[Any, redi.KnowledgeBase]) -> Tensor:
    """What the two pictures start from, of two noises of the bank."""
    return served[1].bank.noise(torch.tensor([1, 0]))


def run(pipe: Any, kb: redi.KnowledgeBase, plan: str, **more: Any) -> tuple[Tensor, list[int], redi.LeapReport]:
    """Latents, the sizes of the network's batches, and the report of two pictures."""
    sizes: list[int] = []
    own = pipe.unet.forward

    def forward(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(sample))
        return own(sample, *args, **kwargs)

    pipe.unet.forward = forward
    redi.enable(pipe, kb, plan=plan)
    try:
        return pipe(QUERIES, **CALL | more).images, sizes, redi.report(pipe)
    finally:
        redi.disable(pipe)
        del pipe.unet.forward


def test_a_pipeline_makes_half_calls(served: tuple[Any, redi.KnowledgeBase], noise: Tensor) -> None:
    pipe, kb = served
    half, sizes, report = run(pipe, kb, PLANS[0], latents=noise)
    assert sizes == [2, 2, 4, 4]
    assert report.nfe == 3
    assert "model calls 3 per picture instead of 10" in str(report)
    whole, sizes, _ = run(pipe, kb, PLANS[1], latents=noise)
    assert sizes == [4, 4, 4, 4]
    assert 0 < relative(half, whole) < 0.5
    assert not pipe.unet._forward_pre_hooks
    assert not pipe.unet._forward_hooks


def test_who_asks_for_as_many_steps_as_calls_is_told_the_steps(served: tuple[Any, redi.KnowledgeBase]) -> None:
    pipe, kb = served
    redi.enable(pipe, kb, plan=PLANS[0])
    try:
        with pytest.raises(FingerprintMismatchError, match=r"has '4 \(at:0h,3h,6,8/10, 3 calls\)', given 3"):
            pipe("a fox", **CALL | {"num_inference_steps": 3})
    finally:
        redi.disable(pipe)


def test_the_pipelines_loop_and_ours_agree(served: tuple[Any, redi.KnowledgeBase], noise: Tensor) -> None:
    pipe, kb = served
    made, _, _ = run(pipe, kb, PLANS[0], latents=noise)
    positive, negative = pipe.encode_prompt(QUERIES, pipe.device, 1, True)[:2]

    @torch.no_grad()
    def conditional(x: Tensor, t: Tensor, c: tuple[Tensor, Tensor]) -> Tensor:
        return pipe.unet(x, t, encoder_hidden_states=c[0]).sample

    def denoise(x: Tensor, t: Tensor, c: tuple[Tensor, Tensor]) -> Tensor:
        return guided(conditional(x, t, (c[1], c[0])), conditional(x, t, c), 3.0)

    (engine,) = ReDiEngine.serving(kb, PLANS[0])
    ours, report = engine.sample(denoise, noise, conditional=conditional, condition=(positive, negative))
    assert relative(ours, made) < 1e-4
    assert report.nfe == 3


def test_a_stranger_beside_others_is_asked_whole(served: tuple[Any, redi.KnowledgeBase], noise: Tensor) -> None:
    pipe, kb = served
    alone, _, _ = run(pipe, kb, PLANS[0], latents=noise)
    noise[1] = torch.randn(noise[1].shape, generator=torch.Generator().manual_seed(0))
    beside, sizes, report = run(pipe, kb, PLANS[0], latents=noise)
    assert sizes == [3, 3, 4, 4]
    assert report.nfe == 4
    assert report.leapt == (True, False)
    assert relative(beside[:1], alone[:1]) < 1e-4


def test_a_second_pipeline_of_the_same_network_is_not_disturbed(
    served: tuple[Any, redi.KnowledgeBase], noise: Tensor
) -> None:
    pipe, kb = served
    call = CALL | {"latents": noise}
    before = pipe(QUERIES, **call).images
    other = type(pipe).from_pipe(pipe)
    redi.enable(other, kb, plan=PLANS[0])
    try:
        assert torch.equal(pipe(QUERIES, **call).images, before)
    finally:
        redi.disable(other)


def test_what_else_calls_the_network_meanwhile_is_not_heard(
    served: tuple[Any, redi.KnowledgeBase], noise: Tensor
) -> None:
    """A callback's own call of the network, and of another pipeline of the same one; and another thread's."""
    pipe, kb = served
    made, _, _ = run(pipe, kb, PLANS[0], latents=noise)
    other, third = type(pipe).from_pipe(pipe), type(pipe).from_pipe(pipe)
    call = CALL | {"latents": noise}
    plain = other(QUERIES, **call).images
    x, states = torch.zeros(4, 8, 8, 8), torch.zeros(4, 24, pipe.unet.config.cross_attention_dim)
    alone = pipe.unet(x, 10, encoder_hidden_states=states).sample
    inner: list[bool] = []

    def look(pipe: Any, i: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        inner.append(torch.equal(pipe.unet(x, 10, encoder_hidden_states=states).sample, alone))
        inner.append(torch.equal(other(QUERIES, **call).images, plain))
        return {}

    out, _, report = run(pipe, kb, PLANS[0], latents=noise, callback_on_step_end=look)
    assert all(inner)
    assert len(inner) == 8
    assert torch.equal(out, made)
    assert report.nfe == 3
    lanes = [pipe, third]
    for lane in lanes:
        redi.enable(lane, kb, plan=PLANS[0])
    try:
        with ThreadPoolExecutor(2) as pool:
            both_made = list(pool.map(lambda lane: [lane(QUERIES, **call).images for _ in range(3)], lanes))
        assert all(torch.equal(x, made) for several in both_made for x in several)
    finally:
        for lane in lanes:
            redi.disable(lane)


def test_a_copied_pipeline_is_served_apart(served: tuple[Any, redi.KnowledgeBase], noise: Tensor) -> None:
    pipe, kb = served
    made, _, _ = run(pipe, kb, PLANS[0], latents=noise)
    redi.enable(pipe, kb, plan=PLANS[0])
    try:
        twin = copy.deepcopy(pipe)
    finally:
        redi.disable(pipe)
    out = twin(QUERIES, **CALL, latents=noise).images
    assert relative(out, made) < 1e-5


def test_the_network_is_heard_only_while_its_pipeline_runs(served: tuple[Any, redi.KnowledgeBase]) -> None:
    """However a call ends, and where redi is never disabled, as in a copy that is thrown away."""
    pipe, kb = served
    lane = copy.copy(pipe)
    redi.enable(lane, kb, plan=PLANS[0])

    def stop(*_: Any) -> Any:
        assert pipe.unet._forward_hooks
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lane("a fox", callback_on_step_end=stop, **CALL)
    assert not pipe.unet._forward_pre_hooks
    assert not pipe.unet._forward_hooks
    first, again = (lane("a fox", generator=torch.Generator().manual_seed(0), **CALL).images for _ in range(2))
    assert torch.equal(first, again)
    assert redi.report(lane).nfe == 3
    assert not pipe.unet._forward_hooks


@pytest.mark.slow
def test_a_compiled_network(served: tuple[Any, redi.KnowledgeBase], noise: Tensor) -> None:
    """Compiled after redi was enabled, too; it is compiled for both sizes of the batch."""
    pipe, kb = served
    made, _, _ = run(pipe, kb, PLANS[0], latents=noise)
    own = pipe.unet
    call = CALL | {"latents": noise}
    try:
        redi.enable(pipe, kb, plan=PLANS[0])
        pipe.unet = torch.compile(own, backend="eager")
        assert relative(pipe(QUERIES, **call).images, made) < 1e-4
        assert redi.report(pipe).nfe == 3
    finally:
        redi.disable(pipe)
        pipe.unet = own


def test_a_network_that_compiled_itself_is_asked_whole(
    served: tuple[Any, redi.KnowledgeBase], noise: Tensor, tmp_path: Path
) -> None:
    pipe, kb = served
    whole, _, _ = run(pipe, kb, PLANS[1], latents=noise)
    pipe.unet._compiled_call_impl = pipe.unet._call_impl  # as pipe.unet.compile() leaves it, less the compiling
    try:
        made, _, report = run(pipe, kb, PLANS[0], latents=noise)
        assert report.nfe == 4
        assert any("torch.compile(network)" in note for note in report.notes)
        assert relative(made, whole) < 1e-5
        assert not run(pipe, kb, PLANS[1], latents=noise)[2].notes
        with pytest.raises(InvalidInputError, match=r"torch\.compile\(network\)"):
            redi.build(pipe, ["a fox"], tmp_path / "kb", plans=[Plan.parse(PLANS[0])], guidance=3.0)
    finally:
        pipe.unet._compiled_call_impl = None


def test_negative_embeddings_that_nobody_can_compare_are_asked_whole(
    served: tuple[Any, redi.KnowledgeBase], noise: Tensor
) -> None:
    pipe, kb = served
    embeds, negatives = pipe.encode_prompt(QUERIES, pipe.device, 1, True)
    call = CALL | {"prompt_embeds": embeds, "negative_prompt_embeds": negatives, "latents": noise}
    lane = copy.copy(pipe)
    redi.enable(lane, kb, plan=PLANS[0])
    lane(**call)
    assert redi.report(lane).nfe == 3
    lane.text_encoder = None
    lane(**call)
    assert redi.report(lane).nfe == 4
    assert "whole calls: there is no encoder to tell whether negative_prompt_embeds" in str(redi.report(lane))


def test_what_would_not_have_the_rows_unconditional_half_is_asked_whole(
    served: tuple[Any, redi.KnowledgeBase],
    noise: Tensor,
) -> None:
    pipe, kb = served
    whole, _, _ = run(pipe, kb, PLANS[1], latents=noise)
    made, sizes, report = run(pipe, kb, PLANS[0], latents=noise, cross_attention_kwargs={"masks": noise})
    assert sizes == [4, 4, 4, 4]
    assert report.nfe == 4
    assert any("cross_attention_kwargs" in note for note in report.notes)
    assert relative(made, whole) < 1e-5


def test_an_interrupted_tuning_keeps_no_half_plan_that_prompts_did_not_judge(
    served: tuple[Any, redi.KnowledgeBase],
) -> None:
    pipe, kb = served

    def stop(now: Progress) -> None:
        if now.what == "held-out prompts":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(kb, PLANS[0], pipe=pipe, prompts=zoo.prompts("emoji", "heldout")[:8], progress=stop)
    assert PLANS[0] not in Tunings.read(kb).plans


def test_whether_a_pipeline_doubles_its_batch_is_known_before_its_network_runs(
    served: tuple[Any, redi.KnowledgeBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, _ = served

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was run")

    monkeypatch.setattr(pipe.unet, "forward", refuse)
    own = pipe.scheduler
    for scale in (3.0, 1.0):
        call = {"prompt": ["a fox"], "num_inference_steps": 3, "guidance_scale": scale}
        assert doubles(pipe, copy.deepcopy(own), call) == (scale > 1)
    assert pipe.scheduler is own
    assert not pipe.unet._forward_pre_hooks


def test_a_build_of_half_calls_asks_for_guidance(tmp_path: Path) -> None:
    pipe = zoo.load("emoji")
    plans = [Plan.parse(PLANS[0])]
    with pytest.raises(PlanError, match="guidance 1 makes no unconditional calls"):
        redi.build(pipe, ["a fox"], tmp_path / "a", plans=plans, guidance=1.0)
    with pytest.raises(PlanError, match=r"diversity 0\.1"):
        redi.build(pipe, ["a fox"], tmp_path / "b", plans=plans, guidance=3.0, diversity=0.1)
    with pytest.raises(PlanError, match=r"guidance_rescale 0\.7"):
        redi.build(pipe, ["a fox"], tmp_path / "c", plans=plans, guidance=3.0, settings={"guidance_rescale": 0.7})
    with redi.record(pipe, tmp_path / "d", plans=PLANS[:1]), pytest.raises(PlanError, match=r"redi\.build"):
        pipe("a fox", num_inference_steps=10, guidance_scale=3.0, output_type="latent")
    assert not any((tmp_path / name).exists() for name in "abcd")
