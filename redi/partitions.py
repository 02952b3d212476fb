"""The rows of one noise, made searchable: an index found beside the derived table, or built and kept there.

An index is bound to its table, and so to the manifest: one of other rows is built again, never used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor

from redi.backends import Index, Retriever, Stored
from redi.backends.automatic import automatic
from redi.errors import KnowledgeBaseError, ReDiError
from redi.knowledge_base import Derived, files
from redi.knowledge_base.derived import FOLDER

INDEXES: Final = "indexes"
RECIPE: Final = "retriever.json"
_CHUNK: Final = 4096  # rows gathered in one go


@final
@dataclass(frozen=True)
class Partition:
    """The rows of one bank noise: their global ids and an index over their keys."""

    ids: Int64[Tensor, " p"]
    index: Index


@final
@dataclass(frozen=True)
class PartitionKeys:
    """Keys of some rows of a table, which stay on the disk until they are asked for.

    Args:
        table: keys of all rows, a view of a file.
        ids: the rows of this partition, ascending.
    """

    table: Float[Tensor, "n d"]
    ids: Int64[Tensor, " p"]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and their dimension."""
        return len(self.ids), self.table.shape[1]

    def __getitem__(self, ids: Int64[ndarray, " m"], /) -> Float[ndarray, "m d"]:
        """Keys by their number within the partition."""
        return self.table[self.ids[torch.from_numpy(ids)]].numpy()

    def chunks(self) -> Iterator[Float[ndarray, "m d"]]:
        """All keys in order; as they lie where they lie together, and so no copy."""
        whole = self.stored()
        if isinstance(whole, ndarray):
            yield whole
            return
        for ids in self.ids.split(_CHUNK):
            yield self.table[ids].numpy()

    def stored(self) -> Stored:
        """The very array where the keys lie together, which some indexes search as it lies; else these."""
        first, last = int(self.ids[0]), int(self.ids[-1])
        return self.table[first : last + 1].numpy() if last - first + 1 == len(self.ids) else self


def open_partition(
    derived: Derived, key: str, noise_id: int, ids: Int64[Tensor, " p"], retriever: Retriever | None
) -> Partition:
    """The rows of a noise and their index.

    Args:
        derived: the table.
        key: name of the tensor (n, d) that holds the keys.
        noise_id: whose rows these are.
        ids: the rows, ascending.
        retriever: builds the index where there is none; None is what suits the number of rows.
    """
    keys = PartitionKeys(derived[key], ids)
    retriever = retriever or automatic(keys.shape)
    place = _place(derived, key, noise_id, retriever)
    if place is not None:
        with contextlib.suppress(KnowledgeBaseError):  # whatever is wrong with it, it can be built again
            return Partition(ids, retriever.load(place, bound_to=_name(place), keys=keys.stored()))
    index = retriever.build_from(keys.chunks, keys.shape, keys=keys.stored())
    if place is not None:
        # neither a disk that takes no index, nor another process that writes the same one, keeps anybody from searching
        with contextlib.suppress(OSError, ReDiError):
            shutil.rmtree(place, ignore_errors=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            files.write(place.parent / RECIPE, files.dump({"retriever": repr(retriever)}))
            index.save(place, bound_to=_name(place), with_keys=False)
    return Partition(ids, index)


def indexes(path: Path) -> list[dict[str, Any]]:
    """The indexes kept in a knowledge base's folder: table, retriever, partitions and bytes of each."""
    found: list[dict[str, Any]] = []
    for recipe in sorted((path / FOLDER).glob(f"*/{INDEXES}/*/{RECIPE}")):
        with contextlib.suppress(KnowledgeBaseError, KeyError, TypeError):
            said: Any = files.read_json(recipe)
            parts = [p for p in recipe.parent.iterdir() if p.is_dir() and not p.name.startswith(".")]
            found.append(
                {
                    "table": recipe.parents[2].name,
                    "retriever": str(said["retriever"]),
                    "partitions": len(parts),
                    "bytes": sum(f.stat().st_size for p in parts for f in p.iterdir()),
                }
            )
    return found


def _place(derived: Derived, key: str, noise_id: int, retriever: Retriever) -> Path | None:
    """Where an index lies; None where nothing can be written, or where the recipe does not say all it is."""
    if derived.path is None or not dataclasses.is_dataclass(retriever):
        return None
    recipe = files.digest(files.dump({"retriever": repr(retriever)}))[:32]
    return derived.path / INDEXES / recipe / f"{key}-{noise_id}"


def _name(place: Path) -> str:
    """What an index is bound to: the table (and so the manifest), the recipe, and the partition whose rows it holds."""
    return "/".join((place.parents[2].name, place.parents[0].name, place.name))
