"""The command line, `redi`: one file per command, each loaded with everything it needs only when it runs.

Nothing heavy is imported to show help. Exit codes: 0 done, 1 a damaged knowledge base, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final, NoReturn

from redi.cli import bench, build, demo, eval, generate, index, info, merge, tune, verify
from redi.cli.console import Console
from redi.errors import InvalidInputError, ReDiError

_COMMANDS: Final = (demo, build, merge, generate, eval, tune, index, info, verify, bench)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error is said."""

    def error(self, message: str) -> NoReturn:
        raise InvalidInputError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(
        prog="redi",
        description="Diffusion models made cheaper to run by remembering trajectories already paid for. No training.",
        epilog="Start with `redi demo`: it needs no model, no hub and no GPU.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="store_true", help="print the version and leave")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for module in _COMMANDS:
        name = module.__name__.rpartition(".")[2]
        sub = commands.add_parser(
            name, help=module.HELP, description=module.__doc__, allow_abbrev=False, formatter_class=_Help
        )
        sub.set_defaults(run=module.run, resumes=module.RESUMES)
        module.configure(sub)
        sub.add_argument("--json", metavar="FILE", help="write the result as JSON for machines; - for stdout")
    return top


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults are shown where there are any to speak of."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = any(action.default is d for d in (None, False, "", argparse.SUPPRESS))
        return action.help if nothing or "default" in (action.help or "") else super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    name, resumes = "redi", "the same command starts again"
    try:
        given: Any = parser().parse_args(argv)
        if given.version:
            from redi import __version__

            print(__version__)
            return 0
        if given.command is None:
            parser().print_help()
            return 0
        name, resumes = f"redi {given.command}", given.resumes
        # Threads that spin while they wait for each other are no faster where redi is alone, and a hundred times
        # slower where it shares its cores; it must be said before torch is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        return int(given.run(given, Console(given.json)))
    except ReDiError as e:
        return _complain(name, str(e))
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; {resumes}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as e:
        if e.strerror is None:
            raise
        return _complain(name, f"{e.filename}: {e.strerror}" if e.filename else e.strerror)


def _complain(name: str, message: str) -> int:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    text = lines[0]
    for before, line in pairwise(lines):
        text += (" " if before.endswith((":", ";", ",")) else "; ") + line
    print(f"{name}: error: {text}", file=sys.stderr)
    return 2
