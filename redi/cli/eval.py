"""Measure what a knowledge base gives: every way of serving it against plain solvers and the fine solve.

Leaves table.json, table.csv, table.md and plot.png in the output folder. Run it again to go on where it was ended.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redi import launch
from redi import prompts as prompt_lists
from redi.cli import models, names, ranks
from redi.cli.console import Console, require_at_least, table, write_json
from redi.errors import InvalidInputError, MissingExtraError, RankError, ReDiError
from redi.stop import Stop

if TYPE_CHECKING:
    from redi.evaluation import Contest, Features, Lpips, Progress, Score, Table, Way
    from redi.knowledge_base import KnowledgeBase

HELP = "measure ways of serving a knowledge base against plain solvers"
RESUMES = "finished batches are kept, the same command resumes"


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("kb", help="folder of the knowledge base")
    parser.add_argument(
        "prompts",
        help=f"better none of the knowledge base's own: {prompt_lists.FORMS}; - for lines from stdin; for emoji also "
        "train, heldout",
    )
    several: dict[str, Any] = {"nargs": "+", "default": []}
    parser.add_argument("--plans", metavar="P", **several, help="by default all that the knowledge base was built for")
    parser.add_argument(
        "--transports", metavar="T", **several, help=f"{', '.join(names.TRANSPORTS)}; by default what fits the solver"
    )
    parser.add_argument(
        "--combiners", metavar="C", **several, help=f"{', '.join(names.COMBINERS)}, affine:RIDGE, kriging:NUGGET"
    )
    parser.add_argument(
        "--retrievers", metavar="R", **several, help=f"{', '.join(names.RETRIEVERS)}, with settings: see redi index"
    )
    parser.add_argument("--keys", metavar="K", **several, help=", ".join(names.KEYS))
    parser.add_argument("--neighbors", metavar="H", type=int, **several, help="rows that a leap learns from")
    parser.add_argument(
        "--baselines",
        metavar="S[:N,…]",
        **several,
        help="plain solvers with so many steps each, as dpmsolver++:10,15,20, or without steps at redi's numbers of "
        "calls; the solvers of the rows and of the plans are there at these in any case",
    )
    parser.add_argument("--noises", type=int, metavar="M", help="starting noises of the bank; by default all with rows")
    parser.add_argument("--limit", type=int, metavar="N", help="take only the first N prompts")
    parser.add_argument("--column", metavar="NAME", help="column or field of PROMPTS that holds them")
    parser.add_argument(
        "--features",
        default="auto",
        metavar="F",
        help="of Fréchet distances: evaluator (bundled, for emoji), latents, inception or inception:FILE of weights; "
        "auto is inception where its weights are there, but evaluator for emoji",
    )
    parser.add_argument(
        "--score",
        default="auto",
        metavar="S",
        help="of picture and prompt: evaluator (bundled, for emoji), clip or clip:FOLDER; auto likewise",
    )
    parser.add_argument(
        "--repeats", type=int, default=400, metavar="N", help="draws for intervals of Fréchet distances"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of these draws")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="pictures solved together")
    parser.add_argument("--out", default="eval", metavar="DIR", help="folder for tables, plot and finished batches")
    parser.add_argument("--model", help="by default the one the knowledge base was built with")
    models.configure(parser)
    ranks.configure(parser)
    parser.add_argument(
        "--logger",
        metavar="NAME",
        help="csv, tensorboard, or the dotted name of a Lightning logger's class; told batches and pictures per second",
    )
    parser.add_argument("--log-dir", default="redi-logs", metavar="DIR", help="where loggers write")


def run(given: argparse.Namespace, console: Console) -> int:
    """Solve what is not solved yet, and measure."""
    _check(given)
    devices, nodes = ranks.count(given)
    several, first = devices * nodes > 1, launch.is_first()
    by_lightning = several or given.logger is not None
    if by_lightning and given.device:
        raise InvalidInputError(
            f"--device {given.device} is one device; an evaluation by several, or with a logger, runs in Lightning, "
            "which finds them itself: say --accelerator and --devices"
        )
    note: Callable[[str], None] = console.note if first else lambda text: None
    choices = _choices(given)
    plans = names.plans(",".join(given.plans)) if given.plans else None
    baselines = [_baseline(text) for text in given.baselines]

    from redi.knowledge_base import KnowledgeBase

    kb = KnowledgeBase.open(given.kb)
    if not len(kb):
        raise InvalidInputError(f"{kb.path} holds no finished rows; run redi build first")
    mark = kb.fingerprint
    prompts = prompt_lists.read(given.prompts, column=given.column, model=mark.model, limit=given.limit, note=note)
    if known := len(set(prompts) & set(kb.prompts)):
        note(f"{known} of {len(prompts)} prompts are the knowledge base's own: it knows their trajectories")
    # An evaluation alone is interrupted at once, one of several ranks ends together with the others.
    signals = (signal.SIGTERM, signal.SIGINT) if several else (signal.SIGTERM,)
    seen = list["Progress"]()
    try:
        with Stop(*signals) as stop:
            pipe = ranks.load(
                given.model or models.model_of(kb), given, mark.dtype.split()[0], by_lightning=by_lightning
            )
            contest = _contest(given, note, kb, prompts, _ways(kb, pipe, plans, choices, baselines, note))
            with (
                console.bar(f"evaluating {given.kb}", "batch") if first else contextlib.nullcontext(ranks.silent) as bar
            ):

                def progress(now: Progress) -> None:
                    seen.append(now)
                    bar(now.done, now.total)

                found = _evaluate(given, pipe, contest, progress, stop, devices, nodes)
    except RankError:
        if first:
            raise
        return 2  # whoever stopped has said why
    if not first:
        return 0
    if found is None:
        if stop.received == signal.SIGINT:
            raise KeyboardInterrupt
        name = stop.received and stop.received.name
        console.note(f"stopped by {name} with {seen[-1].done} of {seen[-1].total} batches; the same command resumes")
        console.result({"stopped": name, "batches_done": seen[-1].done, "batches": seen[-1].total})
        return 0
    from redi.evaluation import Table

    with console.bar("measuring", "draw") as bar:
        measured = Table.of(contest, found, repeats=given.repeats, seed=given.seed, progress=bar)
    _write(Path(given.out), measured, console)
    _tell(console, measured, given.out)
    console.result({**measured.to_json(), "stopped": None})
    return 0


def _check(given: argparse.Namespace) -> None:
    require_at_least(given, 1, "noises", "limit", "repeats", "batch_size", "devices", "num_nodes")
    if any(n < 1 for n in given.neighbors):
        raise InvalidInputError(f"--neighbors must be at least 1, given {min(given.neighbors)}")
    if unknown := [k for k in given.keys if k not in names.KEYS]:
        raise InvalidInputError(f"there is no key {unknown[0]!r}; there is: {', '.join(names.KEYS)}")
    for name, known in (("features", ("evaluator", "latents", "inception")), ("score", ("evaluator", "clip"))):
        text: str = getattr(given, name)
        kind, _, weights = text.partition(":")
        if kind not in (*known, "auto") or (weights and kind not in ("inception", "clip")):
            raise InvalidInputError(f"there is no --{name} {text!r}; there is: auto, {', '.join(known)}")
    if Path(given.out).exists() and not Path(given.out).is_dir():
        raise InvalidInputError(f"--out {given.out} is a file; expected a folder for the results")


def _choices(given: argparse.Namespace) -> dict[str, Sequence[tuple[str, Any]]]:
    """Fields of an engine that were given, each value with what it is called."""
    every: dict[str, Sequence[tuple[str, Any]]] = {
        "transport": [(text, names.transport(text)) for text in given.transports],
        "combiner": [(text, names.combiner(text)) for text in given.combiners],
        "retriever": [(text, names.retriever(text)) for text in given.retrievers],
        "key": [(text, text) for text in given.keys],
        "neighbors": [(f"H={n}", n) for n in given.neighbors],
    }
    return {name: list(dict(values).items()) for name, values in every.items() if values}


def _baseline(text: str) -> tuple[str, list[int]]:
    """A solver's name, and numbers of steps; none for those of redi.

    Raises:
        InvalidInputError: it cannot be read.
    """
    name, _, steps = text.partition(":")
    try:
        found = [int(s) for s in steps.split(",")] if steps else []
    except ValueError:
        found = [0]
    if any(s < 1 for s in found):
        raise InvalidInputError(f"--baselines {text}: expected NAME:STEPS,STEPS,… with steps of at least 1")
    return name, found


def _ways(
    kb: KnowledgeBase,
    pipe: Any,
    plans: Sequence[Any] | None,
    choices: dict[str, Sequence[tuple[str, Any]]],
    baselines: Sequence[tuple[str, list[int]]],
    note: Callable[[str], None],
) -> list[Way]:
    """The fine solve, plain solvers by name and steps, redi."""
    from redi.evaluation.ways import Way, crossing, distinct, same_calls

    served = names.plans(",".join(kb.config.plans)) if plans is None else plans
    leaping = crossing(kb, served, choices, note)
    own = Way.fine(kb, "").solver
    solvers = {names.label(s, pipe.scheduler): s for s in (own, *(w.solver for w in leaping))}
    fine = Way.fine(kb, names.label(own, pipe.scheduler))
    asked = {name: names.solver(name, pipe.scheduler) for name, _ in baselines}
    plain = [Way.plain(asked[name], n, name) for name, steps in baselines for n in steps]
    matched = [(name, asked[name]) for name, steps in baselines if not steps]
    plain += same_calls(leaping, [*solvers.items(), *matched])
    plain.sort(key=lambda w: (w.name.rpartition(":")[0], w.calls))
    return distinct([fine, *plain, *leaping])


def _contest(
    given: argparse.Namespace, note: Callable[[str], None], kb: KnowledgeBase, prompts: list[str], ways: list[Way]
) -> Contest:
    from redi.evaluation import Contest

    ids: list[int] = kb.noise_ids.unique().tolist()
    if given.noises is not None and given.noises > len(ids):
        raise InvalidInputError(f"--noises {given.noises}: {kb.path} has rows of {len(ids)}")
    bundled = kb.fingerprint.model == models.BUNDLED
    return Contest(
        kb,
        prompts,
        ids[: given.noises],
        ways,
        _features(given.features, bundled, note),
        _score(given.score, bundled, note),
        _lpips(note),
        given.batch_size,
    )


def _features(text: str, bundled: bool, note: Callable[[str], None]) -> Features:
    from redi.evaluation import EvaluatorFeatures, Inception, LatentFeatures

    kind, _, weights = text.partition(":")
    if kind == "latents":
        return LatentFeatures()
    if kind == "inception":
        return Inception(weights or None)
    if kind == "auto" and not bundled:
        try:
            return Inception()
        except (MissingExtraError, InvalidInputError) as e:
            note(f"Fréchet distances are on the bundled evaluator's features, which knows emoji only: {e}")
    return EvaluatorFeatures()


def _score(text: str, bundled: bool, note: Callable[[str], None]) -> Score:
    from redi.evaluation import Clip, EvaluatorScore

    kind, _, weights = text.partition(":")
    if kind == "clip":
        return Clip(weights or None)
    if kind == "auto" and not bundled:
        try:
            return Clip()
        except InvalidInputError as e:
            note(f"the image–text score is the bundled evaluator's, which knows emoji only: {e}")
    return EvaluatorScore()


def _lpips(note: Callable[[str], None]) -> Lpips | None:
    from redi.evaluation import Lpips

    try:
        return Lpips()
    except (MissingExtraError, InvalidInputError) as e:
        note(f"LPIPS is left out: {e}")
        return None


def _evaluate(
    given: argparse.Namespace,
    pipe: Any,
    contest: Contest,
    progress: Callable[[Progress], None],
    stop: Stop,
    devices: int,
    nodes: int,
) -> list[Any] | None:
    if devices * nodes == 1 and given.logger is None:
        from redi.evaluation import evaluate

        return evaluate(pipe, contest, given.out, progress=progress, stop=stop)
    from redi import lightning

    lightning.hush()
    return lightning.evaluate(
        pipe,
        contest,
        given.out,
        devices=devices,
        num_nodes=nodes,
        accelerator=given.accelerator,
        progress=progress,
        stop=stop,
        **lightning.watching(given.log_dir, logger=given.logger),
    )


def _write(out: Path, found: Table, console: Console) -> None:
    from redi.evaluation import plots, words
    from redi.knowledge_base import files

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "table.json", found.to_json())
    files.write(out / "table.csv", words.to_csv(found).encode())
    files.write(out / "table.md", words.to_markdown(found).encode())
    try:
        with files.replacing(out / "plot.png") as temporary:
            plots.draw(found, temporary)
    except ReDiError as e:
        console.note(f"no plot: {e}")


def _tell(console: Console, found: Table, out: str) -> None:
    from redi.evaluation import words

    for lines in (words.results(found), words.stages(found), words.comparisons(found)):
        if len(lines) > 1:
            for line in table(lines):
                console.say(line)
            console.say()
    console.say("in brackets 95 % intervals over prompts; p-values of no difference, Holm-adjusted over a column")
    for row in found.rows:
        if (best := words.best_plain(found, row)) is not None and (d := best.differences["latent_error"]) is not None:
            how = "nearer to" if d.value < 0 else "farther from"
            sure = "" if (p := best.p["latent_error"]) is not None and p < 0.05 else " (not significantly)"
            console.say(f"{row.way.name} is {how} the fine solve than {best.plain.name}{sure}")
    console.say(f"table.json, table.csv, table.md and plot.png are in {out}")
