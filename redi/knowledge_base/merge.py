"""Joining knowledge bases that were built apart, with the same settings, into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from redi.errors import InvalidInputError, KnowledgeBaseError
from redi.knowledge_base.reader import KnowledgeBase
from redi.knowledge_base.verification import verify
from redi.knowledge_base.writer import Writer


@final
@dataclass(frozen=True, slots=True)
class Merged:
    """What joining did.

    Args:
        added: rows that were put into the result.
        repeated: rows, by prompt and noise id, that were there already; the first of them stays.
    """

    added: int
    repeated: int


def merge(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    shard_rows: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> Merged:
    """Copy the rows of several knowledge bases into a new one, or into one that holds some of them already.

    Every source is verified first, byte for byte. Interrupted, the same call goes on.

    Args:
        sources: folders; the configuration of the first is the result's, with the largest noise bank of them.
        out: folder of the result.
        shard_rows: rows of its shards.
        progress: told (rows looked at, rows in all).

    Raises:
        InvalidInputError: there are no sources, or the result is one of them.
        FingerprintMismatchError: they were built with different settings; the fields are listed.
        KnowledgeBaseError: a source is damaged, or the result cannot be written.
    """
    out, paths = Path(out), [Path(source) for source in sources]
    if not paths:
        raise InvalidInputError("merging needs at least one knowledge base, given none")
    if len({path.resolve() for path in (*paths, out)}) <= len(paths):
        raise InvalidInputError(f"the knowledge bases and the result {out} must be different folders, given {paths}")
    parts = [KnowledgeBase.open(path) for path in paths]
    config = parts[0].config
    for part in parts[1:]:
        # a machine may keep the model elsewhere: its weights make the rows, not its name
        what_to_do = f"leave out {part.path}, or build it with the settings of {paths[0]}"
        config = config.joined(part.config, what_to_do, ["model"])
    for path in paths:
        if problems := verify(path).problems:
            named = ", ".join(f"{p.file} ({p.what})" for p in problems)
            raise KnowledgeBaseError(f"{path} is damaged: {named}; restore these files, or leave it out")
    total, seen = sum(map(len, parts)), 0
    with Writer.open(out, config, shard_rows) as writer:
        before = len(writer.done)
        for part in parts:
            for rows in part.chunks(shard_rows) if len(part) else ():
                writer.append(rows)
                seen += len(rows)
                if progress is not None:
                    progress(seen, total)
        writer.flush()
        return Merged(len(writer.done) - before, writer.skipped)
