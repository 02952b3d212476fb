"""A process that has everything imported and a pipeline made, and forks the ranks of builds in no time.

Its ranks are real processes in torchrun's environment, without torchrun: nobody ends a rank when another is lost. It
reads one JSON command a line and answers each with one.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import tests.conftest  # the shape checks, before redi is imported  # noqa: F401


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import redi.lightning  # noqa: F401
    from redi import recipe
    from redi.cli import models
    from tests.tiny import tiny_pipeline

    pipe = tiny_pipeline()
    models.load = lambda text, given, dtype=None: pipe  # it travels with the fork
    solve = recipe.FineSolver.__call__

    def logged(self: Any, items: Any) -> Any:
        rows = solve(self, items)
        with open("solved", "a", encoding="utf-8") as log:  # one write: lines of ranks do not mix
            log.write("".join(json.dumps([os.environ.get("RANK", "0"), *item]) + "\n" for item in items))
        time.sleep(float(os.environ.get("PAUSE", "0")))
        while os.path.exists("hold"):
            time.sleep(0.01)
        return rows

    recipe.FineSolver.__call__ = logged
    from redi.evaluation.examiner import Examiner

    see = Examiner.__call__

    def seen(self: Any, batch: Any) -> Any:
        found = see(self, batch)
        with open("solved", "a", encoding="utf-8") as log:
            log.write("".join(json.dumps([os.environ.get("RANK", "0"), *item]) + "\n" for item in batch.items))
        time.sleep(float(os.environ.get("PAUSE", "0")))
        return found

    Examiner.__call__ = seen
    print(json.dumps("ready"), flush=True)
    pids: set[int] = set()
    for line in sys.stdin:
        command = json.loads(line)
        if "arguments" in command:
            answer: Any = start(**command)
            pids |= set(answer)
        else:
            answer = [wait(pid, time.monotonic() + command["seconds"]) for pid in command["wait"]]
            pids -= set(command["wait"])
        print(json.dumps(answer), flush=True)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def start(arguments: list[str], ranks: int, folder: str, file_sizes: dict[str, int], pause: float) -> list[int]:
    """Fork `redi` with these arguments on `ranks` ranks; the process ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids: list[int] = []
    for rank in range(ranks):
        if pid := os.fork():
            pids.append(pid)
            continue
        code = 1
        try:
            os.chdir(folder)
            out = os.open(f"output.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(out, stream)
            os.environ["PAUSE"] = str(pause)
            if ranks > 1:
                os.environ |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks),
                    "GROUP_RANK": "0",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "TORCHELASTIC_RUN_ID": "none",
                }
            if str(rank) in file_sizes:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_sizes[str(rank)],) * 2)
            from redi.cli import main as redi

            code = redi(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pids


def wait(pid: int, until: float) -> int | None:
    """The exit code, negative for a signal; None for a process that is still there."""
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
