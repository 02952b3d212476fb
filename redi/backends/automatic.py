"""Which retriever suits how many keys, by measurement: see docs/choosing-a-retriever.md."""

from __future__ import annotations

from typing import Final

from redi.backends.base import Retriever
from redi.backends.exact import Exact
from redi.backends.faiss import Faiss
from redi.errors import MissingExtraError

EXACT_UP_TO: Final = 1 << 28  # n·d that one core reads in about a tenth of a second: 16,384 latents of Stable Diffusion
_DIRECTIONS: Final = 128  # principal ones of the keys, in which candidates are looked for
_CANDIDATES: Final = 64


def automatic(shape: tuple[int, int]) -> Retriever:
    """The retriever for n keys of dimension d when nobody names one.

    `Exact` as long as one query costs no more than about 0.1 s. Beyond, and where faiss is installed, candidates from
    the keys' principal directions, re-ranked by the keys themselves: measured, not promised, to find all neighbours.

    Args:
        shape: n and d.
    """
    n, d = shape
    if n * d <= EXACT_UP_TO or d < 4 * _DIRECTIONS:
        return Exact()
    try:
        return Faiss(f"PCA{_DIRECTIONS},Flat", rerank=_CANDIDATES)
    except MissingExtraError:
        return Exact()
