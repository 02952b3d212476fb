"""Choose how the coarse plans of a knowledge base are served, and learn what error to expect, from its own rows.

What is found is kept beside the derived tables, and used whenever the knowledge base is served.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from redi import prompts as prompt_lists
from redi.cli import models, names
from redi.cli.console import Console, require_at_least, table
from redi.errors import InvalidInputError

if TYPE_CHECKING:
    from redi.tuned import Tuned
    from redi.tuning import Progress

HELP = "choose how a knowledge base is served, from its own rows"
RESUMES = "what was tuned before is kept, the same command starts again"


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("kb", help="folder of the knowledge base")
    parser.add_argument("--plan", metavar="P", help="the plan to tune; by default every coarse one it was built for")
    parser.add_argument("--nfe", type=float, metavar="N", help="only plans of so many model calls, 3.5 for instance")
    parser.add_argument(
        "--max-error",
        type=float,
        metavar="E",
        help="name the cheapest plan whose expected error is no more than this fraction of the plain solver's",
    )
    parser.add_argument("--rows", type=int, default=512, metavar="N", help="rows left out in turn, at most")
    parser.add_argument(
        "--prompts",
        metavar="PROMPTS",
        help="prompts the knowledge base does not hold, on which errors are measured by the model: "
        f"{prompt_lists.FORMS}; for emoji also heldout",
    )
    parser.add_argument("--limit", type=int, default=32, metavar="N", help="take only the first N of these prompts")
    parser.add_argument("--column", metavar="NAME", help="column or field of PROMPTS that holds them")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="pictures solved together")
    parser.add_argument("--model", help="by default the one the knowledge base was built with")
    models.configure(parser)


def run(given: argparse.Namespace, console: Console) -> int:
    """Tune, and say what was found."""
    require_at_least(given, 1, "nfe", "limit", "batch_size")
    require_at_least(given, 2, "rows")
    if given.max_error is not None and not given.max_error >= 0:
        raise InvalidInputError(f"--max-error must be a number of at least 0, given {given.max_error}")
    plan = names.plans(given.plan) if given.plan else [None]
    if len(plan) > 1:
        raise InvalidInputError(f"--plan takes one plan, given {given.plan}")
    models.hush()

    from redi.knowledge_base import KnowledgeBase
    from redi.tuning import tune

    kb = KnowledgeBase.open(given.kb)
    prompts: list[str] = []
    pipe = None
    if given.prompts:
        mark = kb.fingerprint
        prompts = prompt_lists.read(
            given.prompts, column=given.column, model=mark.model, limit=given.limit, note=console.note
        )
        pipe = models.load(given.model or models.model_of(kb), given, mark.dtype.split()[0])
    with console.bar(f"tuning {kb.path}", "row") as bar:

        def progress(now: Progress) -> None:
            bar(now.done, now.total)

        found = tune(
            kb,
            plan[0],
            calls=given.nfe,
            pipe=pipe,
            prompts=prompts,
            rows=given.rows,
            batch_size=given.batch_size,
            progress=progress,
        )
    for line in table([_HEAD, *(_line(plan, tuned) for plan, tuned in found.items())]):
        console.say(line)
    if not prompts:
        console.note("errors are those of left-out rows; give --prompts to measure them, and the coverage, on new ones")
    said: dict[str, Any] = {
        "knowledge_base": str(kb.path),
        "plans": {plan: tuned.to_json() for plan, tuned in found.items()},
    }
    if given.max_error is not None:
        said["max_error"] = given.max_error
        said["chosen"] = chosen = _cheapest(kb, found, given.max_error)
        console.say(
            f"at most {given.max_error:g} of the plain solver's error: {chosen}"
            if chosen
            else f"no plan is expected to stay within {given.max_error:g} of the plain solver's error"
        )
    console.result(said)
    return 0


_HEAD = ("plan", "error", "nine in ten", "coverage", "served by")


def _line(plan: str, tuned: Tuned) -> tuple[str, ...]:
    trust, v = tuned.trust, tuned.validation
    return (
        plan,
        f"{trust.average if v is None else v['measured']:.2f}",
        f"{trust.bound[0]:.2f} … {trust.bound[-1]:.2f}",
        f"{v['coverage']:.2f}" if v and "coverage" in v else "–",
        f"{tuned.key} key, {tuned.neighbors} neighbours, {tuned.combiner}",
    )


def _cheapest(kb: Any, found: Mapping[str, Tuned], most: float) -> str | None:
    """The plan of the fewest calls whose expected error is allowed."""
    from redi.engine import ReDiEngine

    allowed = [plan for plan, tuned in found.items() if tuned.trust.average <= most]
    calls = {plan: ReDiEngine.serving(kb, plan)[0].route.nfe for plan in allowed}
    return min(allowed, key=lambda plan: calls[plan], default=None)
