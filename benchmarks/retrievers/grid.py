"""Which settings of which retriever are tried on how many keys, written as `redi index --retriever` takes them."""

from __future__ import annotations

import math
import re
from typing import Final

QUICK: Final = ("exact", "faiss:IVF8,SQfp16:nprobe=2,rerank=32", "hnsw:rerank=32", "scann:rerank=32")


def settings(rows: int, dimension: int, *, stream: bool) -> list[str]:
    """The grid for so many keys.

    Args:
        rows: n.
        dimension: d.
        stream: keys never lie together, so only what compresses them can hold them.
    """
    few = max(4, 2 ** round(math.log2(math.sqrt(rows))))  # partitions of an inverted file
    reduced = min(128, dimension // 4)
    compressed = [
        *(f"faiss:PCA{reduced},IVF{few},SQ8:nprobe={probe},rerank={rerank}" for probe, rerank in ((4, 32), (16, 64))),
        f"faiss:PCA{reduced},SQ8:rerank=64",
        f"faiss:IVF{few},RaBitQ:nprobe=16,rerank=64",
    ]
    if stream:
        return compressed
    whole = [
        "exact",
        "faiss:Flat",
        "faiss:SQfp16:rerank=32",
        *(f"faiss:IVF{few},SQfp16:nprobe={probe},rerank=32" for probe in (1, 4, 16)),
        f"faiss:PCA{reduced},Flat:rerank=32",
        *compressed,
    ]
    graphs = [f"hnsw:M=16,ef_search={ef},rerank=32" for ef in (32, 128)]
    trees = ["scann:rerank=32", "scann:rerank=128"]
    # a graph over whole keys of this size is hours of building, and float32 copies of them
    return [*whole, *graphs, *trees] if rows * dimension <= 10_000 * 16_384 else whole


def build_of(setting: str) -> str:
    """The setting without what only searching depends on: settings of which this is equal share an index."""
    return re.sub(r"(?<=[:,])(nprobe|ef_search|leaves_to_search|rerank)=\d+,?", "", setting).rstrip(":,")
