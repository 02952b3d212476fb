"""Who may write a folder: one holder, and the ranks that joined it, by locks that the operating system releases when
their process dies, however it dies.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any, Final, final

from redi.errors import KnowledgeBaseError

LOCK: Final = ".lock"
RANKS: Final = ".ranks"


@final
class Lock:
    """The right to write a folder, held until `release` or the end of the process.

    Args:
        folder: an existing folder.

    Raises:
        KnowledgeBaseError: another writer holds it, or ranks that joined an earlier one still write; the message names
            the process.
    """

    def __init__(self, folder: Path) -> None:
        fcntl = _fcntl()
        self._descriptor: int | None = _open(folder, LOCK)
        try:
            if not _lock(self._descriptor, fcntl.LOCK_EX, folder):
                raise KnowledgeBaseError(
                    f"{folder} is being written by process {_read(self._descriptor) or 'unknown'}; "
                    "wait for it, or end it, or choose another folder"
                )
            ranks = _open(folder, RANKS)
            try:
                if not _lock(ranks, fcntl.LOCK_EX, folder):
                    raise KnowledgeBaseError(
                        f"{folder} is being written by ranks of an earlier build, whose first rank was process "
                        f"{_read(self._descriptor) or 'unknown'}; they end after the batch in hand: wait for them"
                    )
            finally:
                os.close(ranks)
            self.holder = holder()
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{self.holder}\n".encode(), 0)
            os.fsync(self._descriptor)  # ranks on other machines read it
        except BaseException:
            os.close(self._descriptor)
            raise

    def release(self) -> None:
        """Let others write; a second call does nothing."""
        if self._descriptor is not None:
            _unlock(self._descriptor)
            self._descriptor = None


@final
class RankLock:
    """A further rank's share in the right to write: while any lasts nobody new may begin.

    Args:
        folder: the folder that rank 0 has locked.
        of: `Lock.holder` there.

    Raises:
        KnowledgeBaseError: this is not the folder that rank 0 has locked.
    """

    def __init__(self, folder: Path, of: str) -> None:
        self._folder, self._of = folder, of
        try:
            with open(folder / LOCK, encoding="ascii", errors="replace") as file:
                seen = file.read(256).strip()
        except OSError:
            seen = ""
        if seen != of:
            raise KnowledgeBaseError(
                f"{folder} on {socket.gethostname()} is not the folder that rank 0 (process {of}) writes; choose a "
                "folder that all nodes share, or build on each node by itself and join the parts with `redi merge`"
            )
        self._descriptor: int | None = _open(folder, RANKS)
        if not _lock(self._descriptor, _fcntl().LOCK_SH, folder):
            os.close(self._descriptor)
            raise KnowledgeBaseError(f"{folder} is being taken over by another build; end one of them")

    def require_holder(self) -> None:
        """Go on only while rank 0 lives, as far as this machine can tell.

        Raises:
            KnowledgeBaseError: its process has ended.
        """
        if self._of.rpartition(" ")[2] != socket.gethostname():
            return  # not every shared file system shows one machine the locks of another
        descriptor = _open(self._folder, LOCK)
        try:
            if not _lock(descriptor, _fcntl().LOCK_SH, self._folder):
                return
        finally:
            os.close(descriptor)
        raise KnowledgeBaseError(
            f"rank 0 (process {self._of}) has ended before its time; finished rows are safe, the same build goes on"
        )

    def release(self) -> None:
        """Write no more; a second call does nothing."""
        if self._descriptor is not None:
            _unlock(self._descriptor)
            self._descriptor = None


def holder() -> str:
    """How this process names itself in a lock."""
    return f"{os.getpid()} on {socket.gethostname()}"


def _fcntl() -> Any:
    try:
        import fcntl
    except ImportError:  # pragma: no cover
        raise KnowledgeBaseError("writing a knowledge base needs POSIX file locks, which this system lacks") from None
    return fcntl


def _open(folder: Path, name: str) -> int:
    # The file is never removed: a lock on a removed file excludes nobody.
    try:
        return os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as e:
        raise KnowledgeBaseError(f"{folder} cannot be written ({e.strerror})") from e


def _lock(descriptor: int, how: int, folder: Path) -> bool:
    fcntl = _fcntl()
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        raise KnowledgeBaseError(f"{folder} cannot be locked ({e.strerror}); choose another file system") from e
    return True


def _unlock(descriptor: int) -> None:
    fcntl = _fcntl()
    # explicitly: a forked child may still hold a copy of the descriptor
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _read(descriptor: int) -> str:
    return os.pread(descriptor, 256, 0).decode("ascii", "replace").strip()
