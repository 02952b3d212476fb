"""What a knowledge base holds so far: the ordered shards, written last and replaced whole.

A shard that the manifest does not list does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, final

from redi.errors import KnowledgeBaseError
from redi.knowledge_base import files
from redi.knowledge_base.config import SCHEMA
from redi.knowledge_base.fields import HASH, NATURAL, OBJECT, POSITIVE, TEXT, take

CONFIG: Final = "config.json"
MANIFEST: Final = "manifest.json"
SHARDS: Final = "shards"
_NAME: Final = re.compile(r"[0-9]{5,9}", re.ASCII)


@final
@dataclass(frozen=True, slots=True)
class Shard:
    """One shard: its number as text, its rows, and its two files' sizes and hashes."""

    name: str
    rows: int
    bytes: int
    sha256: str
    prompts_bytes: int
    prompts_sha256: str

    @property
    def file(self) -> str:
        """The tensors, relative to the knowledge base."""
        return f"{SHARDS}/{self.name}.safetensors"

    @property
    def prompts_file(self) -> str:
        """The prompts, relative to the knowledge base."""
        return f"{SHARDS}/{self.name}.prompts.json"

    @classmethod
    def from_json(cls, data: Any) -> Shard:
        """One element of the manifest's list.

        Raises:
            KnowledgeBaseError: a field is missing, unknown or mistyped, or the name is no shard's.
        """
        given = take(
            data,
            {
                "name": TEXT,
                "rows": POSITIVE,
                "bytes": POSITIVE,
                "sha256": HASH,
                "prompts_bytes": POSITIVE,
                "prompts_sha256": HASH,
            },
            "shard",
        )
        # a name is a path in waiting: only digits ever become one
        if not _NAME.fullmatch(given["name"]):
            raise KnowledgeBaseError(f"shard: a name is 5 to 9 digits, given {given['name'][:80]!r}")
        return cls(**given)


@final
@dataclass(frozen=True)
class Manifest:
    """The finished shards.

    Args:
        config: sha256 of `config.json`.
        layout: tensor → shape of one row, the same in every shard; empty while there is none.
        shards: in the order of their rows.
    """

    config: str
    layout: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    shards: tuple[Shard, ...] = ()

    @property
    def rows(self) -> int:
        """Finished rows."""
        return sum(s.rows for s in self.shards)

    def to_bytes(self) -> bytes:
        """The content of `manifest.json`, with a checksum of itself."""
        body: dict[str, Any] = {
            "schema": SCHEMA,
            "config": self.config,
            "layout": {name: list(shape) for name, shape in self.layout.items()},
            "shards": [asdict(s) for s in self.shards],
        }
        body["checksum"] = _checksum(body)
        # one field or shard a line: people can read it, and the fast encoder still writes it
        lines = [f"{_compact(name)}: {_compact(body[name])}" for name in body if name != "shards"]
        shards = ",\n".join(map(_compact, body["shards"]))
        return ("{\n" + ",\n".join(lines) + f',\n"shards": [\n{shards}\n]\n}}\n').encode("utf-8")

    @classmethod
    def read(cls, path: Path) -> tuple[Manifest, str]:
        """The manifest in a file, and the file's sha256.

        Raises:
            KnowledgeBaseError: the file is missing, no plain file, damaged, or names files it must not.
        """
        data = files.read_bytes(path)
        value = files.parse_json(data, path)
        try:
            return cls._from_json(value), files.digest(data)
        except KnowledgeBaseError as e:
            raise KnowledgeBaseError(f"{path}: {e}") from e

    @classmethod
    def _from_json(cls, data: Any) -> Manifest:
        given = take(
            data,
            {
                "schema": POSITIVE,
                "config": HASH,
                "layout": NATURAL.list().mapping(),
                "shards": OBJECT.list(),
                "checksum": HASH,
            },
            "manifest",
        )
        if given["schema"] != SCHEMA:
            raise KnowledgeBaseError(f"manifest: this version of redi reads schema {SCHEMA}, given {given['schema']}")
        body = {name: value for name, value in given.items() if name != "checksum"}
        shards = tuple(Shard.from_json(s) for s in given["shards"])
        if len({s.name for s in shards}) < len(shards):
            raise KnowledgeBaseError("manifest: a shard is listed twice")
        if _checksum(body) != given["checksum"]:
            raise KnowledgeBaseError("manifest: its checksum differs: the file was changed or damaged")
        layout = {name: tuple(shape) for name, shape in given["layout"].items()}
        return cls(given["config"], layout, shards)


def _checksum(body: Mapping[str, Any]) -> str:
    return files.digest(files.dump(body, indent=None))


def _compact(value: Any) -> str:
    return files.dump(value, indent=None).decode("utf-8").strip()
