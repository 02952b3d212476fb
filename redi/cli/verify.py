"""Check every byte of a knowledge base: sizes, hashes, shapes, finite numbers. Exit code 1 if it is damaged."""

from __future__ import annotations

import argparse

from redi.cli.console import Console, size

HELP = "check every byte of a knowledge base"
RESUMES = "the same command starts again"


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("kb", help="folder of the knowledge base")


def run(given: argparse.Namespace, console: Console) -> int:
    """Name each problem."""
    from redi.knowledge_base import verify

    with console.bar(f"verifying {given.kb}", "B") as bar:
        report = verify(given.kb, bar)
    for problem in report.problems:
        console.say(f"{problem.file}: {problem.what}")
    if report.ignored:
        console.note(f"not in the manifest, left by an interrupted build, ignored: {', '.join(report.ignored)}")
    verdict = "whole" if report.ok else f"damaged, {len(report.problems)} problems"
    console.say(f"{given.kb}: {verdict}; {report.rows} rows, {size(report.bytes)} read")
    console.result(report.to_json())
    return 0 if report.ok else 1
