"""Say what a knowledge base is, what it cost, what each generation saves, and when it has paid for itself."""

from __future__ import annotations

import argparse
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
        (f"  {p['plan']}", f"{p['nfe']:g}", str(p["nfe_full"]), f"{p['saved']:g}", pictures(p["break_even"]))
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


def pictures(count: int | None) -> str:
    """After how many a knowledge base has paid for itself."""
    return "never" if count is None else f"{count:,} pictures"


def cost(kb: KnowledgeBase) -> dict[str, Any]:
    """Model calls that building took, and what each plan gives back as it is served; a call is one for one picture."""
    from redi.engine import ReDiEngine

    plans: list[dict[str, Any]] = []
    per_row = max(1, kb.record.last)
    for engine in ReDiEngine.serving(kb):
        per_row = engine.cost.calls_per_row
        served = {"plan": str(engine.plan), "transport": type(engine.transport).__name__.lower()}
        plans.append(served | engine.cost.to_json())
    return {"model_calls": per_row * len(kb), "calls_per_row": per_row, "plans": plans}
