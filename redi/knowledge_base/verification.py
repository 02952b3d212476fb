"""Reading every byte of a knowledge base and saying which files are not what they were."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from redi.errors import KnowledgeBaseError
from redi.knowledge_base import derived, files, layout
from redi.knowledge_base.config import Config
from redi.knowledge_base.inspection import checked_shard, look, read_prompts, without
from redi.knowledge_base.manifest import SHARDS, Manifest, Shard


@final
@dataclass(frozen=True, slots=True)
class Problem:
    """A damaged file, relative to the knowledge base, and what is wrong with it."""

    file: str
    what: str


@final
@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What verifying found.

    Args:
        path: the knowledge base.
        rows: finished rows, by the manifest.
        bytes: bytes of shards that were read.
        problems: every damaged file.
        ignored: files among the shards that the manifest does not list, left by an interrupted build.
    """

    path: Path
    rows: int
    bytes: int
    problems: tuple[Problem, ...]
    ignored: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "path": str(self.path),
            "ok": self.ok,
            "rows": self.rows,
            "bytes": self.bytes,
            "problems": [{"file": p.file, "what": p.what} for p in self.problems],
            "ignored": list(self.ignored),
        }


def verify(path: str | Path, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Check a knowledge base thoroughly, also one that cannot be opened.

    Every listed file must be a plain file of its stated size and sha256; shards must hold exactly the tensors the
    configuration promises, all finite, noise ids from the bank, and as many prompts as rows, no (prompt, noise id)
    twice. Derived tables of the current manifest are checked too.

    Args:
        path: its folder.
        progress: told (bytes done, bytes in all) after each file.

    Raises:
        KnowledgeBaseError: the folder holds no knowledge base at all.
    """
    path = Path(path)
    seen = look(path)
    problems = [Problem(*p) for p in seen.problems]
    config, manifest = seen.config, seen.manifest
    if manifest is None:
        return VerifyReport(path, 0, 0, tuple(problems), ())
    total, done = sum(s.bytes + s.prompts_bytes for s in manifest.shards), 0
    known: set[tuple[str, int]] = set()
    wrong = {p.file for p in problems}
    for shard in manifest.shards:
        problems += _shard(path, shard, manifest, config, wrong, known)
        done += shard.bytes + shard.prompts_bytes
        if progress is not None:
            progress(done, total)
    problems += [Problem(file, what) for file, what in derived.damaged(path, seen.manifest_hash)]
    listed = {f for s in manifest.shards for f in (s.file, s.prompts_file)}
    there = (f"{SHARDS}/{p.name}" for p in (path / SHARDS).iterdir()) if (path / SHARDS).is_dir() else ()
    return VerifyReport(path, manifest.rows, done, tuple(problems), tuple(sorted(set(there) - listed)))


def _shard(
    path: Path,
    shard: Shard,
    manifest: Manifest,
    config: Config | None,
    wrong: Collection[str],
    known: set[tuple[str, int]],
) -> list[Problem]:
    """At most one problem for each of a shard's two files: the first one found is what the others come from."""
    problems: list[Problem] = []
    prompts: tuple[str, ...] = ()
    try:
        prompts = () if shard.prompts_file in wrong else read_prompts(path, shard)
    except KnowledgeBaseError as e:
        problems.append(Problem(shard.prompts_file, without(path / shard.prompts_file, e)))
    if shard.file in wrong:
        return problems
    try:
        if files.digest_file(path / shard.file) != shard.sha256:
            raise KnowledgeBaseError("its sha256 differs from the manifest's: changed or damaged; restore it")
        if config is not None:
            tensors = checked_shard(path, shard, manifest, config).tensors
            if broken := [name for name, t in tensors.items() if not bool(torch.isfinite(t).all())]:
                raise KnowledgeBaseError(f"{', '.join(broken)} not finite")
            ids = tensors[layout.NOISE_ID]
            bank: Any = config.noise.get("size")
            if int(ids.min()) < 0 or (isinstance(bank, int) and int(ids.max()) >= bank):
                raise KnowledgeBaseError(f"noise ids {int(ids.min())} … {int(ids.max())} are not of a bank of {bank}")
            for key in zip(prompts, ids.tolist(), strict=False):
                if key in known:
                    raise KnowledgeBaseError(f"prompt {key[0]!r} with noise {key[1]} occurs twice")
                known.add(key)
    except KnowledgeBaseError as e:
        problems.append(Problem(shard.file, without(path / shard.file, e)))
    return problems
