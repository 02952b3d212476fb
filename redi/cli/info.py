"""Say what a knowledge base is, what it cost, what each generation saves, and when it has paid for itself."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from redi.cli import models
from redi.cli.console import Console, size, table

if TYPE_CHECKING:
    from redi.knowledge_base import KnowledgeBase

HELP = "what a knowledge base is, cost, and saves"
RESUMES = "the same command starts again"


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("kb", help="folder of the knowledge base")


def run(given: argparse.Namespace, console: Console) -> int:
    """Describe it."""
    models.hush()
    from redi.knowledge_base import KnowledgeBase
    from redi.partitions import indexes

    kb = KnowledgeBase.open(given.kb)
    found: dict[str, Any] = kb.info() | {"cost": cost(kb), "indexes": indexes(kb.path)}
    mark, paid, noise = kb.fingerprint, found["cost"], found["noise"]
    facts = {
        "model": f"{mark.model} ({mark.pipeline}, {mark.dtype}, weights {mark.weights[:12]})",
        "solver": f"{mark.scheduler}, {mark.steps} steps, guidance {mark.guidance:g}",
        "negative": repr(mark.negative_prompt) if mark.negative_prompt else "none",
        "picture": f"{mark.height}×{mark.width} pixels, latents {'×'.join(map(str, mark.sample_shape))}",
        "rows": f"{found['rows']} of {found['prompts']} prompts in {found['shards']} shards",
        "noise bank": ", ".join(f"{name} {value}" for name, value in noise.items() if name != "shape"),
        "on disk": f"{size(found['bytes'])} ({found['storage']}), derived tables {size(found['bytes_derived'])}",
        "cost": f"{paid['model_calls']:,} model calls ({paid['calls_per_row']} a row)",
    }
    width = max(map(len, facts))
    console.say(str(kb.path))
    for name, value in facts.items():
        console.say(f"  {name.ljust(width)}  {value}")
    lines = [("  plan", "calls", "of", "saved a picture", "pays for itself after")]
    lines += [
        (f"  {p['plan']}", str(p["nfe"]), str(p["nfe_full"]), str(p["saved"]), f"{p['break_even']:,} pictures")
        for p in paid["plans"]
    ]
    for line in table(lines):
        console.say(line)
    if found["indexes"]:
        index = [("  index", "partitions", "on disk")]
        index += [(f"  {i['retriever']}", str(i["partitions"]), size(i["bytes"])) for i in found["indexes"]]
        for line in table(index):
            console.say(line)
    console.result(found)
    return 0


def cost(kb: KnowledgeBase) -> dict[str, Any]:
    """Model calls that building took, and what each plan gives back; a call is one evaluation for one picture."""
    from redi.plan import Plan, Route
    from redi.solvers import DiffusersSolver
    from redi.transports import Defect, Value, check

    mark = kb.fingerprint
    solver = DiffusersSolver.from_config(mark.scheduler, mark.scheduler_config)
    transport = Defect() if solver.suits_coarse else Value()
    schedule = solver.schedule(mark.steps)
    per_row = min(max(1, kb.record.last), schedule.fine)  # a build stops after the last entry that is wanted
    calls = per_row * len(kb)
    plans: list[dict[str, Any]] = []
    for text in kb.config.plans:
        route = Route.lay(check(Plan.parse(text), transport, solver), schedule)
        saved = route.nfe_full - route.nfe
        plans.append(
            {
                "plan": text,
                "transport": type(transport).__name__.lower(),
                "nfe": route.nfe,
                "nfe_full": route.nfe_full,
                "saved": saved,
                "break_even": math.ceil(calls / saved) if saved else 0,
            }
        )
    return {"model_calls": calls, "calls_per_row": per_row, "plans": plans}
