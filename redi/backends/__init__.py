"""Retrieval: recipes (`Retriever`) and what they build (`Index`). Nothing here knows of diffusion."""

from __future__ import annotations

from redi.backends.base import Retriever
from redi.backends.exact import Exact
from redi.backends.faiss import Faiss
from redi.backends.hnsw import Hnsw
from redi.backends.index import Index
from redi.backends.keys import Keys, Stored
from redi.backends.scann import Scann

__all__ = ["Exact", "Faiss", "Hnsw", "Index", "Keys", "Retriever", "Scann", "Stored"]
