"""Writing a knowledge base: rows are checked, gathered into shards, and listed once they are on the disk.

A crash at any moment loses at most the shard in flight. What rows are and where they come from is not known here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor

from redi.errors import InvalidInputError, KnowledgeBaseError, ReDiError
from redi.knowledge_base import files, layout, tensorfile
from redi.knowledge_base.card import card
from redi.knowledge_base.config import Config
from redi.knowledge_base.lock import LOCK, Lock
from redi.knowledge_base.manifest import CONFIG, MANIFEST, SHARDS, Manifest, Shard
from redi.knowledge_base.reader import KnowledgeBase
from redi.types import Rows


@final
@dataclass(frozen=True, slots=True)
class Refusal:
    """A row that was not written, and why."""

    prompt: str
    noise_id: int
    reason: str


@final
class Writer:
    """Appends rows to a knowledge base that nobody else is writing; open it with `Writer.open`, as a context.

    Attributes:
        path: the folder.
        config: what the rows are.
        shard_rows: rows of a full shard.
        skipped: rows that were there already and were not written again.
    """

    def __init__(self, path: Path, config: Config, shard_rows: int, lock: Lock) -> None:
        self.path, self.config, self.shard_rows, self.skipped = path, config, shard_rows, 0
        self._lock: Lock | None = lock
        self._refused: list[Refusal] = []
        self._pending: dict[str, Tensor] = {}
        self._pending_prompts: list[str] = []
        self._manifest, self._done = _continue(path, config)
        self._known = set(self._done)

    @classmethod
    def open(cls, path: str | Path, config: Config, shard_rows: int = 256) -> Writer:
        """Begin a knowledge base, or go on with one of the same configuration.

        Args:
            path: its folder, made if need be.
            config: what the rows will be; the versions that wrote an existing one may differ.
            shard_rows: rows of a full shard; what a crash can lose.

        Raises:
            FingerprintMismatchError: the folder holds a knowledge base of other settings; they are listed.
            KnowledgeBaseError: another process writes it, it is damaged, or the folder holds something else.
        """
        path = Path(path)
        if shard_rows < 1:
            raise InvalidInputError(f"shard_rows must be at least 1, given {shard_rows}")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise KnowledgeBaseError(f"{path} cannot be made a folder ({e.strerror})") from e
        lock = Lock(path)
        try:
            return cls(path, config, shard_rows, lock)
        except BaseException:
            lock.release()
            raise

    @property
    def done(self) -> frozenset[tuple[str, int]]:
        """(prompt, noise id) of every finished row: on the disk and listed."""
        return frozenset(self._done)

    @property
    def refused(self) -> tuple[Refusal, ...]:
        """Rows that this writer was given and did not take, with reasons."""
        return tuple(self._refused)

    def append(self, rows: Rows) -> tuple[Refusal, ...]:
        """Take rows; full shards are written at once, the rest by `flush` or `close`.

        Rows whose (prompt, noise id) is there already are skipped and counted. Rows that are not finite, or would not
        be in the storage dtype, are refused.

        Args:
            rows: exactly what the configuration's record names, on any device and of any floating dtype.

        Returns:
            The rows refused this time.

        Raises:
            InvalidInputError: entries or shapes are not those of the configuration; nothing is taken.
            KnowledgeBaseError: the disk refused.
        """
        self._require_open()
        if len(rows) == 0:
            return ()
        given = layout.flatten(rows)
        shapes = self._check(rows, given)
        stored: dict[str, Tensor] = {}
        reasons: dict[int, str] = {}
        for name, tensor in given.items():
            stored[name], broken = _cast(name, tensor, layout.dtype(name, self.config))
            reasons = broken | reasons
        ids: list[int] = given[layout.NOISE_ID].tolist()
        kept: list[int] = []
        refused: list[Refusal] = []
        for i, key in enumerate(zip(rows.prompts, ids, strict=True)):
            if i in reasons or not _is_unicode(key[0]):
                refused.append(Refusal(*key, reasons.get(i, "the prompt is not valid Unicode")))
            elif key in self._known:
                self.skipped += 1
            else:
                self._known.add(key)
                kept.append(i)
        if kept:
            self._manifest = replace(self._manifest, layout=shapes)
            at = torch.tensor(kept)
            taken = {name: tensor[at] for name, tensor in stored.items()}
            before = self._pending
            self._pending = {n: torch.cat([before[n], t]) for n, t in taken.items()} if before else taken
            self._pending_prompts += [rows.prompts[i] for i in kept]
        self._refused += refused
        while len(self._pending_prompts) >= self.shard_rows:
            self._write(self.shard_rows)
        return tuple(refused)

    def flush(self) -> None:
        """Write every row taken so far.

        Raises:
            KnowledgeBaseError: the disk refused; rows already finished are safe.
        """
        self._require_open()
        while self._pending_prompts:
            self._write(min(self.shard_rows, len(self._pending_prompts)))

    def close(self) -> None:
        """Write every row taken so far and let others write; a second call does nothing."""
        if self._lock is None:
            return
        try:
            self.flush()
        finally:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Rows taken before an interruption are as good as any. But the error that is under way comes first.
        with contextlib.nullcontext() if error is None else contextlib.suppress(ReDiError):
            self.close()

    def _require_open(self) -> None:
        if self._lock is None:
            raise KnowledgeBaseError(f"this writer of {self.path} is closed; open another")

    def _check(self, rows: Rows, given: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        n, shapes = len(rows), {name: tuple(tensor.shape[1:]) for name, tensor in given.items()}
        wrong = [
            f"{name} has first dimension {tuple(t.shape)[:1]}, there are {n} prompts"
            for name, t in given.items()
            if tuple(t.shape)[:1] != (n,)
        ]
        wrong += layout.wrong(shapes, self.config)
        if frozenset(rows.history) != self.config.record.history:
            wrong.append(f"history is at entries {sorted(rows.history)}")
        known = self._manifest.layout
        if not wrong and known and shapes != known:
            names = sorted(name for name in {*shapes, *known} if shapes.get(name) != known.get(name))
            wrong.append(f"{', '.join(names)} differ from the rows before: {known}, now {shapes}")
        wrong += [
            f"{name} must be floating, given {t.dtype}"
            for name, t in given.items()
            if name != layout.NOISE_ID and not t.is_floating_point()
        ]
        bank: Any = self.config.noise.get("size")
        ids = rows.noise_ids
        if not wrong and (int(ids.min()) < 0 or (isinstance(bank, int) and int(ids.max()) >= bank)):
            wrong.append(f"noise ids run from {int(ids.min())} to {int(ids.max())}, the bank has 0 … {bank} − 1")
        if wrong:
            r = self.config.record
            raise InvalidInputError(
                f"rows of {self.path} hold samples of shape {self.config.fingerprint.sample_shape} at entries "
                f"{sorted(r.samples)}, denoised at {sorted(r.denoised)}, history at {sorted(r.history)}; "
                f"given: {'; '.join(wrong)}"
            )
        return shapes

    def _write(self, count: int) -> None:
        prompts = self._pending_prompts[:count]
        tensors = {name: tensor[:count] for name, tensor in self._pending.items()}
        number = 1 + max((int(s.name) for s in self._manifest.shards), default=-1)
        shard = Shard(f"{number:05d}", count, 0, "", 0, "")
        text = files.dump(prompts, indent=0)
        with _disk(self.path):
            (self.path / SHARDS).mkdir(exist_ok=True)
            with files.replacing(self.path / shard.file) as temporary:
                with temporary.open("wb") as file:
                    shapes = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
                    for name, entry in tensorfile.begin(file, shapes).items():
                        tensorfile.put(file, entry, 0, tensors[name])
                shard = replace(shard, bytes=files.size(temporary), sha256=files.digest_file(temporary))
            files.write(self.path / shard.prompts_file, text)
            shard = replace(shard, prompts_bytes=len(text), prompts_sha256=files.digest(text))
            manifest = replace(self._manifest, shards=(*self._manifest.shards, shard))
            files.write(self.path / MANIFEST, manifest.to_bytes())
        # from here on the rows are finished, whatever follows
        self._manifest = manifest
        self._done |= set(zip(prompts, tensors[layout.NOISE_ID].tolist(), strict=True))
        self._pending_prompts = self._pending_prompts[count:]
        self._pending = (
            {name: tensor[count:] for name, tensor in self._pending.items()} if self._pending_prompts else {}
        )
        with _disk(self.path):
            files.write(self.path / "README.md", card(self.config, manifest).encode("utf-8"), durable=False)


def _continue(path: Path, config: Config) -> tuple[Manifest, set[tuple[str, int]]]:
    """The manifest to go on from and its rows, or a new one on the disk."""
    here = [p.name for p in path.iterdir() if p.name != LOCK and not p.name.endswith(files.TEMPORARY)]
    if not here:
        with _disk(path):
            files.write(path / CONFIG, files.dump(config.to_json()))
        here = [CONFIG]
    if CONFIG not in here:
        raise KnowledgeBaseError(
            f"{path} holds {', '.join(sorted(here)[:3])} but no {CONFIG}: not a knowledge base; choose a new folder"
        )
    existing, digest = Config.read(path / CONFIG)
    existing.require(config, f"go on with the same settings, or choose another folder than {path}")
    if MANIFEST not in here:
        if SHARDS in here:
            raise KnowledgeBaseError(f"{path / MANIFEST}: missing, though there are shards; restore it, or begin anew")
        # begun, and interrupted before there was a manifest
        with _disk(path):
            manifest = Manifest(digest)
            files.write(path / "README.md", card(config, manifest).encode("utf-8"))
            files.write(path / MANIFEST, manifest.to_bytes())
        return manifest, set()
    kb = KnowledgeBase.open(path)
    with _disk(path):
        for leftover in [*path.glob(f"*{files.TEMPORARY}"), *(path / SHARDS).glob(f"*{files.TEMPORARY}")]:
            leftover.unlink()
    return kb.manifest, set(zip(kb.prompts, kb.noise_ids.tolist(), strict=True))


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, dict[int, str]]:
    """A copy in host memory as it will be stored, and row → reason for each row that cannot be."""
    source = tensor.detach()
    # a copy always: the caller may reuse its buffers before the shard is full
    stored = source.to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
    broken: dict[int, str] = {}
    for i in _rows_not_finite(stored):
        row = source[i].double()
        if bool(torch.isfinite(row).all()):
            broken[i] = f"{name} reaches {float(row.abs().max()):.3g}, beyond {dtype}; store it as float32 or bfloat16"
        else:
            broken[i] = f"{name} is not finite"
    return stored, broken


def _rows_not_finite(tensor: Tensor) -> Sequence[int]:
    finite = torch.isfinite(tensor).reshape(len(tensor), -1).all(1)
    return (~finite).nonzero().flatten().tolist()


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _disk(path: Path) -> Generator[None, None, None]:
    try:
        yield
    except OSError as e:
        raise KnowledgeBaseError(
            f"{path} cannot be written ({e.strerror or e}); finished rows are safe: see to the disk and go on"
        ) from e
