"""What is seen of a batch: against the pipeline run by hand, and where the answer is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import redi
from redi.evaluation import Way, crossing
from redi.evaluation.contest import Batch
from redi.evaluation.examiner import Examiner
from redi.evaluation.seen import Seen
from redi.knowledge_base import KnowledgeBase
from redi.metrics import agreement
from tests.evaluation.conftest import COARSE, JUMP, ROWS, Calls, contest


@pytest.fixture(scope="module")
def seen(pipe: Any, kb: KnowledgeBase, ways: Sequence[Way]) -> dict[str, Seen]:
    test = contest(kb, ways)
    return dict(zip([w.name for w in ways], Examiner(pipe, test)(test.batches[0]), strict=True))


def test_the_fine_solve_agrees_with_itself(seen: dict[str, Seen]) -> None:
    fine = seen["own:6, the fine solve"]
    assert fine.of("latent_error").tolist() == [0.0] * 4
    assert fine.of("l2").tolist() == [0.0] * 4
    assert torch.allclose(fine.of("ssim"), torch.ones(4, dtype=torch.float64))
    assert fine.of("at_value").isnan().all()


def test_calls_are_counted_and_no_stage_is_longer_than_the_whole(
    seen: dict[str, Seen], ways: Sequence[Way], pipe: Any, kb: KnowledgeBase
) -> None:
    assert [(w.name, seen[w.name].of("nfe").unique().tolist()) for w in ways] == [(w.name, [w.calls]) for w in ways]
    for way in ways:
        s = seen[way.name].median_seconds
        assert 0 < s["model"] <= s["total"]
        parts = [s[stage] for stage in ("model", "solver", "retrieval", "gather", "combine")]
        assert sum(parts) <= s["total"] * 1.01
        assert all((s[stage] > 0) == (way.kind == "redi") for stage in ("retrieval", "gather", "combine"))
        assert seen[way.name].of("leapt").unique().tolist() == [float(way.kind == "redi")]
    test = contest(kb, ways)
    with Calls(pipe) as calls:
        Examiner(pipe, test)(test.batches[0])
    assert calls.count == sum(w.calls for w in ways)


def by_hand(pipe: Any, kb: KnowledgeBase, way: Way, batch: Batch, output: str) -> torch.Tensor:
    """The pipeline called as its user would."""
    before = pipe.scheduler
    noise = kb.bank.noise(torch.tensor([n for _, n in batch.items]))
    given = {"num_inference_steps": way.steps, "guidance_scale": 2.0, "latents": noise, "output_type": output}
    try:
        if way.engine is None:
            pipe.scheduler = way.solver.scheduler()
        else:
            redi.enable(pipe, kb, plan=way.engine.plan, transport=way.engine.transport, combiner=way.engine.combiner)
        return pipe([p for p, _ in batch.items], **given).images
    finally:
        redi.disable(pipe)
        pipe.scheduler = before


@pytest.mark.parametrize("name", ["own:3", str(COARSE), str(JUMP)])
def test_it_sees_what_the_pipeline_makes(
    name: str, seen: dict[str, Seen], ways: Sequence[Way], pipe: Any, kb: KnowledgeBase
) -> None:
    way, batch = next(w for w in ways if w.name == name), contest(kb, ways).batches[0]
    latents, fine = (by_hand(pipe, kb, w, batch, "latent") for w in (way, ways[0]))
    expected = (latents.double() - fine.double()).flatten(1).norm(dim=1)
    torch.testing.assert_close(seen[name].of("latent_error"), expected, rtol=1e-4, atol=1e-6)
    pictures, references = (by_hand(pipe, kb, w, batch, "pt") for w in (way, ways[0]))
    rms = (pictures.double() - references.double()).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(seen[name].of("l2"), rms, rtol=1e-4, atol=1e-6)
    assert float(seen[name].of("ssim").mean()) == pytest.approx(agreement(pictures, references).ssim, rel=1e-4)
    test = contest(kb, ways)
    features = test.features(pictures, latents)
    torch.testing.assert_close(seen[name].features, features, rtol=1e-3, atol=1e-4)
    scores = test.score(pictures, [p for p, _ in batch.items])
    torch.testing.assert_close(seen[name].of("score"), scores.double(), rtol=1e-3, atol=1e-4)


def test_a_remembered_prompt_meets_the_fine_solve_at_value_and_at_the_end(
    pipe: Any, kb: KnowledgeBase, ways: Sequence[Way]
) -> None:
    """Its own row is its nearest: leaping from that alone, it arrives where the row did."""
    alone = {"combiner": [("nearest", redi.Nearest())], "neighbors": [("H=1", 1)]}
    leaping = [
        *crossing(kb, [JUMP], {"transport": [("v", redi.Value())], **alone}),
        *crossing(kb, [JUMP], {"transport": [("d", redi.Defect())], **alone}),
    ]
    test = contest(kb, [ways[0], *leaping], ROWS)
    for s in Examiner(pipe, test)(test.batches[0])[1:]:
        scale = 8.0  # the latents' norms are near 10
        assert float(s.of("at_value").max()) < 1e-4 * scale
        assert float(s.of("latent_error").max()) < 1e-4 * scale
        assert s.of("nfe").unique().tolist() in ([4.0], [5.0])


def test_a_strangers_error_at_value_is_that_of_the_sample_there(
    pipe: Any, kb: KnowledgeBase, ways: Sequence[Way]
) -> None:
    """By our own loop: the engine's sample right after the leap against the recorder's."""
    from redi.recipe import FineSolver, Recipe
    from redi.solvers import DiffusersSolver

    way = next(w for w in ways if w.name.startswith(f"{JUMP} value"))
    test = contest(kb, [ways[0], way], noise_ids=[0])
    seen = Examiner(pipe, test)(test.batches[0])[1]
    mark = kb.fingerprint
    solver = DiffusersSolver.from_config(mark.scheduler, mark.scheduler_config)
    (rows,) = FineSolver(pipe, Recipe(solver, kb.config))(test.batches[0].items)
    assert way.engine is not None
    recall = way.engine.recall(rows.samples[2], rows.noise_ids, 0)
    landed = way.engine.leap(torch.zeros_like(rows.samples[4]), recall, 0)
    expected = (landed.double() - rows.samples[4].double()).flatten(1).norm(dim=1)
    torch.testing.assert_close(seen.of("at_value"), expected, rtol=1e-4, atol=1e-5)


def test_a_coarse_plan_arrives_at_the_end(seen: dict[str, Seen]) -> None:
    coarse = seen[str(COARSE)]
    assert torch.equal(coarse.of("at_value"), coarse.of("latent_error"))


def test_the_pipeline_is_left_as_it_was(pipe: Any, kb: KnowledgeBase, ways: Sequence[Way]) -> None:
    before = dict(vars(pipe))
    test = contest(kb, ways[:2])
    Examiner(pipe, test)(test.batches[0])
    assert {k: v for k, v in vars(pipe).items() if k != "_internal_dict"} == {
        k: v for k, v in before.items() if k != "_internal_dict"
    }
    assert pipe.config == before["_internal_dict"]
    assert not pipe.unet._forward_hooks
    assert not pipe.unet._forward_pre_hooks


def test_an_engine_is_served_with_every_choice_it_made(pipe: Any, tmp_path: Path) -> None:
    kb = redi.build(pipe, ROWS, tmp_path / "kb", plans=[COARSE], guidance=2.0)
    (whole,) = crossing(kb, [COARSE], {})
    (small,) = crossing(kb, [COARSE], {"eight_bits": [("eight bits", True)]})
    test = contest(kb, [Way.fine(kb, "own"), whole, small], noise_ids=[0])
    assert whole.identity != small.identity
    _, a, b = Examiner(pipe, test)(test.batches[0])
    assert not torch.equal(a.of("latent_error"), b.of("latent_error"))
    assert torch.allclose(a.of("latent_error"), b.of("latent_error"), rtol=0.05)
