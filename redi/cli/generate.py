"""Generate pictures with the help of a knowledge base, as PNG files with a report of what was saved."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redi.cli import models, names
from redi.cli.console import Console, write_json
from redi.errors import InvalidInputError

if TYPE_CHECKING:
    from redi.knowledge_base import KnowledgeBase
    from redi.types import LeapReport

HELP = "generate pictures with a knowledge base"
RESUMES = "pictures already written are kept, the same command writes them anew"


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("kb", help="folder of the knowledge base")
    parser.add_argument("prompt", nargs="+", help="what to draw, one picture each")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the pictures and report.json")
    parser.add_argument("--model", help="by default the one the knowledge base was built with")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="picks the plan of the knowledge base with so many steps"
    )
    parser.add_argument("--plan", metavar="P", help="the plan to serve; by default the knowledge base's first")
    parser.add_argument(
        "--max-error",
        type=float,
        metavar="E",
        help="error to expect at most, as a fraction of the plain solver's, on a knowledge base that redi tune has "
        "seen; picks the cheapest plan that keeps it, and the plain solver for a picture that would not",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the starting noise")
    parser.add_argument("--guidance", type=float, metavar="G", help="by default the knowledge base's")
    parser.add_argument("--neighbors", type=int, metavar="H", help="rows that a leap learns from")
    parser.add_argument(
        "--combiner",
        metavar="NAME",
        help=f"{', '.join(names.COMBINERS)}; affine:0.5 sets its ridge, kriging:0.2 its nugget",
    )
    parser.add_argument(
        "--retriever", metavar="R", help=f"{', '.join(names.RETRIEVERS)}, with settings: see redi index"
    )
    parser.add_argument(
        "--transport",
        choices=names.TRANSPORTS,
        help="how a leap is made; by default defect, or value for jumps of a solver that defect does not suit",
    )
    parser.add_argument(
        "--on-mismatch",
        choices=("error", "plain"),
        default="error",
        help="what settings other than the knowledge base's get: an error, or a run as without redi",
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="pictures generated together")
    models.configure(parser)


def run(given: argparse.Namespace, console: Console) -> int:
    """Generate, write PNG files and a report."""
    for name in ("steps", "neighbors", "batch_size"):
        if (value := getattr(given, name)) is not None and value < 1:
            raise InvalidInputError(f"--{name.replace('_', '-')} must be at least 1, given {value}")
    if not -(2**63) <= given.seed < 2**64:
        raise InvalidInputError(f"--seed must fit into 64 bits, given {given.seed}")
    if any(not p.strip() for p in given.prompt):
        raise InvalidInputError("a prompt is empty; give a text to draw")
    out = Path(given.out)
    if out.exists() and not out.is_dir():
        raise InvalidInputError(f"--out {out} is a file; expected a folder for the pictures")
    combiner = names.combiner(given.combiner) if given.combiner else None
    transport = names.transport(given.transport) if given.transport else None
    retriever = names.retriever(given.retriever) if given.retriever else None
    plan = names.plans(given.plan) if given.plan else None
    if plan is not None and len(plan) > 1:
        raise InvalidInputError(f"--plan takes one plan, given {given.plan}")

    from redi.knowledge_base import KnowledgeBase

    kb = KnowledgeBase.open(given.kb)
    steps = given.steps or (plan[0].steps if plan else None)
    if steps is None and given.max_error is None:
        steps = names.plans(kb.config.plans[0])[0].steps
    mark = kb.fingerprint
    pipe = models.load(given.model or models.model_of(kb), given, mark.dtype.split()[0])
    pipe.set_progress_bar_config(disable=True)

    import torch

    from redi.negatives import negative_texts
    from redi.scheduler import disable, enable, report

    enable(
        pipe,
        kb,
        plan=plan[0] if plan else None,
        transport=transport,
        combiner=combiner,
        retriever=retriever,
        neighbors=given.neighbors,
        max_error=given.max_error,
        on_mismatch=given.on_mismatch,
    )
    pictures: list[dict[str, Any]] = []
    reports: list[LeapReport] = []
    try:
        with console.bar("generating", "picture") as bar:
            bar(0, len(given.prompt))
            for first in range(0, len(given.prompt), given.batch_size):
                texts: list[str] = given.prompt[first : first + given.batch_size]
                images = pipe(
                    texts,
                    # every picture from a generator of its own, so that it does not depend on its batch
                    generator=[torch.Generator().manual_seed(given.seed) for _ in texts],
                    **({} if steps is None else {"num_inference_steps": steps}),
                    guidance_scale=mark.guidance if given.guidance is None else given.guidance,
                    negative_prompt=negative_texts(mark.negative_prompt, len(texts)),
                    height=mark.height,
                    width=mark.width,
                ).images
                reports.append(report(pipe))
                out.mkdir(parents=True, exist_ok=True)
                for i, (text, image) in enumerate(zip(texts, images, strict=True)):
                    file = out / f"{first + i:03d}-{_slug(text)}.png"
                    image.save(file)
                    pictures.append({"file": str(file), "prompt": text} | _saved(kb, reports[-1], i))
                bar(first + len(texts), len(given.prompt))
    finally:
        disable(pipe)
    found = {
        "knowledge_base": str(kb.path),
        "model": mark.model,
        "plan": reports[0].plan,
        "seed": given.seed,
        "guidance": mark.guidance if given.guidance is None else given.guidance,
        "neighbors": given.neighbors,
        "combiner": given.combiner,
        "nfe": reports[0].nfe,
        "nfe_full": reports[0].nfe_full,
        "saved": sum(p["saved"] for p in pictures),
        "seconds": _sum_of(reports),
        "notes": sorted({note for r in reports for note in r.notes}),
        "pictures": pictures,
    }
    write_json(out / "report.json", found)
    _tell(console, found, out)
    console.result(found)
    return 0


def _saved(kb: KnowledgeBase, report: LeapReport, i: int) -> dict[str, Any]:
    if not report.leapt:  # the plain solver served this call
        rows, distances, leapt, noise = (), (), False, None
    else:
        rows, distances, leapt, noise = report.neighbors[i], report.distances[i], report.leapt[i], report.noise_ids[i]
    return {
        "nfe": report.nfe,
        "nfe_full": report.nfe_full,
        "saved": report.nfe_full - report.nfe,
        "leapt": leapt,
        "noise_id": noise,
        "neighbors": [
            {"row": row, "prompt": kb.prompts[row], "distance": distance}
            for row, distance in zip(rows, distances, strict=True)
        ],
    }


def _sum_of(reports: list[LeapReport]) -> dict[str, float]:
    stages = dict.fromkeys(stage for r in reports for stage in r.seconds)
    return {stage: sum(r.seconds.get(stage, 0.0) for r in reports) for stage in stages}


def _tell(console: Console, found: dict[str, Any], out: Path) -> None:
    for p in found["pictures"]:
        console.say(f"{p['file']}  {p['nfe']} model calls instead of {p['nfe_full']}")
        near = [n["prompt"] for n in p["neighbors"][:3]]
        if near:
            console.say(f"    learnt from: {'; '.join(near)}{' …' if len(p['neighbors']) > 3 else ''}")
    for note in found["notes"]:
        console.note(note)
    total = found["seconds"].get("total", 0.0)
    console.say(
        f"{len(found['pictures'])} pictures in {total:.2f} s, {found['saved']} model calls saved; report in {out}"
    )


def _slug(prompt: str) -> str:
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")[:48].strip("-") or "picture"
