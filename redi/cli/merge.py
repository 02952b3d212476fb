"""Join knowledge bases that were built apart, on several machines say, with the same settings."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from redi.cli.console import Console, size
from redi.errors import InvalidInputError

HELP = "join knowledge bases of the same settings"
RESUMES = "finished rows are kept, the same command resumes"


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("kb", nargs="+", help="folders of knowledge bases; each is verified first")
    parser.add_argument("out", help="folder of the result; one that holds some of the rows is continued")
    parser.add_argument("--shard-rows", type=int, default=256, metavar="N", help="rows of a shard of the result")


def run(given: argparse.Namespace, console: Console) -> int:
    """Copy what is not there yet."""
    if given.shard_rows < 1:
        raise InvalidInputError(f"--shard-rows must be at least 1, given {given.shard_rows}")
    from redi.knowledge_base import KnowledgeBase, merge

    with console.bar(f"joining into {given.out}", "row") as bar:
        done = merge(given.kb, given.out, shard_rows=given.shard_rows, progress=bar)
    found = KnowledgeBase.open(given.out).info()
    if done.repeated:
        console.note(f"{done.repeated} rows were there already, by prompt and noise, and were not copied again")
    console.say(f"{given.out}: {found['rows']} rows ({done.added} new), {size(found['bytes'])}")
    console.result({**found, **asdict(done)})
    return 0
