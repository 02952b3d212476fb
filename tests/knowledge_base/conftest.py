"""Waiting for the disk thousands of times tests nothing but patience: only the order of things is (`test_writer`)."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest


@pytest.fixture(scope="package", autouse=True)
def _no_waiting() -> Generator[None, None, None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
