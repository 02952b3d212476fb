"""Crossings of choices, plain solvers of equal cost, and what makes two ways one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from diffusers import DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler

import redi
from redi.errors import InvalidInputError
from redi.evaluation import Way, crossing, same_calls
from redi.evaluation.ways import distinct
from redi.knowledge_base import KnowledgeBase
from tests.evaluation.conftest import COARSE, JUMP


def test_every_combination_that_can_be_served_and_a_note_for_every_other(kb: KnowledgeBase) -> None:
    notes: list[str] = []
    choices = {
        "transport": [("defect", redi.Defect()), ("value", redi.Value())],
        "key": [("denoised", "denoised"), ("prompt", "prompt")],
        "neighbors": [("H=1", 1), ("H=4", 4)],
    }
    ways = crossing(kb, [COARSE, JUMP], choices, notes.append)
    served = {w.name for w in ways}
    # a coarse plan calls the model at every leap, so there is no value; a jump without a call has no denoised key
    assert served == {
        *(f"{p} defect {k} {h}" for p in (COARSE, JUMP) for k in ("denoised", "prompt") for h in ("H=1", "H=4")),
        *(f"{JUMP} value prompt {h}" for h in ("H=1", "H=4")),
    }
    assert len(notes) == 16 - len(ways)
    assert all(note.startswith("left out ") for note in notes)
    one = next(w for w in ways if w.name == f"{JUMP} value prompt H=4")
    assert (one.choices["transport"], one.choices["key"], one.choices["neighbors"]) == ("Value()", "prompt", 4)
    assert one.values == (4,)
    assert one.calls == 4
    assert next(w for w in ways if w.name == f"{COARSE} defect prompt H=4").values == ()


def test_nothing_that_can_be_served_is_an_error(kb: KnowledgeBase) -> None:
    with pytest.raises(InvalidInputError, match=f"nothing to evaluate; {COARSE} value: plan {COARSE} calls the model"):
        crossing(kb, [COARSE], {"transport": [("value", redi.Value())]})


def test_plain_solvers_make_as_many_calls_or_the_next_fewer_they_can(kb: KnowledgeBase) -> None:
    def calls(kind: type, steps: int) -> int:
        scheduler = kind()
        scheduler.set_timesteps(steps)
        return len(scheduler.timesteps)

    leaping = crossing(kb, [COARSE, JUMP], {})
    assert [w.calls for w in leaping] == [3, 5]
    kinds = {"ddim": DDIMScheduler, "heun": HeunDiscreteScheduler, "pndm": PNDMScheduler}
    solvers = [(n, redi.DiffusersSolver.of(k(skip_prk_steps=True) if n == "pndm" else k())) for n, k in kinds.items()]
    found = {(w.name, w.calls) for w in same_calls(leaping, solvers)}
    assert found == {("ddim:3", 3), ("ddim:5", 5), ("heun:2", 3), ("heun:3", 5), ("pndm:2", 3), ("pndm:4", 5)}
    assert (calls(HeunDiscreteScheduler, 2), calls(HeunDiscreteScheduler, 3)) == (3, 5)


def test_half_a_call_counts_for_the_plain_solver_as_a_whole_one(kb: KnowledgeBase) -> None:
    fine, (way,) = Way.fine(kb, "own"), crossing(kb, [COARSE], {})
    (plain,) = same_calls([replace(way, calls=2.5)], [("own", fine.solver)])
    assert plain.calls == replace(way, calls=2.5).rival_calls == 3


def test_a_way_counts_once_whatever_it_is_called(kb: KnowledgeBase) -> None:
    fine = Way.fine(kb, "own")
    twice = [fine, Way.plain(fine.solver, 3, "a"), Way.plain(fine.solver, 3, "b"), Way.plain(fine.solver, 6, "a")]
    assert [w.name for w in distinct(twice)] == ["own:6, the fine solve", "a:3", "a:6"]
