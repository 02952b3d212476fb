"""A signal asks; the work decides when. A second interrupt does not wait."""

from __future__ import annotations

import signal
import threading

import pytest

from redi.stop import Stop


def test_a_signal_is_remembered_and_passed_on() -> None:
    before, heard = signal.getsignal(signal.SIGTERM), list[int]()
    with Stop() as stop:
        stop.passed_on = heard.append
        assert not stop()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop()
    assert stop.received == signal.SIGTERM
    assert heard == [signal.SIGTERM, signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_interrupt_does_not_wait() -> None:
    with Stop(signal.SIGTERM, signal.SIGINT) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_it_listens_again_where_another_took_its_place() -> None:
    with Stop() as stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop.listen()
        signal.raise_signal(signal.SIGTERM)
        assert stop()


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def enter() -> None:
        with Stop():
            assert signal.getsignal(signal.SIGTERM) is before

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
