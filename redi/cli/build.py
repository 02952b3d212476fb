"""Build a knowledge base: solve prompts finely, once, and keep what later generations leap along."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from redi import prompts as prompt_lists
from redi.cli import models, names
from redi.cli.console import Console, size
from redi.errors import InvalidInputError

HELP = "solve prompts finely and keep the trajectories"
RESUMES = "finished rows are kept, the same command resumes"


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("model", help="emoji (bundled), a local diffusers folder, or a Hub id")
    parser.add_argument(
        "prompts",
        help="txt with one prompt in every line, csv or tsv, json or jsonl, - for stdin; for emoji also train, heldout",
    )
    parser.add_argument("kb", help="folder of the knowledge base; one of the same settings is continued")
    parser.add_argument("--solver", default="dpmsolver++", metavar="NAME", help=", ".join(names.SOLVERS))
    parser.add_argument(
        "--plan",
        default="coarse:8/40",
        metavar="P[,P…]",
        help="what it shall serve: coarse:STEPS/FINE, jump:KEY:VALUE/STEPS, at:STEP,STEP,…/FINE; several share FINE",
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
    parser.add_argument("--negative-prompt", default="", metavar="TEXT", help="for every row")
    parser.add_argument("--column", metavar="NAME", help="column or field of PROMPTS that holds them")
    parser.add_argument("--limit", type=int, metavar="N", help="take only the first N prompts")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="pictures solved together")
    parser.add_argument("--storage", choices=("float16", "float32"), default="float16", help="precision on disk")
    models.configure(parser)


def run(given: argparse.Namespace, console: Console) -> int:
    """Build, or continue, and say what it cost."""
    for name, least in (("noises", 1), ("batch_size", 1), ("limit", 1), ("height", 1), ("width", 1)):
        if (value := getattr(given, name)) is not None and value < least:
            raise InvalidInputError(f"--{name.replace('_', '-')} must be at least {least}, given {value}")
    texts = prompt_lists.read(
        given.prompts, column=given.column, model=given.model, limit=given.limit, note=console.note
    )
    plans = names.plans(given.plan)
    if (folder := Path(given.kb)).exists() and not folder.is_dir():
        raise InvalidInputError(f"{folder} is a file; expected a folder for the knowledge base")
    pipe = models.load(given.model, given)
    solver = names.solver(given.solver, pipe.scheduler)

    from redi.builder import Progress, build

    start, first = time.perf_counter(), list[int]()
    with console.bar(f"building {given.kb}", "row") as bar:

        def progress(now: Progress) -> None:
            first.append(now.done)
            bar(now.done, now.total)

        kb = build(
            pipe,
            texts,
            folder,
            plans=plans,
            solver=solver,
            noises=given.noises,
            seed=given.seed,
            diversity=given.diversity,
            guidance=models.guidance_of(given.model) if given.guidance is None else given.guidance,
            height=given.height,
            width=given.width,
            negative_prompt=given.negative_prompt,
            batch_size=given.batch_size,
            storage=given.storage,
            model=models.name_of(given.model),
            progress=progress,
        )
    seconds = time.perf_counter() - start
    found = kb.info()
    rows = len(kb) - (first[0] if first else len(kb))
    console.say(f"{given.kb}: {len(kb)} rows ({rows} new), {size(found['bytes'])}, {seconds:.1f} s")
    console.say(f"  {found['summary']}")
    console.say(f"  serves {', '.join(found['plans'])}")
    console.say(f'try it: redi generate {given.kb} "{texts[0]}" --out pictures')
    console.result({**found, "rows_new": rows, "seconds": seconds})
    return 0
