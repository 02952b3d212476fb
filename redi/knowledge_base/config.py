"""What a knowledge base is: `config.json`, written once when it is begun.

What it holds so far is in the manifest.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, final

import torch

from redi.errors import FingerprintMismatchError, InvalidInputError, KnowledgeBaseError
from redi.knowledge_base import files
from redi.knowledge_base.fields import NATURAL, OBJECT, POSITIVE, TEXT, take
from redi.knowledge_base.fingerprint import Fingerprint, differing
from redi.types import Record

SCHEMA: Final = 1
STORAGE: Final[Mapping[str, torch.dtype]] = {
    "float16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}


def versions() -> dict[str, str]:
    """Versions of what a build depends on."""
    found = {"python": platform.python_version()}
    for package in ("redi", "torch", "diffusers", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


@final
@dataclass(frozen=True)
class Config:
    """What a knowledge base was built with, and what each of its rows holds.

    Args:
        fingerprint: the settings that rows depend on.
        record: which parts of a trajectory are kept.
        noise: the noise bank, as its own JSON.
        plans: texts of the plans it was built for.
        storage: dtype on disk: `float16`, `float32` or `bfloat16`.
        created_with: package → version.
        schema: version of the format.

    Raises:
        InvalidInputError: a value that can never work.
    """

    fingerprint: Fingerprint
    record: Record
    noise: Mapping[str, Any]
    plans: tuple[str, ...] = ()
    storage: str = "float16"
    created_with: Mapping[str, str] = field(default_factory=versions)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise", files.decode(files.encode(self.noise, "noise")))
        if self.storage not in STORAGE:
            raise InvalidInputError(f"storage must be one of {', '.join(STORAGE)}, given {self.storage!r}")
        if self.schema != SCHEMA:
            raise InvalidInputError(f"this version of redi writes schema {SCHEMA}, given {self.schema}")
        if not self.record.samples | self.record.denoised:
            raise InvalidInputError(
                "a row must hold at least one sample or denoised prediction, given a record of none"
            )
        if negative := [e for e in frozenset().union(*self.record.entries) if e < 0]:
            raise InvalidInputError(f"recorded entries must be ≥ 0, given {sorted(negative)}")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype on disk."""
        return STORAGE[self.storage]

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "schema": self.schema,
            "fingerprint": self.fingerprint.to_json(),
            "record": {
                "samples": sorted(self.record.samples),
                "denoised": sorted(self.record.denoised),
                "history": sorted(self.record.history),
                # what few rows hold is not said of the others: they are read by older versions
                **({"unconditional": sorted(self.record.unconditional)} if self.record.unconditional else {}),
            },
            "noise": files.encode(self.noise, "noise"),
            "plans": list(self.plans),
            "storage": self.storage,
            "created_with": dict(self.created_with),
        }

    @classmethod
    def from_json(cls, data: Any) -> Config:
        """The inverse of `to_json`.

        Raises:
            KnowledgeBaseError: another schema, or fields missing, unknown or of the wrong type; all are named.
        """
        if isinstance(data, dict) and (schema := data.get("schema")) != SCHEMA:  # pyright: ignore
            raise KnowledgeBaseError(
                f"config: this version of redi reads schema {SCHEMA}, given {schema!r}; "
                "use the version of redi that wrote it, or build it anew"
            )
        given = take(
            data,
            {
                "schema": POSITIVE,
                "fingerprint": OBJECT,
                "record": OBJECT,
                "noise": OBJECT,
                "plans": TEXT.list(),
                "storage": TEXT,
                "created_with": TEXT.mapping(),
            },
            "config",
        )
        entries = NATURAL.list()
        kinds = {"samples": entries, "denoised": entries, "history": entries}
        kinds |= {"unconditional": entries} if "unconditional" in given["record"] else {}
        record = take(given["record"], kinds, "config: record")
        try:
            return cls(
                fingerprint=Fingerprint.from_json(given["fingerprint"]),
                record=Record(**{name: frozenset(value) for name, value in record.items()}),
                noise=files.decode(given["noise"]),
                plans=tuple(given["plans"]),
                storage=given["storage"],
                created_with=given["created_with"],
            )
        except (InvalidInputError, ValueError) as e:
            raise KnowledgeBaseError(f"config: {e}") from e

    @classmethod
    def read(cls, path: Path) -> tuple[Config, str]:
        """The configuration in a file, and the file's sha256.

        Raises:
            KnowledgeBaseError: the file is missing, no plain file, or not a configuration.
        """
        data = files.read_bytes(path)
        try:
            return cls.from_json(files.parse_json(data, path)), files.digest(data)
        except KnowledgeBaseError as e:
            raise e if str(path) in str(e) else KnowledgeBaseError(f"{path}: {e}") from e

    def require(self, given: Config, what_to_do: str, ignoring: Sequence[str] = ()) -> None:
        """Refuse a configuration that differs from this one in anything but the versions that wrote it.

        Args:
            given: the other.
            what_to_do: ends the message.
            ignoring: what else may differ, as in `differing`.

        Raises:
            FingerprintMismatchError: they differ; the fields are listed.
        """
        ours, theirs = self.to_json(), given.to_json()
        found = differing(
            ours.pop("fingerprint") | ours, theirs.pop("fingerprint") | theirs, ("created_with", *ignoring)
        )
        if found:
            raise FingerprintMismatchError(found, what_to_do)

    def joined(self, given: Config, what_to_do: str, ignoring: Sequence[str] = ()) -> Config:
        """This configuration, with the larger of both noise banks: a noise does not depend on how many there are.

        Args:
            given: the other.
            what_to_do: ends the message.
            ignoring: what else may differ.

        Raises:
            FingerprintMismatchError: they differ in more than the size of their noise banks; the fields are listed.
        """
        self.require(given, what_to_do, ("noise.size", *ignoring))
        ours: Any = self.noise.get("size")
        theirs: Any = given.noise.get("size")
        if not (isinstance(ours, int) and isinstance(theirs, int) and theirs > ours):
            return self
        return replace(self, noise={**self.noise, "size": theirs})
