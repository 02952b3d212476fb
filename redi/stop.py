"""Ending long work early and well: a signal is remembered, and the work asks between two of its parts."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, final


@final
class Stop:
    """Whether a signal asked this process to end; as a context it listens, outside it does not.

    A second interrupt (Ctrl-C) does not wait: it raises KeyboardInterrupt.

    Args:
        signals: which to listen for; by default SIGTERM, what batch systems and containers send before they kill.

    Attributes:
        received: the first signal that came, or None.
        passed_on: told each signal that comes, e.g. to send it to child processes.
    """

    def __init__(self, *signals: signal.Signals) -> None:
        self.received: signal.Signals | None = None
        self.passed_on: Callable[[int], None] = lambda number: None
        self._signals = signals or (signal.SIGTERM,)
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Whether one came."""
        return self.received is not None

    def listen(self) -> None:
        """Handle the signals from here on, whoever handled them before. Only a main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                before = signal.signal(number, self._receive)
                self._before.setdefault(number, before)

    def __enter__(self) -> Stop:
        self.listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        self.received = self.received or signal.Signals(number)
        self.passed_on(number)
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
