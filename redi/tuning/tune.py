"""`redi tune`: for each plan the best of many ways, how far to believe it, and that written beside the tables."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from redi.combiners import Kriging
from redi.engine import ReDiEngine
from redi.errors import InvalidInputError
from redi.gate import Gate
from redi.knowledge_base import KnowledgeBase
from redi.plan import Plan
from redi.tuned import Tuned, Tunings, mark_of
from redi.tuning.curves import fit
from redi.tuning.left_out import Candidate, LeftOut, Sums, candidates, serving
from redi.tuning.validation import held_out, unseen

_SKIPPED: Final = (4, 32)
"""Nearest neighbours left out besides a row, to see what greater distance does."""
_AS_GOOD: Final = 1.01
"""Errors within one in a hundred of the least count as the least: then fewer neighbours, which cost less, are taken."""


@final
@dataclass(frozen=True)
class Progress:
    """Where the work stands.

    Args:
        what: that is under way.
        done: rows or pictures of it.
        total: in all.
        seconds: since `tune` began.
    """

    what: str
    done: int
    total: int
    seconds: float


def tune(
    kb: KnowledgeBase,
    plan: Plan | str | None = None,
    *,
    calls: int | float | None = None,
    pipe: Any = None,
    prompts: Sequence[str] = (),
    rows: int = 512,
    batch_size: int = 16,
    progress: Callable[[Progress], None] = lambda now: None,
) -> Mapping[str, Tuned]:
    """Choose combiner, neighbours and key for coarse plans, and fit how far to believe them, by leaving rows out.

    No model is called unless prompts are given. What is found is kept in the knowledge base's folder, where
    `redi.enable` finds it; it is bound to these rows, and plans tuned before keep what was found for them.

    Args:
        kb: the knowledge base.
        plan: the one to tune; None is every coarse plan it was built for.
        calls: only plans of so many model calls.
        pipe: the pipeline it was built with, to measure errors on `prompts`.
        prompts: at least eight that the knowledge base does not hold. Errors and their bound are fitted on one half of
            them, and the coverage is measured on the other. Without them errors are those of left-out rows, which have
            kin among the others that a new prompt may lack, and are seen before the model has answered to them.
        rows: left out in turn, at most, evenly spread.
        batch_size: prompts per pipeline call.
        progress: told as the work goes on.

    Returns:
        Plan, as text → what was found.

    Raises:
        InvalidInputError: no plan that could be tuned, too few rows, or prompts that cannot be judged on.
        KnowledgeBaseError: the folder cannot be written.
        ReDiError: as `redi.enable` for a pipeline that is not the one the rows came from.
    """
    for name, value, least in (("rows", rows, 2), ("batch_size", batch_size, 1)):
        if value < least:
            raise InvalidInputError(f"{name} must be at least {least}, given {value}")
    if bool(prompts) != (pipe is not None):
        raise InvalidInputError("prompts are judged with a pipeline: give both pipe= and prompts=, or neither")
    if not len(kb):
        raise InvalidInputError(f"{kb.path} holds no finished rows; run redi build first")
    began = time.monotonic()
    engines = _plans(kb, plan, calls)
    if not prompts and (halved := [str(e.plan) for e in engines if e.plan.halved]):
        raise InvalidInputError(
            f"rows that are left out do not show what half calls err by ({', '.join(halved)}); give a pipeline and "
            "prompts that the knowledge base does not hold (redi tune KB --prompts FILE), or name another plan"
        )
    if prompts:
        prompts = unseen(pipe, kb, prompts)
    measured = {name for name, tuned in Tunings.read(kb).plans.items() if tuned.validation}
    found: dict[str, Tuned] = {}
    for engine in engines:

        def tell(done: int, total: int, engine: ReDiEngine = engine) -> None:
            progress(Progress(f"{engine.plan}", done, total, time.monotonic() - began))

        found[str(engine.plan)] = tuned = _tuned(engine, rows, tell)
        # an interrupt takes nothing of what is known, and leaves nothing that only prompts can show
        if not (prompts and (str(engine.plan) in measured or engine.plan.halved)):
            Tunings({str(engine.plan): tuned}).write(kb)
    if prompts:
        chosen = [_served(engine, found[str(engine.plan)]) for engine in engines]
        seen, total = 0, len(prompts)

        def told(pictures: int) -> None:
            nonlocal seen
            seen += pictures
            progress(Progress("held-out prompts", seen, total, time.monotonic() - began))

        told(0)
        for engine, held in zip(
            chosen, held_out(pipe, chosen, prompts, batch_size=batch_size, progress=told), strict=True
        ):
            tuned = found[str(engine.plan)]
            trust, validation = held.calibrate(tuned.trust)
            found[str(engine.plan)] = dataclasses.replace(tuned, trust=trust, validation=validation)
        Tunings(found).write(kb)
    return found


def _plans(kb: KnowledgeBase, plan: Plan | str | None, calls: int | float | None) -> list[ReDiEngine]:
    """Engines of the plans to tune, with default choices whatever was found before.

    Raises:
        InvalidInputError: there is none.
    """
    usual: dict[str, Any] = {"combiner": Kriging(), "neighbors": 64, "gate": Gate()}
    # one by one: beside a jump a coarse plan would be served by the jump's solver
    wanted = [plan] if plan is not None else kb.config.plans
    every = [
        dataclasses.replace(e, key=None, notes=()) for p in wanted for e in ReDiEngine.serving(kb, str(p), **usual)
    ]
    coarse = [e for e in every if e.plan.own_grid]
    if not coarse:
        raise InvalidInputError(
            f"only coarse plans are tuned, given {', '.join(str(e.plan) for e in every)}: a jump that is missed is the "
            "fine run, not a plain solver whose error its own could be a fraction of; give its gate a max_distance "
            "(Gate.calibrated)"
        )
    asked = [e for e in coarse if calls in (None, e.route.nfe)]
    if not asked:
        has = ", ".join(f"{e.route.nfe} ({e.plan})" for e in coarse)
        raise InvalidInputError(f"there is no coarse plan of {calls:g} model calls; there is: {has}")
    return asked


def _tuned(engine: ReDiEngine, rows: int, tell: Callable[[int, int], None]) -> Tuned:
    """The best of the candidates for one plan."""
    left = LeftOut(engine, rows)
    every = candidates(engine, left.most)
    keys = list(dict.fromkeys(c.key for c in every))
    done, total = 0, len(left.rows) * (len(keys) + len(_SKIPPED))

    def told(some: int) -> None:
        nonlocal done
        done += some
        tell(done, total)

    told(0)
    found: dict[Candidate, Sums] = {}
    for key in keys:
        ours = [c for c in every if c.key == key]
        found |= dict(zip(ours, left.sums(ours, told=told), strict=True))
    error = {c: float(s.errors(s.share).mean()) for c, s in found.items()}
    least = min(error.values())
    best = min((c for c in every if error[c] <= _AS_GOOD * least), key=lambda c: (c.neighbors, error[c]))
    far = Sums.cat([left.sums([best], skip=skip, told=told)[0] for skip in _SKIPPED])
    return Tuned(
        transport=engine.transport,
        solver=mark_of(engine.solver),
        key=best.key,
        neighbors=best.neighbors,
        combiner=best.combiner,
        trust=fit(found[best], far, left.apart(best.key)),
        rows=len(left.rows),
        candidates={str(c): e for c, e in error.items()},
    )


def _served(engine: ReDiEngine, tuned: Tuned) -> ReDiEngine:
    """The engine as `Tunings.fields` would have it."""
    best = Candidate(tuned.key, tuned.neighbors, tuned.combiner)
    return dataclasses.replace(serving(engine, best), gate=Gate(trust=tuned.trust))
