"""Writing a knowledge base: rows are checked, gathered into shards, and listed once they are on the disk.

A crash at any moment loses at most the shard in flight. Several ranks may write shards; the first of them lists them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import final

import torch
from torch import Tensor

from redi.errors import InvalidInputError, KnowledgeBaseError, ReDiError
from redi.knowledge_base import exchange, files, layout, shards
from redi.knowledge_base.admission import admit
from redi.knowledge_base.card import card
from redi.knowledge_base.config import Config
from redi.knowledge_base.lock import LOCK, RANKS, Lock, RankLock
from redi.knowledge_base.manifest import CONFIG, MANIFEST, SHARDS, Manifest
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
@dataclass(frozen=True, slots=True)
class Ticket:
    """What a further rank needs to write beside the first: see `Writer.join`.

    Args:
        holder: who holds the folder's lock.
        first: the number of the first shard of this build.
        layout: tensor → shape of one row in the shards before; empty if there are none.
    """

    holder: str
    first: int
    layout: Mapping[str, tuple[int, ...]]


@final
class Writer:
    """Appends rows to a knowledge base that nobody else is writing; open it with `Writer.open`, as a context.

    The ranks of one build write together: the first opens, the others `join` it. Each writes whole shards of its own,
    and the first alone lists them.

    Attributes:
        path: the folder.
        config: what the rows are.
        shard_rows: rows of a full shard.
        skipped: rows that were there already and were not written again.
        written: names of the shards that this writer finished.
    """

    def __init__(
        self, path: Path, config: Config, shard_rows: int, lock: Lock | RankLock, rank: int, ranks: int, first: int
    ) -> None:
        self.path, self.config, self.shard_rows, self.skipped = path, config, shard_rows, 0
        self.written: list[str] = []
        self._lock: Lock | RankLock | None = lock
        self._lists, self._step = isinstance(lock, Lock), ranks
        self._first = first
        self._number = first + rank
        self._refused: list[Refusal] = []
        self._pending: dict[str, Tensor] = {}
        self._pending_prompts: list[str] = []
        self._done: set[tuple[str, int]] = set()
        self._known: set[tuple[str, int]] = set()
        self._seen: set[str] = set()
        self._manifest = Manifest("")

    @classmethod
    def open(cls, path: str | Path, config: Config, shard_rows: int = 256, *, ranks: int = 1) -> Writer:
        """Begin a knowledge base, or go on with one of the same configuration but for the size of its noise bank.

        The larger bank stays.

        Shards that an interrupted build finished and did not come to list are checked byte for byte and listed now.

        Args:
            path: its folder, made if need be.
            config: what the rows will be; the versions that wrote an existing one and its number of noises may differ.
            shard_rows: rows of a full shard; what a crash can lose, per rank.
            ranks: how many will write together.

        Raises:
            FingerprintMismatchError: the folder holds a knowledge base of other settings; they are listed.
            KnowledgeBaseError: another process writes it, it is damaged, or the folder holds something else.
        """
        path = Path(path)
        if shard_rows < 1 or ranks < 1:
            raise InvalidInputError(f"shard_rows and ranks must be at least 1, given {shard_rows} and {ranks}")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise KnowledgeBaseError(f"{path} cannot be made a folder ({e.strerror})") from e
        lock = Lock(path)
        try:
            existing, manifest, done = _continue(path, config)
            writer = cls(path, existing, shard_rows, lock, 0, ranks, shards.after(path))
            writer._manifest, writer._done, writer._known = manifest, done, set(done)
            writer._seen = {s.name for s in manifest.shards}
            writer.list_finished(adopting=True)
            with _disk(path):
                shards.sweep(path, writer._manifest)
                writer._grow(config)
            return writer
        except BaseException:
            lock.release()
            raise

    @classmethod
    def join(cls, path: str | Path, config: Config, ticket: Ticket, rank: int, ranks: int, shard_rows: int) -> Writer:
        """Write beside the first rank, who knows what is done and lists what is finished.

        Args:
            path: the same folder.
            config: the same configuration.
            ticket: the first rank's.
            rank: of this writer, 1 … ranks − 1.
            ranks: how many write together.
            shard_rows: as in `open`.

        Raises:
            FingerprintMismatchError: the first rank writes with other settings.
            KnowledgeBaseError: this is not the folder that the first rank writes, or it has ended.
        """
        path = Path(path)
        lock = RankLock(path, ticket.holder)
        try:
            existing, digest = Config.read(path / CONFIG)
            existing.joined(config, "all ranks must run the same model with the same settings")
            writer = cls(path, existing, shard_rows, lock, rank, ranks, ticket.first)
            writer._manifest = Manifest(digest, ticket.layout)
            return writer
        except BaseException:
            lock.release()
            raise

    def ticket(self) -> Ticket:
        """What other ranks need to `join`."""
        return Ticket(self._held().holder, self._first, self._manifest.layout)

    @property
    def done(self) -> frozenset[tuple[str, int]]:
        """(prompt, noise id) of every finished row: on the disk and listed. Only the first rank knows all of them."""
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
            KnowledgeBaseError: the disk refused, or the first rank has ended.
        """
        self._require_open()
        if len(rows) == 0:
            return ()
        stored, reasons = admit(rows, self.path, self.config, self._manifest.layout)
        ids: list[int] = stored[layout.NOISE_ID].tolist()
        kept: list[int] = []
        refused: list[Refusal] = []
        for i, key in enumerate(zip(rows.prompts, ids, strict=True)):
            if i in reasons:
                refused.append(Refusal(*key, reasons[i]))
            elif key in self._known:
                self.skipped += 1
            else:
                self._known.add(key)
                kept.append(i)
        if kept:
            shapes = {name: tuple(tensor.shape[1:]) for name, tensor in stored.items()}
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
        if self._lists and not self._seen.issuperset(self.written):  # the disk refused the last manifest
            self.list_finished(self.written)

    def close(self) -> None:
        """Write every row taken so far and let others write; a second call does nothing."""
        if self._lock is None:
            return
        try:
            self.flush()
        finally:
            self._lock.release()
            self._lock = None

    def require_first(self) -> None:
        """Go on only while the first rank lives: what it does not list is lost time.

        Raises:
            KnowledgeBaseError: it has ended, or this writer is closed.
        """
        self._require_open()
        if isinstance(self._lock, RankLock):
            self._lock.require_holder()

    def list_finished(self, expected: Sequence[str] = (), *, adopting: bool = False) -> None:
        """Put every finished shard into the manifest, whichever rank wrote it: the first rank's task alone.

        No row is listed twice: a shard that repeats rows is written anew without them.

        Args:
            expected: names of shards that ranks say they finished.
            adopting: whether to trust nothing: shards left by an interrupted build are read whole, and those that are
                not what their notes say are left out.

        Raises:
            KnowledgeBaseError: an expected shard is not there or not as it was written, or the disk refused.
        """
        self._held()
        manifest, added, dealt_with = self._manifest, set[tuple[str, int]](), set[str]()
        with _disk(self.path):
            for note in shards.finished(self.path, [n for n in expected if n not in self._seen]):
                (shard,) = note.shards
                if shard.name in self._seen:
                    continue
                found = shards.content(self.path, note, self.config, manifest, hashes=adopting)
                if found is None:
                    continue
                kept = [i for i, key in enumerate(found.keys) if key not in self._done and key not in added]
                self.skipped += shard.rows - len(kept)
                dealt_with.add(shard.name)
                if 0 < len(kept) < shard.rows:
                    note = self._put(*found.only(kept))
                    dealt_with.add(note.shards[0].name)
                if kept:
                    manifest = replace(manifest, layout=note.layout, shards=(*manifest.shards, *note.shards))
                    added |= {found.keys[i] for i in kept}
            if added:
                files.write(self.path / MANIFEST, manifest.to_bytes())
                # from here on the rows are finished, whatever follows
                self._manifest = manifest
                self._done |= added
                self._known |= added
            self._seen |= dealt_with
            for name in dealt_with:
                (self.path / shards.note_file(name)).unlink(missing_ok=True)
            if added:
                files.write(self.path / "README.md", card(self.config, manifest).encode("utf-8"), durable=False)
        if missing := {*expected} - self._seen:
            raise KnowledgeBaseError(
                f"{self.path}: shards {', '.join(sorted(missing))}, which other ranks finished, are not seen here as "
                "they were written; look at the file system, then run the same build again"
            )

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

    def _write(self, count: int) -> None:
        cut = {name: tensor[:count] for name, tensor in self._pending.items()}
        with _disk(self.path):
            note = self._put(cut, self._pending_prompts[:count])
        self.written.append(note.shards[0].name)
        self._pending_prompts = self._pending_prompts[count:]
        rest = {name: tensor[count:] for name, tensor in self._pending.items()}
        self._pending = rest if self._pending_prompts else {}
        if self._lists:
            self.list_finished(self.written)

    def _put(self, tensors: Mapping[str, Tensor], prompts: Sequence[str]) -> Manifest:
        note = shards.write(self.path, self._number, tensors, prompts, self._manifest.config)
        self._number += self._step
        return note

    def _grow(self, asked: Config) -> None:
        """Take a larger noise bank over into the configuration; what is there keeps its noises."""
        larger = self.config.joined(asked, "")
        if larger is not self.config:
            self._manifest = exchange.exchange(self.path, larger, self._manifest)
            self.config = larger

    def _held(self) -> Lock:
        self._require_open()
        if not isinstance(self._lock, Lock):
            raise KnowledgeBaseError(f"{self.path}: only the first rank lists what is finished")
        return self._lock


def _continue(path: Path, config: Config) -> tuple[Config, Manifest, set[tuple[str, int]]]:
    """The configuration and the manifest to go on from and its rows, or new ones on the disk."""
    here = [p.name for p in path.iterdir() if p.name not in (LOCK, RANKS) and not p.name.endswith(files.TEMPORARY)]
    if not here:
        with _disk(path):
            files.write(path / CONFIG, files.dump(config.to_json()))
        here = [CONFIG]
    if CONFIG not in here:
        raise KnowledgeBaseError(
            f"{path} holds {', '.join(sorted(here)[:3])} but no {CONFIG}: not a knowledge base; choose a new folder"
        )
    with _disk(path):
        exchange.settle(path)
    existing, digest = Config.read(path / CONFIG)
    existing.joined(config, f"go on with the same settings, or choose another folder than {path}")
    if MANIFEST not in here:
        if SHARDS in here:
            raise KnowledgeBaseError(f"{path / MANIFEST}: missing, though there are shards; restore it, or begin anew")
        # begun, and interrupted before there was a manifest
        with _disk(path):
            manifest = Manifest(digest)
            files.write(path / "README.md", card(config, manifest).encode("utf-8"))
            files.write(path / MANIFEST, manifest.to_bytes())
        return existing, manifest, set()
    kb = KnowledgeBase.open(path)
    return kb.config, kb.manifest, set(zip(kb.prompts, kb.noise_ids.tolist(), strict=True))


@contextmanager
def _disk(path: Path) -> Generator[None, None, None]:
    try:
        yield
    except OSError as e:
        raise KnowledgeBaseError(
            f"{path} cannot be written ({e.strerror or e}); finished rows are safe: see to the disk and go on"
        ) from e
