"""Build the indexes that serve a knowledge base, so that the first picture does not wait for them."""

from __future__ import annotations

import argparse
import time
from typing import Any

from redi.cli import models, names
from redi.cli.console import Console, size

HELP = "build the tables and indexes that serving needs, ahead of time"
RESUMES = "finished indexes are kept, the same command resumes"


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("kb", help="folder of the knowledge base")
    parser.add_argument(
        "--retriever",
        metavar="R",
        help="exact, faiss:FACTORY, hnsw or scann, then settings: faiss:IVF256,SQfp16:nprobe=16,rerank=100 or "
        "hnsw:M=32; by default what suits the number of rows",
    )
    parser.add_argument("--plan", metavar="P", help="the plan to serve; by default every plan it was built for")
    parser.add_argument(
        "--transport",
        choices=names.TRANSPORTS,
        help="how a leap is made; by default defect, or value for jumps of a solver that defect does not suit",
    )


def run(given: argparse.Namespace, console: Console) -> int:
    """Derive, index, and say what that took."""
    retriever = names.retriever(given.retriever) if given.retriever else None
    transport = names.transport(given.transport) if given.transport else None
    plans = names.plans(given.plan) if given.plan else [None]
    models.hush()

    from redi.engine import ReDiEngine
    from redi.knowledge_base import KnowledgeBase
    from redi.partitions import indexes

    kb = KnowledgeBase.open(given.kb)
    engines = [
        engine for plan in plans for engine in ReDiEngine.serving(kb, plan, transport=transport, retriever=retriever)
    ]
    served: list[dict[str, Any]] = []
    with console.bar(f"indexing {kb.path}", "plan") as bar:
        for done, engine in enumerate(engines):
            bar(done, len(engines))
            start = time.perf_counter()
            parts = engine.table.partitions
            served.append(
                {
                    "plan": str(engine.plan),
                    "key": engine.served_key,
                    "indexes": [
                        {"leap": leap, "noise_id": noise, "rows": len(part.ids), "index": part.index.kind}
                        for (leap, noise), part in parts.items()
                    ],
                    "seconds": time.perf_counter() - start,
                }
            )
        bar(len(engines), len(engines))
    found = indexes(kb.path)
    for plan in served:
        kinds = ", ".join(sorted({i["index"] for i in plan["indexes"]}))
        console.say(f"{plan['plan']}: {len(plan['indexes'])} × {kinds} by {plan['key']} key, {plan['seconds']:.1f} s")
    console.say(f"{given.kb}: {len(found)} kept, {size(sum(i['bytes'] for i in found))}")
    console.result({"knowledge_base": str(kb.path), "served": served, "indexes": found})
    return 0
