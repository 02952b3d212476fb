"""Prompts from a file, a table, standard input, or the bundled model's own lists: read in a stream, each kept once."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Final, TextIO, cast

from redi.errors import InvalidInputError, MissingExtraError

FORMS: Final = "txt, tsv, csv, json (COCO captions too), jsonl, parquet"
_OWN_LISTS: Final = ("train", "heldout")
_USUAL_COLUMNS: Final = ("prompt", "caption", "text", "prompts", "captions")


def read(
    source: str,
    *,
    column: str | None = None,
    model: str = "",
    suffix: str = "",
    limit: int | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """Prompts in their order, without blank ones and repetitions.

    Args:
        source: a .txt file with one prompt in every line; a .csv, .tsv or .parquet table; .json, a list of texts or
            objects, or COCO's captions; .jsonl; "-" for lines from standard input; for the bundled model also "train"
            or "heldout".
        column: which column or field holds the prompt; None finds the usual names.
        model: the model, as it was named.
        suffix: put behind every prompt, e.g. ", watercolour".
        limit: how many to take; nothing behind them is read.
        note: told what was dropped.

    Raises:
        InvalidInputError: there is no such file, it cannot be read, or it holds no prompt.
        MissingExtraError: a .parquet file, without pyarrow.
    """
    if model == "emoji" and source in _OWN_LISTS:
        from redi import zoo

        return [prompt + suffix for prompt in zoo.prompts(model, source)[:limit]]
    given = (stripped for text in _texts(source, column) if (stripped := text.strip()))
    seen: dict[str, int] = {}

    def once() -> Iterator[str]:
        for text in given:
            if text not in seen:
                yield text
            seen[text] = seen.get(text, 0) + 1

    found = list(islice(once(), limit))
    if not found:
        raise InvalidInputError(f"{_named(source)} holds no prompt; expected one in every line")
    if repeated := sum(seen.values()) - len(seen):
        note(f"{repeated} prompts in {_named(source)} occur more than once and were dropped")
    return [text + suffix for text in found]


def _texts(source: str, column: str | None) -> Iterator[str]:
    suffix = Path(source).suffix.lower()
    if suffix == ".parquet":
        yield from _parquet(source, column)
        return
    try:
        with _opened(source, newline="" if suffix in (".csv", ".tsv") else None) as file:
            if suffix in (".csv", ".tsv"):
                yield from _table(file, "\t" if suffix == ".tsv" else ",", column, source)
            elif suffix == ".json":
                yield from _values(_list(json.load(file), source), column, source)
            elif suffix == ".jsonl":
                yield from _values((json.loads(line) for line in file if line.strip()), column, source)
            else:
                yield from file
    except OSError as e:
        raise InvalidInputError(f"{source} cannot be read: {e.strerror}") from e
    except (json.JSONDecodeError, csv.Error) as e:
        raise InvalidInputError(f"{source} is not {suffix[1:]}: {e}") from e
    except UnicodeDecodeError:  # which counts from somewhere in the middle
        _require_utf8(Path(source).read_bytes(), source)
        raise


def _named(source: str) -> str:
    return "standard input" if source == "-" else source


@contextmanager
def _opened(source: str, newline: str | None) -> Generator[TextIO]:
    """Text whose lines are those of every system; within them nothing separates."""
    if source == "-":
        data = sys.stdin.buffer.read()
        _require_utf8(data, source)
        yield io.StringIO(data.decode("utf-8-sig"), newline=newline)
        return
    _require_file(source)
    with open(source, encoding="utf-8-sig", newline=newline) as file:
        yield file


def _require_file(source: str) -> None:
    if Path(source).is_dir():
        raise InvalidInputError(f"{source} is a folder; expected a file of prompts ({FORMS})")
    if not Path(source).exists():
        raise InvalidInputError(f"there is no file {source}; expected prompts as {FORMS}, or - for standard input")


def _require_utf8(data: bytes, source: str) -> None:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        raise InvalidInputError(
            f"{_named(source)} is not UTF-8 text (byte {e.start}, line {line}); convert it, e.g. with iconv"
        ) from e


def _table(file: TextIO, delimiter: str, column: str | None, source: str) -> Iterator[str]:
    reader = csv.DictReader(file, delimiter=delimiter)
    chosen = _choose(list(reader.fieldnames or ()), column, source, "columns")
    for row in reader:
        yield row[chosen] or ""


def _parquet(source: str, column: str | None) -> Iterator[str]:
    _require_file(source)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "parquet") from None
    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            chosen = _choose(list(file.schema_arrow.names), column, source, "columns")
            for batch in file.iter_batches(columns=[chosen]):
                yield from _values(("" if v is None else v for v in batch.column(0).to_pylist()), None, source)
    except (pyarrow.ArrowInvalid, OSError) as e:
        raise InvalidInputError(f"{source} is not parquet: {e}") from e


def _list(value: Any, source: str) -> list[Any]:
    if isinstance(value, dict) and "annotations" in value:  # https://cocodataset.org/#format-data, 5: captions
        value = cast("dict[str, Any]", value)["annotations"]
    if not isinstance(value, list):
        raise InvalidInputError(f"{source} must be a list of prompts, given {type(value).__name__}")
    return cast("list[Any]", value)


def _values(items: Iterable[Any], column: str | None, source: str) -> Iterator[str]:
    for i, item in enumerate(items):
        if isinstance(item, dict):
            fields = cast("dict[str, Any]", item)
            item = fields[_choose([*fields], column, f"{source}, element {i}", "fields")]
        if not isinstance(item, str):
            raise InvalidInputError(f"{source}, element {i}: expected a text, given {json.dumps(item)[:60]}")
        yield item


def _choose(columns: Sequence[str], column: str | None, source: str, what: str) -> str:
    if column is not None:
        if column in columns:
            return column
        raise InvalidInputError(f"{source} has no {column!r} among its {what}: {', '.join(columns) or 'none'}")
    if len(columns) == 1:
        return columns[0]
    lower = {c.lower().strip(): c for c in reversed(columns)}
    for usual in _USUAL_COLUMNS:
        if usual in lower:
            return lower[usual]
    raise InvalidInputError(
        f"{source}: which of its {what} holds the prompts? name it with --column: {', '.join(columns) or 'none'}"
    )
