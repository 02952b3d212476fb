"""Run a benchmark of the source tree; what follows its name goes to it as it is, `--help` too.

Benchmarks are scripts that measure, not a part of the installed package: they need a checkout of the repository.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from redi.cli.console import Console
from redi.errors import InvalidInputError

HELP = "compare retrievers on latents: what they find and what that costs"
RESUMES = "what was measured is kept, the same command resumes"

_BENCHMARKS: Final = ("retrievers",)


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("benchmark", choices=_BENCHMARKS, help="which one; python -m benchmarks.NAME is the same")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="…", help="its own, such as --quick")


def run(given: argparse.Namespace, console: Console) -> int:
    """Hand over to the script."""
    root = Path(__file__).parents[2]
    if not (root / "benchmarks" / given.benchmark).is_dir():
        raise InvalidInputError(
            f"benchmarks/{given.benchmark} is not installed with redi; clone the repository and run "
            f"python -m benchmarks.{given.benchmark} there"
        )
    if console.json_file == "-":
        raise InvalidInputError("--json -: a benchmark goes on from the file it left; name one")
    said = [] if console.json_file is None else ["--json", str(Path(console.json_file).absolute())]
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", f"benchmarks.{given.benchmark}", *said, *given.arguments]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, check=False).returncode
