"""Prompts from a file, a table, standard input, or the bundled model's own lists."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, cast

from redi.errors import InvalidInputError

_OWN_LISTS: Final = ("train", "heldout")
_USUAL_COLUMNS: Final = ("prompt", "caption", "text", "prompts", "captions")


def read(source: str, *, column: str | None, model: str, note: Callable[[str], None]) -> list[str]:
    """Prompts in their order, without blank ones and repetitions.

    Args:
        source: a .txt file with one prompt in every line; a .csv or .tsv table; .json, a list of texts or objects;
            .jsonl; "-" for lines from standard input; for the bundled model also "train" or "heldout".
        column: which column or field holds the prompt; None finds the usual names.
        model: the model, as it was named.
        note: told what was dropped.

    Raises:
        InvalidInputError: there is no such file, it cannot be read, or it holds no prompt.
    """
    if model == "emoji" and source in _OWN_LISTS:
        from redi import zoo

        return zoo.prompts(model, source)
    text = _text(source)
    suffix = Path(source).suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            found = _table(text, "\t" if suffix == ".tsv" else ",", column, source)
        elif suffix == ".json":
            found = _values(json.loads(text), column, source)
        elif suffix == ".jsonl":
            found = _values([json.loads(line) for line in _lines(text) if line.strip()], column, source)
        else:
            found = _lines(text)
    except (json.JSONDecodeError, csv.Error) as e:
        raise InvalidInputError(f"{source} is not {suffix[1:]}: {e}") from e
    stripped = [p.strip() for p in found]
    prompts = list(dict.fromkeys(p for p in stripped if p))
    if not prompts:
        raise InvalidInputError(f"{_named(source)} holds no prompt; expected one in every line")
    if repeated := sum(map(bool, stripped)) - len(prompts):
        note(f"{repeated} prompts in {_named(source)} occur more than once and were dropped")
    return prompts


def _named(source: str) -> str:
    return "standard input" if source == "-" else source


def _text(source: str) -> str:
    if source == "-":
        data = sys.stdin.buffer.read()
    else:
        path = Path(source)
        if path.is_dir():
            raise InvalidInputError(f"{source} is a folder; expected a file of prompts (txt, tsv, csv, json, jsonl)")
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise InvalidInputError(
                f"there is no file {source}; expected prompts as txt, tsv, csv, json or jsonl, or - for standard input"
            ) from None
        except OSError as e:
            raise InvalidInputError(f"{source} cannot be read: {e.strerror}") from e
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        raise InvalidInputError(
            f"{_named(source)} is not UTF-8 text (byte {e.start}, line {line}); convert it, e.g. with iconv"
        ) from e


def _lines(text: str) -> list[str]:
    """Lines as files have them, of every system; `str.splitlines` would also split at separators within a text."""
    return io.StringIO(text, newline=None).read().split("\n")


def _table(text: str, delimiter: str, column: str | None, source: str) -> list[str]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    columns = list(reader.fieldnames or ())
    chosen = _choose(columns, column, source, "columns")
    return [row[chosen] or "" for row in reader]


def _values(value: Any, column: str | None, source: str) -> list[str]:
    if not isinstance(value, list):
        raise InvalidInputError(f"{source} must be a list of prompts, given {type(value).__name__}")
    found: list[str] = []
    for i, item in enumerate(cast("list[Any]", value)):
        if isinstance(item, dict):
            fields = cast("dict[str, Any]", item)
            item = fields[_choose([*fields], column, f"{source}, element {i}", "fields")]
        if not isinstance(item, str):
            raise InvalidInputError(f"{source}, element {i}: expected a text, given {json.dumps(item)[:60]}")
        found.append(item)
    return found


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
