"""Plans: where the model is called and where redi leaps. A route is a plan laid on one solver's schedule.

A plan counts solver *steps*, as its user does; a route counts *entries* of `scheduler.timesteps`, which are more for
solvers that call the model twice in a step (Heun) or repeat an entry (PLMS).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final, final

from redi.errors import PlanError
from redi.places import HALVED_UP_TO, places
from redi.schedules import Grid

_FEWEST: Final = 4  # steps of which the second comes early enough for the rows to know its unconditional half
_JUMP: Final = re.compile(r"jump:(\d+:\d+(?:\+\d+:\d+)*)/(\d+)")
_COARSE: Final = re.compile(r"coarse:(\d+)/(\d+)")
_AT: Final = re.compile(r"at:(\d+h?(?:,\d+h?)*)/(\d+)")
_FORMS: Final = (
    "'jump:KEY:VALUE/STEPS' (several leaps: 'jump:3:7+9:14/20'), 'coarse:STEPS/FINE' or 'at:STEP,STEP,…/FINE' "
    "(half calls: 'at:0h,9h,18,25,32/48')"
)


def calls_of(halves: int) -> int | float:
    """So many half model calls as calls: an int where they are whole."""
    return halves / 2 if halves % 2 else halves // 2


@final
@dataclass(frozen=True, slots=True)
class Segment:
    """From `start` to `stop`, with a model call at `start` or without one.

    Of a call that is `halved` the rows foretell the unconditional half, which depends on a prompt only by the sample.
    """

    start: int
    stop: int
    called: bool = True
    halved: bool = False

    @property
    def halves(self) -> int:
        """Half model calls that it takes."""
        return self.called * (1 if self.halved else 2)

    @property
    def is_leap(self) -> bool:
        """Whether this spans more than one step, or takes its step without calling the model."""
        return self.stop > self.start + 1 or not self.called


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """Segments that cover 0 … fine.

    Args:
        fine: steps of the fine schedule.
        segments: contiguous, from 0 to `fine`.
        own_grid: True for coarse plans: the solver's own grid is the called steps, its history is the query's own, and
            every segment is corrected. False for jumps: the solver walks the fine schedule and its history is
            restored after the leap.
    """

    fine: int
    segments: tuple[Segment, ...]
    own_grid: bool

    def __post_init__(self) -> None:
        ends = [0, *(s.stop for s in self.segments)]
        starts = [*(s.start for s in self.segments), self.fine]
        if not self.segments or ends != starts or any(s.stop <= s.start for s in self.segments):
            raise PlanError(f"segments must run without gaps from 0 to {self.fine}, given {self.segments}")
        if self.own_grid and not all(s.called for s in self.segments):
            raise PlanError("a plan on its own grid calls the model at the start of every segment")
        if not self.segments[0].called:
            raise PlanError("the model must be called at step 0: nothing is known of the query before its first call")
        if any(s.halved for s in self.segments) and not (self.own_grid and self.segments[0].halved):
            raise PlanError(
                "calls are halved on a coarse plan, and the first before any other: its unconditional half is that of "
                f"every row, given {self.segments}"
            )

    @classmethod
    def jump(cls, key: int, value: int, steps: int, *, called: bool = False) -> Plan:
        """The paper's Algorithm 2: call [0, key), leap key → value, call [value, steps).

        Args:
            key: solver steps done before the leap, at least 1 (or 0 with `called`).
            value: step that the leap arrives at, key < value ≤ steps.
            steps: steps of the fine schedule.
            called: whether the leap itself makes one call at `key`, as the `Defect` transport needs.
        """
        return cls.jumps([(key, value)], steps, called=called)

    @classmethod
    def jumps(cls, leaps: Sequence[tuple[int, int]], steps: int, *, called: bool = False) -> Plan:
        """Several leaps (key, value) in one run, in order, with fine steps around them; see `jump`."""
        segments: list[Segment] = []
        done = 0
        for key, value in leaps:
            if not max(done, 0 if called else 1) <= key < value <= steps:
                raise PlanError(f"a jump needs 1 ≤ key < value ≤ steps, given key={key}, value={value}, steps={steps}")
            segments += [*(Segment(i, i + 1) for i in range(done, key)), Segment(key, value, called)]
            done = value
        return cls(steps, (*segments, *(Segment(i, i + 1) for i in range(done, steps))), own_grid=False)

    @classmethod
    def coarse(cls, steps: int, fine: int) -> Plan:
        """Call `steps` evenly spread steps of a schedule of `fine`, each segment a leap."""
        if not 1 <= steps <= fine:
            raise PlanError(f"a coarse plan needs 1 ≤ steps ≤ fine, given steps={steps}, fine={fine}")
        return cls.of([round(i * fine / steps) for i in range(steps)], fine)

    @classmethod
    def placed(cls, calls: int, fine: int, *, guidance: float, halved: bool | None = False) -> Plan:
        """So many calls where they were found to be best made on Karras noise levels; an even spread if they are many.

        Args:
            calls: how many.
            fine: steps of the schedule.
            guidance: classifier-free guidance scale: strong guidance wants more of a few calls at high noise.
            halved: whether the first two steps make half calls, so that there is a step more for as many calls; None
                is where that was found to be nearer (`redi.places`): 4, 5, 6 and 8 calls under weak guidance.

        Raises:
            PlanError: calls that the schedule has not, or guidance that is no number.
        """
        if not math.isfinite(guidance):
            raise PlanError(
                f"guidance must be a finite number, given {guidance!r}; give the scale that calls will have"
            )
        if halved is None:
            halved = 1 < guidance <= HALVED_UP_TO.get(calls, 0.0) and calls < fine
        found = places(calls, fine, guidance, halved)
        if found is None and halved:  # the step more divides the first one, which is the longest
            first, *others = [s.start for s in cls.placed(calls, fine, guidance=guidance).segments]
            between = others[0] // 2 if others else 0
            found = [first, between, *others] if between else None
        whole = cls.coarse(calls + halved, fine) if found is None else cls.of(found, fine)
        return whole.halving() if halved else whole

    @classmethod
    def of(cls, called: Sequence[int], fine: int, halved: Collection[int] = ()) -> Plan:
        """Call exactly these steps of a schedule of `fine`, leaping between them.

        Args:
            called: the steps.
            fine: steps of the schedule.
            halved: those of them whose calls leave the unconditional half of guidance to the rows.
        """
        if not called or list(called) != sorted(set(called)) or called[0] != 0 or called[-1] >= fine:
            raise PlanError(f"called steps must ascend from 0 and stay below {fine}, given {list(called)}")
        stops = [*called[1:], fine]
        if unknown := sorted(set(halved) - set(called)):
            raise PlanError(f"only called steps can be halved: {list(called)}, given {unknown}")
        segments = (Segment(a, b, halved=a in halved) for a, b in zip(called, stops, strict=True))
        return cls(fine, tuple(segments), own_grid=True)

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read a plan as it is written on the command line: `jump:10:30/50`, `coarse:8/40` or `at:0,5,20/40`.

        An `h` after a step makes its call a half one: `at:0h,9h,18,25,32/48`.
        """
        if m := _JUMP.fullmatch(text):
            leaps = [(int(a), int(b)) for a, b in (pair.split(":") for pair in m[1].split("+"))]
            return cls.jumps(leaps, int(m[2]))
        if m := _COARSE.fullmatch(text):
            steps, fine = map(int, m.groups())
            return cls.coarse(steps, fine)
        if m := _AT.fullmatch(text):
            steps = m[1].split(",")
            halved = [int(s.removesuffix("h")) for s in steps if s.endswith("h")]
            return cls.of([int(s.removesuffix("h")) for s in steps], int(m[2]), halved)
        raise PlanError(f"cannot read plan {text!r}; write it as {_FORMS}")

    def __str__(self) -> str:
        leaps = self.leaps
        if not self.own_grid:
            return f"jump:{'+'.join(f'{s.start}:{s.stop}' for s in leaps)}/{self.fine}"
        called = [f"{s.start}{'h' if s.halved else ''}" for s in self.segments]
        if self == Plan.coarse(len(called), self.fine):
            return f"coarse:{len(called)}/{self.fine}"
        return f"at:{','.join(called)}/{self.fine}"

    @property
    def steps(self) -> int:
        """What a user passes as `num_inference_steps`: the called steps of a coarse plan, the fine steps of a jump."""
        return len(self.segments) if self.own_grid else self.fine

    @property
    def calls(self) -> int | float:
        """Model calls, where a step makes one; a half call is half of one."""
        return calls_of(sum(s.halves for s in self.segments))

    @property
    def halved(self) -> bool:
        """Whether any of its calls leaves the unconditional half of guidance to the rows."""
        return self.segments[0].halved

    @property
    def leaps(self) -> tuple[Segment, ...]:
        """The segments that retrieved rows correct."""
        return self.segments if self.own_grid else tuple(s for s in self.segments if s.is_leap)

    def halving(self) -> Plan:
        """The same coarse plan with its first two calls halved: one call less.

        Raises:
            PlanError: a jump, or so few steps that the rows know little of the second call's unconditional half.
        """
        if not self.own_grid or self.steps < _FEWEST:
            raise PlanError(
                f"the first two calls are halved of a coarse plan of {_FEWEST} steps at least, which are "
                f"{_FEWEST - 1} calls, given {self}"
            )
        halves = [replace(s, halved=i < 2) for i, s in enumerate(self.segments)]
        return replace(self, segments=tuple(halves))

    def calling(self, called: bool) -> Plan:
        """The same jump with or without a model call at the start of its leaps."""
        if self.own_grid:
            return self
        return replace(self, segments=tuple(replace(s, called=called) if s.is_leap else s for s in self.segments))


@final
@dataclass(frozen=True, eq=False)
class Route:
    """A plan laid on one solver's schedule; every index is an entry of `scheduler.timesteps`.

    Args:
        plan: the plan, in steps.
        fine: the whole schedule.
        grid: what the solver walks: `fine` itself for a jump, the called entries for a coarse plan.
        segments: the plan's segments in entries.
    """

    plan: Plan
    fine: Grid
    grid: Grid
    segments: tuple[Segment, ...]

    @classmethod
    def lay(cls, plan: Plan, schedule: Grid) -> Route:
        """Lay `plan` on a fine schedule.

        Raises:
            PlanError: the schedule has another number of steps, or a leap would begin or end inside a solver step.
        """
        if plan.fine != schedule.steps:
            raise PlanError(f"plan {plan} is for {plan.fine} fine steps, the schedule has {schedule.steps}")
        segments: list[Segment] = []
        for s in plan.segments:
            if plan.own_grid or s.is_leap:
                segments.append(replace(s, start=_entry(schedule, s.start), stop=_entry(schedule, s.stop)))
            else:
                first, end = _raw_entry(schedule, s.start), _raw_entry(schedule, s.stop)
                segments.extend(Segment(i, i + 1) for i in range(first, end))
        grid = schedule.subset([s.start for s in segments]) if plan.own_grid else schedule
        return cls(plan, schedule, grid, tuple(segments))

    @property
    def leaps(self) -> tuple[Segment, ...]:
        """The corrected segments, in order; a leap's place here is its index in every derived table."""
        return self.segments if self.plan.own_grid else tuple(s for s in self.segments if s.is_leap)

    @property
    def nfe(self) -> int | float:
        """Model calls a run of this route makes; one without its unconditional half is half a call."""
        return calls_of(sum(s.halves for s in self.segments))

    @property
    def nfe_full(self) -> int:
        """Model calls of the fine run."""
        return self.fine.fine


def _entry(schedule: Grid, step: int) -> int:
    entry = schedule.boundaries[step]
    if entry is None:
        legal = [k for k, e in enumerate(schedule.boundaries) if e is not None]
        near = sorted(legal, key=lambda k: abs(k - step))[:2]
        raise PlanError(
            f"this solver cannot begin or end a leap at step {step}, which lies inside one of its steps; "
            f"nearest legal steps: {', '.join(map(str, sorted(near)))}"
        )
    return entry


def _raw_entry(schedule: Grid, step: int) -> int:
    """Entry of a step that no leap touches: inside a multi-stage step, count on from its beginning."""
    back = 0
    while schedule.boundaries[step - back] is None:
        back += 1
    begin = schedule.boundaries[step - back]
    assert begin is not None
    return begin + back
