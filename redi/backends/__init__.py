"""Retrieval: recipes (`Retriever`) and what they build (`Index`). Nothing here knows of diffusion."""

from __future__ import annotations

from redi.backends.base import Retriever
from redi.backends.exact import Exact
from redi.backends.index import Index
from redi.backends.keys import Keys, Stored

__all__ = ["Exact", "Index", "Keys", "Retriever", "Stored"]
