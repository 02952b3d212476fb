"""Builds by several ranks, each a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from redi.knowledge_base import KnowledgeBase

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0
Key = tuple[str, int]


@dataclass(frozen=True)
class Ranks:
    """A build that was started: the process id of each rank."""

    ask: Callable[[Any], Any]
    folder: Path
    pids: Sequence[int]

    def send(self, rank: int, number: int) -> None:
        os.kill(self.pids[rank], number)

    def wait(self) -> list[int]:
        """Every rank's exit code, negative for a signal."""
        codes = self.ask({"wait": list(self.pids), "seconds": PATIENCE})
        if None in codes:
            for pid, code in zip(self.pids, codes, strict=True):
                if code is None:
                    os.kill(pid, signal.SIGKILL)
            pytest.fail(f"ranks did not end: {codes}; {[self.output(r) for r in range(len(codes))]}")
        return codes

    def running(self) -> bool:
        return all(os.path.exists(f"/proc/{pid}/cwd") for pid in self.pids)

    def output(self, rank: int = 0) -> str:
        return (self.folder / f"output.{rank}").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Place:
    """A folder with prompts to build from and the knowledge base `kb`."""

    ask: Callable[[Any], Any]
    folder: Path

    def write(self, count: int) -> None:
        text = "".join(f"prompt {i}\n" for i in range(count))
        (self.folder / "prompts.txt").write_text(text, encoding="utf-8")

    def start(
        self,
        ranks: int,
        *options: object,
        file_sizes: Mapping[int, int] | None = None,
        pause: float = 0.0,
        kb: str = "kb",
    ) -> Ranks:
        """`redi build` on the prompts.

        Args:
            ranks: processes.
            options: more of its options.
            file_sizes: rank → the largest file it may write, as a disk that is full.
            pause: seconds that every batch takes longer, so that there is a middle to look into.
            kb: the folder's name.
        """
        fixed = ["build", "tiny", "prompts.txt", kb, "--plan", "coarse:2/3", "--guidance", "2", "--storage", "float32"]
        command = {
            "arguments": [*fixed, "--json", "result.json", *map(str, options)],
            "ranks": ranks,
            "folder": str(self.folder),
            "file_sizes": {str(rank): size for rank, size in (file_sizes or {}).items()},
            "pause": pause,
        }
        return Ranks(self.ask, self.folder, self.ask(command))

    def build(self, ranks: int, *options: object, **more: Any) -> Ranks:
        """The same, to its end, which must be a good one."""
        started = self.start(ranks, *options, **more)
        codes = started.wait()
        assert codes == [0] * ranks, [started.output(r) for r in range(ranks)]
        return started

    @property
    def kb(self) -> KnowledgeBase:
        return KnowledgeBase.open(self.folder / "kb")

    @property
    def result(self) -> Any:
        return json.loads((self.folder / "result.json").read_text())

    def keys(self) -> Counter[Key]:
        kb = self.kb
        return Counter(zip(kb.prompts, kb.noise_ids.tolist(), strict=True))

    def solved(self) -> list[tuple[int, Key]]:
        """(rank, row) of everything that was computed since the last time this was asked."""
        log = self.folder / "solved"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [(int(rank), (prompt, noise)) for rank, prompt, noise in map(json.loads, lines)]

    def require_whole(self, prompts: int, noises: int = 1) -> None:
        """Every row exactly once, every checksum right, nothing left over."""
        assert self.keys() == Counter((f"prompt {i}", n) for i in range(prompts) for n in range(noises))
        report = self.kb.verify()
        assert report.ok, report.problems
        assert not report.ignored


@pytest.fixture(scope="session")
def zygote() -> Iterator[Callable[[Any], Any]]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.lightning.zygote"],
        cwd=ROOT,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def read() -> Any:
            line = process.stdout.readline()
            assert line, "the zygote died"
            return json.loads(line)

        def ask(command: Any) -> Any:
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
            return read()

        assert read() == "ready"
        yield ask
        process.stdin.close()


@pytest.fixture
def place(zygote: Callable[[Any], Any], tmp_path: Path) -> Place:
    return Place(zygote, tmp_path)
