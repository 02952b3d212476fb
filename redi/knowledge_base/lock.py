"""One writer at a time: a lock that the operating system releases when its holder dies, however it dies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, final

from redi.errors import KnowledgeBaseError

LOCK: Final = ".lock"


@final
class Lock:
    """The right to write a folder, held until `release` or the end of the process.

    Args:
        folder: an existing folder.

    Raises:
        KnowledgeBaseError: another writer holds it; the message names its process.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import fcntl
        except ImportError:  # pragma: no cover
            raise KnowledgeBaseError(
                "writing a knowledge base needs POSIX file locks, which this system lacks"
            ) from None
        # The file is never removed: a lock on a removed file excludes nobody.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._descriptor: int | None = os.open(folder / LOCK, flags, 0o644)
        except OSError as e:
            raise KnowledgeBaseError(f"{folder} cannot be written ({e.strerror})") from e
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 64, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._descriptor)
            raise KnowledgeBaseError(
                f"{folder} is being written by process {holder}; wait for it, or end it, or choose another folder"
            ) from None
        except OSError as e:
            os.close(self._descriptor)
            raise KnowledgeBaseError(f"{folder} cannot be locked ({e.strerror}); choose another file system") from e
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let others write; a second call does nothing."""
        if self._descriptor is not None:
            import fcntl

            # explicitly: a forked child may still hold a copy of the descriptor
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = None
