"""What can be said of a knowledge base's files, one by one, before their rows are trusted.

Hashes of shards are left to `verification`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final

from redi.errors import KnowledgeBaseError
from redi.knowledge_base import exchange, files, layout
from redi.knowledge_base.config import Config
from redi.knowledge_base.manifest import CONFIG, MANIFEST, SHARDS, Manifest, Shard
from redi.knowledge_base.tensorfile import TensorFile


@final
@dataclass(frozen=True, slots=True)
class Look:
    """What a look at a folder finds without reading rows: config and manifest (None where unreadable), and problems
    as (file, what is wrong with it).
    """

    config: Config | None
    manifest: Manifest | None
    manifest_hash: str
    problems: tuple[tuple[str, str], ...]


def look(path: Path) -> Look:
    """Read config and manifest, and compare every listed file's kind and size.

    Raises:
        KnowledgeBaseError: there is no knowledge base at all.
    """
    if not path.is_dir():
        raise KnowledgeBaseError(f"{path} is not a folder; expected a knowledge base, as `redi build` makes it")
    if not (path / CONFIG).exists() and not (path / MANIFEST).exists():
        raise KnowledgeBaseError(f"{path} is not a knowledge base: it has neither {CONFIG} nor {MANIFEST}")
    problems: list[tuple[str, str]] = []
    config = manifest = None
    config_hash = manifest_hash = ""
    try:
        config, config_hash = Config.read(path / CONFIG)
    except KnowledgeBaseError as e:
        problems.append((CONFIG, without(path / CONFIG, e)))
    try:
        manifest, manifest_hash = Manifest.read(path / MANIFEST)
    except KnowledgeBaseError as e:
        problems.append((MANIFEST, without(path / MANIFEST, e)))
    if config is not None and manifest is not None:
        if manifest.config != config_hash and (fitting := exchange.fitting(path, manifest)) is not None:
            config, config_hash = fitting, manifest.config
        if manifest.config != config_hash:
            problems.append((CONFIG, f"is not the one {MANIFEST} was written with: changed, damaged, or another's"))
        elif manifest.shards:
            problems += [(MANIFEST, w) for w in layout.wrong(manifest.layout, config)]
    if manifest is not None:
        if (path / SHARDS).is_symlink():
            problems.append((SHARDS, "is a link, which may lead anywhere; put the folder itself there"))
        for shard in manifest.shards:
            for file, expected in ((shard.file, shard.bytes), (shard.prompts_file, shard.prompts_bytes)):
                if what := missized(path / file, expected):
                    problems.append((file, what))
    return Look(config, manifest, manifest_hash, tuple(problems))


def without(path: Path, error: KnowledgeBaseError) -> str:
    """An error's message without the file it begins with."""
    return str(error).removeprefix(f"{path}: ")


def missized(path: Path, expected: int) -> str:
    """What is wrong with a file by its size alone, in words, or ""."""
    try:
        given = files.size(path)
    except KnowledgeBaseError as e:
        return without(path, e)
    if given == expected:
        return ""
    return f"{'truncated' if given < expected else 'too long'}: expected {expected} bytes, given {given}"


def read_prompts(path: Path, shard: Shard) -> tuple[str, ...]:
    """The prompts of a shard.

    Raises:
        KnowledgeBaseError: the file is not what the manifest says.
    """
    file = path / shard.prompts_file
    data = files.read_bytes(file)
    if files.digest(data) != shard.prompts_sha256:
        raise KnowledgeBaseError(f"{file}: its sha256 differs from the manifest's: changed or damaged; restore it")
    prompts = files.parse_json(data, file)
    if not isinstance(prompts, list) or not all(isinstance(p, str) for p in cast("list[Any]", prompts)):
        raise KnowledgeBaseError(f"{file}: expected a list of texts")
    if len(cast("list[str]", prompts)) != shard.rows:
        raise KnowledgeBaseError(f"{file}: expected {shard.rows} prompts, given {len(cast('list[str]', prompts))}")
    return tuple(cast("list[str]", prompts))


def checked_shard(path: Path, shard: Shard, manifest: Manifest, config: Config) -> TensorFile:
    """A shard's tensors, if its header is what the manifest and the configuration promise.

    Raises:
        KnowledgeBaseError: it is not.
    """
    file = TensorFile(path / shard.file)
    expected = {name: (layout.dtype(name, config), (shard.rows, *shape)) for name, shape in manifest.layout.items()}
    given = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
    if given != expected:
        names = sorted(n for n in given | expected if given.get(n) != expected.get(n))
        n = names[0]
        raise KnowledgeBaseError(
            f"{file.path}: {', '.join(names)} not as promised: expected {expected.get(n)}, given {given.get(n)}"
        )
    return file
