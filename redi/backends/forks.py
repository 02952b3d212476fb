"""Threads in a forked child: OpenMP's pool does not survive a fork, and waiting for it never ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

import torch

_PROCESS: Final = os.getpid()  # which a forked child inherits and a spawned one does not


@contextmanager
def fork_safe() -> Generator[None]:
    """In a forked child torch and faiss compute on the calling thread alone; elsewhere nothing changes.

    libgomp's pool belongs to the thread that made it. After a fork that thread lives on without the pool's other
    threads, and the next parallel region waits for them for ever; a region of one thread needs none of them.
    """
    if os.getpid() == _PROCESS:
        yield
        return
    faiss: Any = sys.modules.get("faiss")
    before = torch.get_num_threads(), faiss and faiss.omp_get_max_threads()
    torch.set_num_threads(1)
    if faiss:
        faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        if faiss:
            faiss.omp_set_num_threads(before[1])
