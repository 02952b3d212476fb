"""Plans and routes: the written form, the arithmetic of calls, and what is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from redi.errors import PlanError
from redi.places import HALVED_UP_TO
from redi.plan import Plan, Route, Segment
from redi.schedules import Grid


def schedule(boundaries, n=None):
    """A grid with these boundaries and nothing else of interest."""
    n = boundaries[-1] if n is None else n
    return Grid(
        steps=len(boundaries) - 1,
        entries=tuple(range(n + 1)),
        timesteps=torch.arange(n, 0, -1),
        signal=torch.ones(n + 1, dtype=torch.float64),
        noise=torch.linspace(1, 0, n + 1, dtype=torch.float64),
        prediction="epsilon",
        scales_input=False,
        initial_scale=1.0,
        boundaries=tuple(boundaries),
    )


def plain(steps):
    return schedule(range(steps + 1))


def plms(steps):
    return schedule([0, *range(2, steps + 2)])


def heun(steps):
    return schedule([*range(0, 2 * steps - 1, 2), 2 * steps - 1])


def singlestep(steps):
    return schedule([k if k % 2 == 0 or k == steps else None for k in range(steps + 1)])


# Strategies give recipes, not plans: beartype looks at a random element of a plan's tuples, and hypothesis forbids
# `random` while it draws.


@st.composite
def jumps(draw):
    steps = draw(st.integers(2, 60))
    key = draw(st.integers(1, steps - 1))
    return partial(Plan.jump, key, draw(st.integers(key + 1, steps)), steps)


@st.composite
def coarse(draw):
    fine = draw(st.integers(1, 60))
    return partial(Plan.coarse, draw(st.integers(1, fine)), fine)


@st.composite
def chosen(draw):
    fine = draw(st.integers(1, 60))
    return partial(Plan.of, [0, *sorted(draw(st.sets(st.integers(1, fine - 1)) if fine > 1 else st.just(set())))], fine)


@st.composite
def halved(draw):
    called = [0, *sorted(draw(st.sets(st.integers(1, 59))))]
    halves = {0, *draw(st.sets(st.sampled_from(called)))}
    return partial(Plan.of, called, 60, halves)


@given(st.one_of(jumps(), coarse(), chosen(), halved()))
def test_written_and_read_again(recipe):
    plan = recipe()
    assert Plan.parse(str(plan)) == plan


@given(st.one_of(jumps(), coarse(), chosen()))
def test_segments_cover_the_schedule_once(recipe):
    plan = recipe()
    route = Route.lay(plan, plain(plan.fine))
    for segments in (plan.segments, route.segments):
        covered = [i for s in segments for i in range(s.start, s.stop)]
        assert covered == list(range(plan.fine))
    assert route.nfe == sum(s.called for s in plan.segments)
    assert len(route.leaps) == len(plan.leaps)
    assert route.nfe_full == plan.fine


@given(halved())
def test_half_calls_count_as_halves(recipe):
    plan = recipe()
    halves = str(plan).count("h")
    assert plan.halved
    assert halves == sum(s.halved for s in Route.lay(plan, plain(plan.fine)).segments)
    assert Route.lay(plan, plain(plan.fine)).nfe == plan.steps - halves / 2
    assert plan != Plan.of([s.start for s in plan.segments], plan.fine)


@given(jumps())
def test_a_jump_saves_what_it_leaps_over(recipe):
    plan = recipe()
    (leap,) = plan.leaps
    assert Route.lay(plan, plain(plan.fine)).nfe == plan.fine - (leap.stop - leap.start)
    called = plan.calling(True)
    assert Route.lay(called, plain(plan.fine)).nfe == plan.fine - (leap.stop - leap.start) + 1
    # PLMS: one call more, for the repeated entry before the key
    assert Route.lay(plan, plms(plan.fine)).nfe == plan.fine - (leap.stop - leap.start) + 1
    assert Route.lay(plan, plms(plan.fine)).grid.is_fine


@given(coarse())
def test_a_coarse_plan_calls_what_it_says(recipe):
    plan = recipe()
    route = Route.lay(plan, plain(plan.fine))
    assert route.nfe == plan.steps == len(route.grid) == len(route.leaps)
    assert route.grid.entries == (*(s.start for s in route.segments), plan.fine)
    gaps = [s.stop - s.start for s in plan.segments]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("text", "grid", "nfe", "leap"),
    [
        # the paper's settings, section 5
        ("jump:10:20/50", plms(50), 41, (11, 21)),
        ("jump:10:30/50", plms(50), 31, (11, 31)),
        ("jump:10:40/50", plms(50), 21, (11, 41)),
        ("jump:3:10/50", plms(50), 44, (4, 11)),
        ("jump:5:8/20", plain(20), 17, (5, 8)),
        ("jump:5:15/20", plain(20), 10, (5, 15)),
        ("jump:10:50/50", plms(50), 11, (11, 51)),
        ("jump:5:8/20", heun(20), 33, (10, 16)),
        ("jump:5:20/20", heun(20), 10, (10, 39)),
        ("jump:4:8/20", singlestep(20), 16, (4, 8)),
    ],
)
def test_routes_count_true_calls(text, grid, nfe, leap):
    route = Route.lay(Plan.parse(text), grid)
    assert route.nfe == nfe
    assert route.leaps == (Segment(*leap, called=False),)
    assert route.grid is grid


@pytest.mark.parametrize(
    ("plan", "near"), [(Plan.jump(5, 8, 20), "4, 6"), (Plan.jump(4, 7, 20), "6, 8"), (Plan.jump(4, 19, 20), "18, 20")]
)
def test_a_leap_inside_a_step_is_refused_with_the_nearest_legal_steps(plan, near):
    with pytest.raises(PlanError, match=f"nearest legal steps: {near}"):
        Route.lay(plan, singlestep(20))


def test_a_route_is_for_its_own_schedule():
    with pytest.raises(PlanError, match="20 fine steps, the schedule has 21"):
        Route.lay(Plan.coarse(4, 20), plain(21))


def test_called_leaps_and_several_of_them():
    segments = (Segment(0, 1), Segment(1, 4, False), Segment(4, 5), Segment(5, 8, True))
    plan = Plan(8, segments, own_grid=False)
    assert plan.leaps == (segments[1], segments[3])
    assert Route.lay(plan, plms(8)).segments == (
        *(Segment(0, 1), Segment(1, 2), Segment(2, 5, False), Segment(5, 6), Segment(6, 9)),
    )
    assert plan.steps == 8
    assert str(plan) == "jump:1:4+5:8/8"
    assert Plan.parse(str(plan)).calling(True) == plan.calling(True)


@given(st.integers(1, 60), st.integers(0, 40), st.floats(0, 30))
def test_placed_calls_are_as_many_as_asked_for_and_ascend(fine, fewer, guidance):
    calls = max(1, fine - fewer)
    plan = Plan.placed(calls, fine, guidance=guidance)
    assert (plan.steps, plan.fine, plan.own_grid) == (calls, fine, True)
    weaker, stronger = (Plan.placed(calls, fine, guidance=g) for g in (guidance / 2, guidance + 1))
    if calls in (6, 8):  # stronger guidance moves the last call towards the noise, never away from it
        assert weaker.segments[-1].start >= plan.segments[-1].start >= stronger.segments[-1].start


@given(st.integers(3, 60), st.floats(1, 30))
def test_placed_half_calls_are_as_many_as_asked_for(calls, guidance):
    plan = Plan.placed(calls, 80, guidance=guidance, halved=True)
    assert Route.lay(plan, plain(80)).nfe == calls
    assert plan.steps == calls + 1
    assert [i for i, s in enumerate(plan.segments) if s.halved] == [0, 1]


@given(st.integers(1, 40), st.integers(1, 80), st.sampled_from((1.0, 1.5, 3.0, 4.5, 4.6, 7.5)))
def test_calls_placed_as_found_best_are_as_many_as_asked_for(calls, fine, guidance):
    assume(calls <= fine)
    plan = Plan.placed(calls, fine, guidance=guidance, halved=None)
    assert plan.calls == calls
    assert plan.halved == (calls < fine and 1 < guidance <= HALVED_UP_TO.get(calls, 0))
    if not plan.halved:
        assert plan == Plan.placed(calls, fine, guidance=guidance)


def test_placed_half_calls_divide_a_first_step_where_nothing_better_was_found():
    whole, half = (Plan.placed(16, 48, guidance=3.0, halved=h) for h in (False, True))
    assert [s.start for s in half.segments] == [0, 1, *(s.start for s in whole.segments[1:])]
    assert str(Plan.placed(4, 48, guidance=3.0, halved=True)) == "at:0h,9h,18,26,33/48"


def test_placed_calls_where_places_do_not_matter():
    for calls, fine, guidance in ((24, 48, 6.0), (6, 6, 6.0), (1, 1, 7.5), (13, 48, 30.0)):
        assert Plan.placed(calls, fine, guidance=guidance) == Plan.coarse(calls, fine)
    assert str(Plan.placed(6, 48, guidance=4.5)) == "at:0,12,18,24,30,35/48"
    assert Plan.coarse(8, 40) != Plan.placed(8, 40, guidance=3.0) != Plan.placed(8, 40, guidance=7.5)


@pytest.mark.parametrize(
    "text",
    ["", "jump", "jump:1:2", "jump:a:2/3", "coarse:8", "coarse:8/40 ", "at:/40", "at:0,/4", "plain:3", "jump:-1:2/3"],
)
def test_unreadable_plans_show_the_forms(text):
    with pytest.raises(PlanError, match="write it as 'jump:KEY:VALUE/STEPS'"):
        Plan.parse(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Plan.jump(0, 5, 10),
        lambda: Plan.jump(5, 5, 10),
        lambda: Plan.jump(5, 11, 10),
        lambda: Plan.coarse(0, 10),
        lambda: Plan.coarse(11, 10),
        lambda: Plan.placed(0, 10, guidance=3.0),
        lambda: Plan.placed(11, 10, guidance=7.5),
        lambda: Plan.placed(8, 40, guidance=float("nan")),
        lambda: Plan.of([], 10),
        lambda: Plan.of([1, 2], 10),
        lambda: Plan.of([0, 10], 10),
        lambda: Plan.of([0, 2, 2], 10),
        lambda: Plan(10, (), own_grid=False),
        lambda: Plan(10, (Segment(0, 5), Segment(6, 10)), own_grid=False),
        lambda: Plan(10, (Segment(0, 10, False),), own_grid=False),
        lambda: Plan(10, (Segment(0, 5), Segment(5, 10, False)), own_grid=True),
    ],
)
def test_impossible_plans_are_refused(make):
    with pytest.raises(PlanError, match=r"\d|segment|given nan"):
        make()
