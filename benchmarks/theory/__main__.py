"""The command line; see `benchmarks.theory`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import benchmarks.theory
from benchmarks import bundled
from benchmarks.paper import report
from benchmarks.paper.settings import Settings
from benchmarks.theory import tables
from benchmarks.theory.study import study
from redi.cli.console import write_json


def main(argv: Sequence[str] | None = None, pipe: Any = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.theory",
        description=benchmarks.theory.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, default=Path("bench/theory/theory.json"), metavar="FILE")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="for rows, latents and norms; by default beside the JSON"
    )
    parser.add_argument("--rows", type=int, default=1024, help="train prompts of the knowledge base, from one noise")
    parser.add_argument("--queries", type=int, default=128, help="prompts to calibrate on, and as many to test on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a look: figures of this size say little")
    given = parser.parse_args(argv)
    if given.quick:
        given.rows, given.queries = 12, 4
    out, cache = given.json.parent, given.cache or given.json.parent / "cache"
    out.mkdir(parents=True, exist_ok=True)
    settings = Settings(out, cache, given.rows, given.queries, 1, given.seed, None, given.quick)
    found = study(settings, pipe or bundled.load(compiled=not given.quick))
    said = report.document(settings, "benchmarks.theory", **found)
    write_json(given.json, said)
    text = "\n\n".join(["# Bounds next to errors", f"`{said['command']}`", *tables.every(found)]) + "\n"
    given.json.with_suffix(".md").write_text(text, encoding="utf-8")
    tables.plot(found, given.json.with_suffix(".png"))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
