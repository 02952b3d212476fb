"""Retrieval: recipes (`Retriever`) and what they build (`Index`). Nothing here knows of diffusion."""

from __future__ import annotations

from redi.backends.base import Index, Retriever
from redi.backends.exact import Exact

__all__ = ["Exact", "Index", "Retriever"]
