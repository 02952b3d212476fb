"""What ranks tell each other. An error on one is heard by all, so that none waits for what will not come."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, TypeVar, cast, final

import torch.distributed as dist

from redi.errors import RankError, ReDiError

T = TypeVar("T")
_PATIENCE: Final = timedelta(days=1)  # ranks of a day's work may end hours apart


@final
class Ranks:
    """The processes of one run. Only words are exchanged, and gloo notices at once when a rank is lost.

    Args:
        rank: this one.
        count: all of them; with more than one, torch's process group must be there.
    """

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self._group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE) if count > 1 else None

    def gathered(self, mine: T) -> list[T]:
        """What every rank brought, on every rank, in their order.

        Raises:
            RankError: a rank was lost.
        """
        brought: list[Any] = [mine] * self.count
        if self._group is not None:
            with _noticing():
                dist.all_gather_object(brought, mine, group=self._group)
        return cast("list[T]", brought)

    def of_first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank.

        Raises:
            ReDiError: on rank 0, what `make` raised.
            RankError: on the others, that it did; or a rank was lost.
        """
        made, error = _tried(make) if self.rank == 0 else (None, None)
        told: list[Any] = [made, None if error is None else str(error)]
        if self._group is not None:
            with _noticing():
                dist.broadcast_object_list(told, 0, group=self._group)
        if error is not None:
            raise error
        if told[1] is not None:
            raise RankError(0, told[1])
        return cast(T, told[0])

    def part(self) -> None:
        """Say goodbye: nobody hangs up while another is still listening."""
        self.gathered(None)
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group, self.count = None, 1

    def together(self, do: Callable[[], object]) -> None:
        """Each rank does it, and hears whether all of them could.

        Raises:
            ReDiError: what `do` raised here.
            RankError: it raised elsewhere; or a rank was lost.
        """
        _, error = _tried(do)
        said = self.gathered(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, text in enumerate(said):
            if text is not None:
                raise RankError(rank, text)


def _tried(do: Callable[[], T]) -> tuple[T | None, ReDiError | None]:
    try:
        return do(), None
    except ReDiError as e:
        return None, e


@contextmanager
def _noticing() -> Generator[None]:
    """Says in our words that a connection ended, which torch says in many."""
    try:
        yield
    except RuntimeError as e:
        raise RankError(None, (str(e).splitlines() or ["unknown"])[0]) from e
