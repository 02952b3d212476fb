"""Which retriever suits how many keys, by measurement: see docs/choosing-a-retriever.md."""

from __future__ import annotations

from redi.backends.base import Retriever
from redi.backends.exact import Exact


def automatic(shape: tuple[int, int]) -> Retriever:
    """The retriever for n keys of dimension d when nobody names one.

    Args:
        shape: n and d.
    """
    return Exact()
