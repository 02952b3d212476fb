"""Taking what is damaged out of a knowledge base, so that the same build solves those rows again and no others."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from redi.errors import KnowledgeBaseError
from redi.knowledge_base import files
from redi.knowledge_base.card import card
from redi.knowledge_base.derived import FOLDER
from redi.knowledge_base.inspection import look
from redi.knowledge_base.lock import Lock
from redi.knowledge_base.manifest import MANIFEST
from redi.knowledge_base.verification import VerifyReport, verify


@final
@dataclass(frozen=True)
class Dropped:
    """What was taken out.

    Args:
        found: what verifying found before.
        shards: names of the shards that are gone.
        rows: rows that were in them.
    """

    found: VerifyReport
    shards: tuple[str, ...]
    rows: int


def drop_damaged(path: str | Path, progress: Callable[[int, int], None] | None = None) -> Dropped:
    """Verify a knowledge base, and take out each shard and each derived table that is not what was written.

    The manifest goes first, and so a crash leaves a whole knowledge base too. A shard is lost with all its rows, also
    where only its prompts are damaged: without them nobody can say what its rows are.

    Args:
        path: its folder, which nobody else is writing.
        progress: told (bytes done, bytes in all) after each file.

    Raises:
        KnowledgeBaseError: there is no knowledge base; its configuration or manifest is damaged, without which no shard
            can be trusted; another process writes it; or the disk refused.
    """
    path = Path(path)
    look(path)  # says so where there is none, before there is a lock in the folder
    lock = Lock(path)
    try:
        found, seen = verify(path, progress), look(path)
        config, manifest = seen.config, seen.manifest
        bad = {problem.file for problem in found.problems}
        lost = [s for s in manifest.shards if bad & {s.file, s.prompts_file}] if manifest is not None else []
        tables = {file for file in bad if file.startswith(f"{FOLDER}/")}
        rest = bad - tables - {file for s in lost for file in (s.file, s.prompts_file)}
        if config is None or manifest is None or rest:
            raise KnowledgeBaseError(
                f"{path}: {', '.join(sorted(rest))} damaged, without which no shard can be trusted; restore it, or "
                "build the knowledge base anew in another folder"
            )
        kept = tuple(s for s in manifest.shards if s not in lost)
        left = replace(manifest, shards=kept, layout=manifest.layout if kept else {})
        try:
            if lost:
                files.write(path / MANIFEST, left.to_bytes())
                files.write(path / "README.md", card(config, left).encode("utf-8"), durable=False)
            for file in (file for s in lost for file in (s.file, s.prompts_file)):
                _remove(path / file)
            for file in tables:
                _remove(path / file)
        except OSError as e:
            raise KnowledgeBaseError(f"{path} cannot be written ({e.strerror}); see to the disk and try again") from e
        return Dropped(found, tuple(s.name for s in lost), sum(s.rows for s in lost))
    finally:
        lock.release()


def _remove(path: Path) -> None:
    """Whatever it is; a link goes, what it leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
