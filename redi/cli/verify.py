"""Check every byte of a knowledge base: sizes, hashes, shapes, finite numbers. Exit code 1 if it is damaged."""

from __future__ import annotations

import argparse

from redi.cli.console import Console, size

HELP = "check every byte of a knowledge base"
RESUMES = "the same command starts again"


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("kb", help="folder of the knowledge base")
    parser.add_argument(
        "--drop",
        action="store_true",
        help="delete damaged shards and derived tables; the same build then solves those rows again, and no others",
    )


def run(given: argparse.Namespace, console: Console) -> int:
    """Name each problem, and take out what is damaged if that is asked for."""
    from redi.knowledge_base import drop_damaged, verify

    with console.bar(f"verifying {given.kb}", "B") as bar:
        dropped = drop_damaged(given.kb, bar) if given.drop else None
        report = verify(given.kb, bar) if dropped is None else dropped.found
    for problem in report.problems:
        console.say(f"{problem.file}: {problem.what}")
    if report.ignored:
        console.note(f"not in the manifest, left by an interrupted build, ignored: {', '.join(report.ignored)}")
    verdict = "whole" if report.ok else f"damaged, {len(report.problems)} problems"
    console.say(f"{given.kb}: {verdict}; {report.rows} rows, {size(report.bytes)} read")
    said = report.to_json()
    if dropped is not None:
        said |= {"dropped": list(dropped.shards), "rows_dropped": dropped.rows}
        if not report.ok:
            shards = f"{len(dropped.shards)} shards with {dropped.rows} rows"
            console.say(f"taken out: {shards}, which the same redi build solves again; what is left is whole")
    elif any(problem.file.startswith(("shards/", "derived/")) for problem in report.problems):
        console.note("restore these files, or take out with --drop what is damaged, and build on")
    console.result(said)
    return 0 if report.ok or dropped is not None else 1
