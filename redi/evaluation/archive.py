"""Finished batches on the disk, so that the same evaluation goes on where it was ended. Files only, nothing pickled.

A batch is found again by what it depends on, so another evaluation in the same folder never meets it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from redi.errors import KnowledgeBaseError
from redi.evaluation.contest import Batch, Contest
from redi.evaluation.seen import Seen
from redi.knowledge_base import files

_PARTS: Final = ("measures", "features", "seconds")


@final
class Archive:
    """A contest's batches in a folder.

    Args:
        folder: of the evaluation's results; batches lie in `batches` in it.
        contest: what they are of.
    """

    def __init__(self, folder: str | Path, contest: Contest) -> None:
        self._ways = len(contest.ways)
        self._identity = contest.identity
        self.folder = Path(folder) / "batches" / _digest(self._identity)

    def find(self, batch: Batch) -> list[Seen] | None:
        """What was seen of a batch, if it is there and whole."""
        try:
            kept = load_file(self._path(batch))
            found = [Seen(**{part: kept[f"{i}.{part}"] for part in _PARTS}) for i in range(self._ways)]
        except (OSError, SafetensorError, KeyError):  # what cannot be read is seen again
            return None
        return found if all(len(s.measures) == len(batch.items) for s in found) else None

    def keep(self, batch: Batch, seen: Sequence[Seen]) -> None:
        """Write what was seen of a batch, whole or not at all.

        Raises:
            KnowledgeBaseError: the disk refused.
        """
        tensors: dict[str, torch.Tensor] = {
            f"{i}.{part}": getattr(s, part).contiguous() for i, s in enumerate(seen) for part in _PARTS
        }
        path = self._path(batch)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not (about := path.parent / "about.json").exists():
                files.write(about, files.dump(files.encode(self._identity, "evaluation")), shared=True)
            files.write(path, save(tensors), shared=True)
        except OSError as e:
            raise KnowledgeBaseError(
                f"{path} cannot be written ({e.strerror}); finished batches are safe, the same command goes on"
            ) from e

    def _path(self, batch: Batch) -> Path:
        return self.folder / f"{_digest([list(item) for item in batch.items])}.safetensors"


def _digest(value: Any) -> str:
    return files.digest(files.dump(files.encode(value, "evaluation"), indent=None))[:16]
