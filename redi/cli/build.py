"""Build a knowledge base: solve prompts finely, once, and keep what later generations leap along."""

from __future__ import annotations

import argparse
import contextlib
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from redi import launch
from redi import prompts as prompt_lists
from redi.cli import models, names, ranks
from redi.cli.console import Console, require_at_least, size
from redi.errors import InvalidInputError, RankError
from redi.stop import Stop

if TYPE_CHECKING:
    from redi.builder import Progress
    from redi.knowledge_base import KnowledgeBase

HELP = "solve prompts finely and keep the trajectories"
_NAMED: Final = 5  # rows that were not written, in words
RESUMES = "finished rows are kept, the same command resumes"


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("model", help="emoji (bundled), a local diffusers folder, or a Hub id")
    parser.add_argument("prompts", help=f"{prompt_lists.FORMS}; - for lines from stdin; for emoji also train, heldout")
    parser.add_argument("kb", help="folder of the knowledge base; one of the same settings is continued")
    parser.add_argument(
        "--solver",
        metavar="NAME",
        help=f"{', '.join(names.SOLVERS)}; most also with -karras after the name; by default dpmsolver++-karras, "
        "for flow models dpmsolver++",
    )
    parser.add_argument(
        "--plan",
        metavar="P[,P…]",
        help="what it shall serve: few:CALLS/FINE (calls placed for the guidance; few:CALLSh/FINE makes the first two "
        "without their unconditional half, and a step more), coarse:CALLS/FINE (evenly), "
        "at:STEP,STEP,…/FINE, jump:KEY:VALUE/FINE; several share FINE (default: few:8/40, or, under weak "
        "guidance where the pipeline has half calls, few:8h/40)",
    )
    parser.add_argument("--noises", type=int, default=1, metavar="M", help="starting noises in the bank")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the noise bank")
    parser.add_argument(
        "--diversity",
        type=float,
        default=0.0,
        metavar="ETA",
        help="how far from its bank noise a query may start, 0 … 1",
    )
    parser.add_argument("--guidance", type=float, metavar="G", help="guidance scale (default: 3 for emoji, else 7.5)")
    parser.add_argument("--height", type=int, metavar="PIXELS", help="by default the model's own")
    parser.add_argument("--width", type=int, metavar="PIXELS", help="by default the model's own")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="for every row")
    parser.add_argument("--suffix", default="", metavar="TEXT", help="put behind every prompt, e.g. a style")
    parser.add_argument("--column", metavar="NAME", help="column or field of PROMPTS that holds them")
    parser.add_argument("--limit", type=int, metavar="N", help="take only the first N prompts")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="pictures solved together")
    parser.add_argument("--shard-rows", type=int, default=256, metavar="N", help="rows of a shard; what a crash loses")
    parser.add_argument("--storage", choices=("float16", "float32"), default="float16", help="precision on disk")
    parser.add_argument(
        "--preview", type=int, default=0, metavar="N", help="draw N rows into KB/preview.png, as far as they were kept"
    )
    models.configure(parser)
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="of the model (default: float16 on GPUs)"
    )
    ranks.configure(parser)
    parser.add_argument(
        "--logger",
        metavar="NAME",
        help="csv, tensorboard, or the dotted name of a Lightning logger's class; told rows and rows per second",
    )
    parser.add_argument(
        "--profile",
        nargs="?",
        const="simple",
        choices=("simple", "advanced"),
        help="have Lightning say where the time goes",
    )
    parser.add_argument("--log-dir", default="redi-logs", metavar="DIR", help="where loggers and profilers write")


def run(given: argparse.Namespace, console: Console) -> int:
    """Build, or continue, and say what it cost."""
    require_at_least(given, 0, "preview")
    require_at_least(given, 1, "noises", "batch_size", "shard_rows", "limit", "height", "width", "devices", "num_nodes")
    devices, nodes = ranks.count(given)
    several, first = devices * nodes > 1, launch.is_first()
    watched = given.logger is not None or given.profile is not None
    if several and given.device:
        raise InvalidInputError(f"--device {given.device} is one device; for several say --accelerator and --devices")
    if watched and given.device:
        raise InvalidInputError(
            f"--device {given.device}: a build that is logged or profiled runs in Lightning, which finds its device "
            "itself; say --accelerator"
        )
    texts = prompt_lists.read(
        given.prompts,
        column=given.column,
        model=given.model,
        suffix=given.suffix,
        limit=given.limit,
        note=console.note if first else lambda text: None,
    )
    if given.plan is not None:
        names.plans(given.plan, names.evenly)  # is said to be wrong before the model is loaded
    guidance = models.guidance_of(given.model) if given.guidance is None else given.guidance
    if (folder := Path(given.kb)).exists() and not folder.is_dir():
        raise InvalidInputError(f"{folder} is a file; expected a folder for the knowledge base")
    started, seen = time.perf_counter(), list["Progress"]()
    # A build alone is interrupted at once, one of several ranks ends together with the others.
    signals = (signal.SIGTERM, signal.SIGINT) if several else (signal.SIGTERM,)
    try:
        with (
            Stop(*signals) as stop,
            console.bar(f"building {given.kb}", "row") if first else contextlib.nullcontext(ranks.silent) as bar,
        ):

            def progress(now: Progress) -> None:
                if now.most != (seen[-1].most if seen else None):
                    console.note(f"out of memory; from here on no more than {now.most} pictures are solved together")
                seen.append(now)
                bar(now.done, now.total)

            pipe = ranks.load(given.model, given, given.dtype, by_lightning=several or watched)
            solver = names.fine_solver(pipe.scheduler, given.solver)
            settings: dict[str, Any] = {
                "plans": None if given.plan is None else names.plans(given.plan, names.placing(solver, guidance)),
                "solver": solver,
                "noises": given.noises,
                "seed": given.seed,
                "diversity": given.diversity,
                "guidance": guidance,
                "height": given.height,
                "width": given.width,
                "negative_prompt": given.negative_prompt,
                "storage": given.storage,
                "model": models.name_of(given.model),
            }
            work: dict[str, Any] = {"shard_rows": given.shard_rows, "progress": progress, "stop": stop}
            if several or watched:
                from redi import lightning
                from redi.recipe import Recipe

                lightning.hush()
                if watched:
                    work |= lightning.watching(given.log_dir, logger=given.logger, profile=given.profile)
                kb = lightning.build(
                    pipe,
                    Recipe.of(pipe, **settings),
                    lightning.PromptData(texts, given.batch_size),
                    given.kb,
                    devices=devices,
                    num_nodes=nodes,
                    accelerator=given.accelerator,
                    **work,
                )
            else:
                from redi.builder import build

                kb = build(pipe, texts, given.kb, batch_size=given.batch_size, **settings, **work)
    except RankError:
        if first:
            raise
        return 2  # whoever stopped has said why
    if stop.received == signal.SIGINT and first:
        raise KeyboardInterrupt
    if first:
        _tell(given, console, kb, texts[0], seen, time.perf_counter() - started, stop)
        if given.preview and len(kb):
            from redi.cli import preview

            console.say(f"preview: {preview.draw(pipe, kb, given.preview)}")
    return 0


def _tell(
    given: argparse.Namespace,
    console: Console,
    kb: KnowledgeBase,
    example: str,
    seen: list[Progress],
    seconds: float,
    stop: Stop,
) -> None:
    found, rows, total = kb.info(), len(kb) - seen[0].done, seen[-1].total
    if stop.received is not None:
        console.note(f"stopped by {stop.received.name} with {seen[-1].done} of {total} rows; the same command resumes")
    if refused := seen[-1].refused:
        console.note(f"{len(refused)} rows were not written:")
        for row in refused[:_NAMED]:
            console.note(f"  {row.prompt[:80]!r} from noise {row.noise_id}: {row.reason}")
        if len(refused) > _NAMED:
            console.note(f"  and {len(refused) - _NAMED} more, which --json lists")
    console.say(f"{given.kb}: {len(kb)} rows ({rows} new), {size(found['bytes'])}, {seconds:.1f} s")
    console.say(f"  {found['summary']}")
    console.say(f"  serves {', '.join(found['plans'])}")
    console.say(f'try it: redi generate {given.kb} "{example}" --out pictures')
    told = {"rows_new": rows, "rows_asked": total, "refused": len(refused), "seconds": seconds}
    refusals = [asdict(row) for row in refused]
    console.result({**found, **told, "refusals": refusals, "stopped": stop.received and stop.received.name})
