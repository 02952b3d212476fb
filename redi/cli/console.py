"""Where a command's words go: people read stdout and progress bars, machines the file named by `--json`."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Final, final

from redi.errors import InvalidInputError

_A_MINUTE: Final = 60.0


@final
@dataclass(frozen=True)
class Console:
    """One command's output.

    Args:
        json_file: where its result goes for machines; "-" is stdout, and then people's words go to stderr.
    """

    json_file: str | None = None

    def __post_init__(self) -> None:
        if self.json_file not in (None, "-") and not (folder := Path(self.json_file).absolute().parent).is_dir():
            # said before the work, not after it
            raise InvalidInputError(f"--json {self.json_file}: there is no folder {folder}; make it first")

    def say(self, text: str = "") -> None:
        """A line for people."""
        print(text, file=sys.stderr if self.json_file == "-" else sys.stdout, flush=True)

    def note(self, text: str) -> None:
        """Something worth knowing, beside the result."""
        print(f"note: {text}", file=sys.stderr, flush=True)

    def result(self, value: Any) -> None:
        """The command's result, for machines."""
        if self.json_file == "-":
            print(to_json(value), end="")
        elif self.json_file is not None:
            write_json(Path(self.json_file), value)

    @contextmanager
    def bar(self, what: str, unit: str) -> Generator[Callable[[int, int], None]]:
        """A progress bar with a rate and an ETA on stderr; where stderr is no terminal, a line every minute.

        The block calls it with (done, total); what the first call says was done before does not count for the ETA.
        """
        from tqdm import tqdm

        bars: list[Any] = []
        began: list[float] = []
        told = [monotonic()]

        def update(done: int, total: int) -> None:
            if not bars:
                bars.append(
                    tqdm(total=total, initial=done, desc=what, unit=unit, disable=None, dynamic_ncols=True, leave=False)
                )
                began[:] = [done, monotonic()]
            bars[0].update(done - bars[0].n)
            if bars[0].disable and monotonic() - told[0] >= _A_MINUTE:
                told[0] = monotonic()
                rate = (done - began[0]) / max(told[0] - began[1], 1e-9)
                left = tqdm.format_interval((total - done) / rate) if rate > 0 else "unknown"
                print(f"{what}: {done} of {total}, {rate:.3g} {unit}/s, {left} left", file=sys.stderr, flush=True)

        try:
            yield update
        finally:
            for bar in bars:
                bar.close()


def require_at_least(given: argparse.Namespace, bound: int, *names: str) -> None:
    """Refuse options that are given and too small.

    Args:
        given: the parsed options; those that are None were not given.
        bound: the least.
        names: of the options, with underscores.

    Raises:
        InvalidInputError: names the first.
    """
    for name in names:
        if (value := getattr(given, name)) is not None and value < bound:
            raise InvalidInputError(f"--{name.replace('_', '-')} must be at least {bound}, given {value}")


def to_json(value: Any) -> str:
    """JSON text with a newline at its end; numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Replace a file with `value` as JSON, whole or not at all."""
    text = to_json(value)
    descriptor, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def size(count: int) -> str:
    """Bytes as people read them."""
    number, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while number >= 1000 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:.3g} {units[0]}"


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table: first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
