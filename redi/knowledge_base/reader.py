"""Reading a knowledge base: opened in milliseconds, its rows memory-mapped and gathered by id.

The trajectories are the truth; what serves a plan is derived from them (see `derived`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from redi.errors import InvalidInputError, KnowledgeBaseError
from redi.knowledge_base import derived, layout
from redi.knowledge_base.config import Config
from redi.knowledge_base.derived import Derived
from redi.knowledge_base.fingerprint import Fingerprint
from redi.knowledge_base.inspection import checked_shard, look, read_prompts
from redi.knowledge_base.manifest import Manifest, Shard
from redi.knowledge_base.tensorfile import TensorFile, raw
from redi.types import Record, Rows

if TYPE_CHECKING:
    from redi.knowledge_base.verification import VerifyReport
    from redi.noise import NoiseBank


@final
@dataclass(frozen=True, eq=False)
class KnowledgeBase:
    """A knowledge base as it was when it was opened; open it with `KnowledgeBase.open`.

    Args:
        path: its folder.
        config: what it was built with and what its rows hold.
        manifest: its finished shards.
        manifest_hash: sha256 of `manifest.json`; everything derived is bound to it.
    """

    path: Path
    config: Config
    manifest: Manifest
    manifest_hash: str

    @classmethod
    def open(cls, path: str | Path) -> KnowledgeBase:
        """Read the configuration and the manifest, and look that every listed file is there in its full size.

        No row is read, and no hash computed: `verify` does that.

        Raises:
            KnowledgeBaseError: the folder holds no knowledge base, or files are missing, truncated, foreign, links or
                unreadable; all of them are named.
        """
        path = Path(path)
        seen = look(path)
        if seen.problems or seen.config is None or seen.manifest is None:
            lines = "\n".join(f"  {file}: {what}" for file, what in seen.problems)
            shards = all(file.startswith("shards/") for file, _ in seen.problems)
            instead = (
                f"; or take out these shards alone with redi verify {path} --drop, and build on"
                if shards
                else ", or build it anew"
            )
            raise KnowledgeBaseError(f"{path} is damaged:\n{lines}\nrestore these files{instead}")
        return cls(path, seen.config, seen.manifest, seen.manifest_hash)

    def __len__(self) -> int:
        return self.manifest.rows

    def __repr__(self) -> str:
        return f"KnowledgeBase({str(self.path)!r}, {len(self)} rows of {self.fingerprint.model!r})"

    @property
    def fingerprint(self) -> Fingerprint:
        """The settings its rows depend on."""
        return self.config.fingerprint

    @property
    def record(self) -> Record:
        """Which parts of a trajectory its rows hold."""
        return self.config.record

    @cached_property
    def bank(self) -> NoiseBank:
        """The starting noises its rows began from."""
        from redi.noise import NoiseBank

        return NoiseBank.from_json(self.config.noise)

    @cached_property
    def noise_ids(self) -> Int64[Tensor, " n"]:
        """Which bank noise each row began from."""
        ids = [self._tensors(i).tensors[layout.NOISE_ID] for i in range(len(self._shards))]
        return torch.cat(ids) if ids else torch.empty(0, dtype=torch.int64)

    @cached_property
    def prompts(self) -> Sequence[str]:
        """The prompt of each row."""
        return tuple(p for i in range(len(self._shards)) for p in self._prompts(i))

    def chunks(self, rows: int = 256) -> Iterator[Rows]:
        """All rows in order, `rows` at a time (the last chunk may be smaller), in the storage dtype.

        Within one shard a chunk is a view of the file: entries that are not looked at are not read.

        Raises:
            KnowledgeBaseError: there are no rows, or a shard is damaged.
        """
        self._require_rows()
        if rows < 1:
            raise InvalidInputError(f"rows of a chunk must be at least 1, given {rows}")
        parts: list[Rows] = []
        have = 0
        for i, shard in enumerate(self._shards):
            # mapped afresh, so that nothing written into a chunk is seen by later readers
            tensors, prompts, at = checked_shard(self.path, shard, self.manifest, self.config), self._prompts(i), 0
            while at < shard.rows:
                take = min(rows - have, shard.rows - at)
                cut = {name: t[at : at + take] for name, t in tensors.tensors.items()}
                parts.append(layout.assemble(cut, prompts[at : at + take], self.record))
                at, have = at + take, have + take
                if have == rows:
                    yield self._join(parts)
                    parts, have = [], 0
        if parts:
            yield self._join(parts)

    def gather(self, ids: Int64[Tensor, " n"]) -> Rows:
        """Copies of the rows of these ids, in their order, in the storage dtype.

        Raises:
            InvalidInputError: an id is out of range.
            KnowledgeBaseError: there are no rows, or a shard is damaged.
        """
        self._require_rows()
        derived.check_ids(ids, len(self))
        order = ids.cpu().numpy()
        out = {
            name: torch.empty((len(order), *shape), dtype=layout.dtype(name, self.config))
            for name, shape in self.manifest.layout.items()
        }
        targets = {name: raw(tensor) for name, tensor in out.items()}
        prompts = [""] * len(order)
        wanted: dict[int, list[int]] = {}
        for position, shard in enumerate(np.searchsorted(self._ends, order, side="right").tolist()):
            wanted.setdefault(shard, []).append(position)
        for i, positions in wanted.items():
            first, file, texts = self._ends[i] - self._shards[i].rows, self._tensors(i), self._prompts(i)
            local: list[int] = (order[positions] - first).tolist()
            for name, target in out.items():
                file.copy(name, local, target, targets[name], positions)
            for position, row in zip(positions, local, strict=True):
                prompts[position] = texts[row]
        return layout.assemble(out, prompts, self.record)

    def derive(
        self, recipe: Mapping[str, Any], compute: Callable[[Rows], Mapping[str, Tensor]], chunk_rows: int = 256
    ) -> Derived:
        """Tensors computed from all rows, found on the disk if they were computed before.

        Args:
            recipe: JSON that names everything `compute` depends on; with the manifest it identifies the result.
            compute: from some rows to tensors whose first dimension is those rows.
            chunk_rows: rows computed at a time.

        Raises:
            InvalidInputError: `compute` returned other than finite tensors of consistent shapes; rows are named.
            KnowledgeBaseError: there are no rows, a shard is damaged, or the disk refused.
        """
        self._require_rows()
        source = derived.Source(self.path, self.manifest_hash, len(self), lambda: self.chunks(chunk_rows))
        return derived.derive(source, recipe, compute)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
        """Read every byte and check it; see `redi.knowledge_base.verify`, which also takes what cannot be opened."""
        from redi.knowledge_base.verification import verify

        return verify(self.path, progress)

    def info(self) -> dict[str, Any]:
        """What it holds, as JSON."""
        ids, counts = self.noise_ids.unique(return_counts=True)
        f = self.fingerprint
        return {
            "path": str(self.path),
            "rows": len(self),
            "shards": len(self._shards),
            "rows_per_noise": {str(i): n for i, n in zip(ids.tolist(), counts.tolist(), strict=True)},
            "prompts": len(set(self.prompts)),
            "entries": self.config.to_json()["record"],
            "plans": list(self.config.plans),
            "noise": self.config.to_json()["noise"],
            "storage": self.config.storage,
            "bytes": sum(s.bytes + s.prompts_bytes for s in self._shards),
            "bytes_derived": sum(p.stat().st_size for p in (self.path / derived.FOLDER).rglob("*") if p.is_file()),
            "fingerprint": f.to_json(),
            "summary": f"{f.model}, {f.scheduler} {f.steps} steps, guidance {f.guidance:g}, "
            f"samples {'×'.join(map(str, f.sample_shape))}",
            "derived": derived.listing(self.path, self.manifest_hash),
            "created_with": dict(self.config.created_with),
            "manifest_hash": self.manifest_hash,
        }

    @property
    def _shards(self) -> tuple[Shard, ...]:
        return self.manifest.shards

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([s.rows for s in self._shards])

    @cached_property
    def _open(self) -> dict[int, TensorFile]:
        return {}

    @cached_property
    def _read(self) -> dict[int, tuple[str, ...]]:
        return {}

    def _tensors(self, i: int) -> TensorFile:
        if i not in self._open:
            self._open[i] = checked_shard(self.path, self._shards[i], self.manifest, self.config)
        return self._open[i]

    def _prompts(self, i: int) -> tuple[str, ...]:
        if i not in self._read:
            self._read[i] = read_prompts(self.path, self._shards[i])
        return self._read[i]

    def _join(self, parts: Sequence[Rows]) -> Rows:
        if len(parts) == 1:
            return parts[0]
        flat = [layout.flatten(p) for p in parts]
        tensors = {name: torch.cat([f[name] for f in flat]) for name in flat[0]}
        return layout.assemble(tensors, [p for part in parts for p in part.prompts], self.record)

    def _require_rows(self) -> None:
        if not len(self):
            raise KnowledgeBaseError(f"{self.path} has no finished rows yet; go on with `redi build`")
