"""Every index that faiss can name in a factory string, trained on a sample and filled chunk by chunk.

What faiss answers otherwise than promised (padding, a formula that cancels, settings of the whole process) ends here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, Final, final

import numpy as np
from jaxtyping import Float, Float32, Int64
from numpy import ndarray

from redi.backends.base import Retriever, at_least, optional
from redi.backends.frame import Frame
from redi.backends.index import Index
from redi.backends.keys import Keys, Stored
from redi.errors import InvalidInputError

_ROWS_PER_LIST: Final = 39  # with fewer, faiss itself advises against the list
_LEARN_FROM: Final = 64  # rows per centroid; more hardly move it
_LEAST_SAMPLE: Final = 4096
_AXES_FROM: Final = 1024  # rows to find principal axes from, which costs the cube of their number


@final
@dataclass(frozen=True, eq=False)
class FaissIndex(Index):
    """A faiss index and the frame it sees keys in.

    Args:
        index: of faiss.
        frame: its view.
        alone: entered by every search, where two must not meet.
    """

    index: Any
    frame: Frame
    alone: AbstractContextManager[Any]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of keys and their dimension."""
        return self.index.ntotal, self.index.d

    def _search(self, queries: Float32[ndarray, "b d"], k: int) -> tuple[Int64[ndarray, "b k"], Float[ndarray, "b k"]]:
        seen = self.frame.into(queries)
        with self.alone:
            distances, ids = self.index.search(seen, k, params=_usual(self.index, k))
            for search in _harder(self.index, k) if (ids < 0).any() else ():
                short = (ids < 0).any(axis=1)
                distances[short], ids[short] = search(seen[short])
                if (ids >= 0).all():
                    break
        return ids, self.frame.back(distances)

    def _add(self, keys: Keys) -> FaissIndex:
        faiss = _faiss()
        # clone_index does not know every type, and adding to the clone of a memory map aborts the process
        copy = faiss.deserialize_index(faiss.serialize_index(self._on_cpu))
        for chunk in keys.chunks():
            copy.add(self.frame.into(chunk))
        return FaissIndex(copy if self._on_cpu is self.index else _to_gpu(copy), self.frame, self.alone)

    def _save(self, folder: Path) -> None:
        faiss = _faiss()
        # a file of its own faiss closes without a look at what failed
        with (folder / "index.faiss").open("wb") as file:
            faiss.write_index(self._on_cpu, faiss.PyCallbackIOWriter(file.write))
        self.frame.save(folder)

    @property
    def _on_cpu(self) -> Any:
        faiss = _faiss()
        on_gpu = hasattr(faiss, "GpuIndex") and isinstance(self.index, faiss.GpuIndex)
        return faiss.index_gpu_to_cpu(self.index) if on_gpu else self.index


@final
@dataclass(frozen=True, slots=True)
class Faiss(Retriever):
    """Whatever a faiss index factory can make, by squared L2.

    Distances are faiss's own, of the codes it keeps, unless re-ranked. `Flat` on a CPU keeps the keys themselves and is
    right to within float32 whatever the batch: it is never let near the formula that loses tight clusters. An inverted
    file (`IVF1024`) gets fewer lists than it asks for where it would have fewer than 39 keys for each. A search that
    finds fewer keys than asked for looks into more lists, or more of the graph, until it has them.

    Args:
        factory: as `faiss.index_factory` takes it: Flat, SQfp16, IVF256,SQ8, HNSW32, OPQ64,IVF256,PQ64x4fs, RaBitQ, …
        nprobe: lists of an inverted file that are looked into.
        ef_search: candidates kept while a graph is walked.
        rerank: candidates whose distances are computed exactly from the stored keys; 0 takes faiss at its word.
        training_bytes: float32 rows to learn from, at most; always as many as there are centroids.
        device: "cpu", or "cuda" with faiss-gpu, where one search at a time is answered.
    """

    factory: str = "Flat"
    nprobe: int = 8
    ef_search: int = 64
    rerank: int = 0
    training_bytes: int = 1 << 30
    device: str = "cpu"
    index_type: ClassVar[type[Index]] = FaissIndex

    def __post_init__(self) -> None:
        faiss = _faiss()
        at_least(1, nprobe=self.nprobe, ef_search=self.ef_search, training_bytes=self.training_bytes)
        at_least(0, rerank=self.rerank)
        if links := re.search(r"HNSW0*[01](?!\d)", self.factory):
            raise InvalidInputError(
                f"a graph needs at least 2 links a key, and faiss ends the process where it is given fewer; "
                f"given {links[0]} in {self.factory!r}, HNSW32 is usual"
            )
        if self.device not in ("cpu", "cuda"):
            raise InvalidInputError(f"device must be 'cpu' or 'cuda', given {self.device!r}")
        if self.device == "cuda" and not (hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus()):
            raise InvalidInputError(
                "this faiss sees no GPU; install faiss-gpu in the place of faiss-cpu, or use device='cpu'"
            )

    def _build(self, keys: Keys) -> FaissIndex:
        faiss = _faiss()
        n, d = keys.shape
        try:
            index = faiss.index_factory(d, _fewer_lists(self.factory, n), faiss.METRIC_L2)
            frame = Frame(np.zeros(d, np.float32), 1.0)
            if not (isinstance(index, faiss.IndexFlat) and self.device == "cpu"):  # which subtracts keys as they are
                parts = list(_parts(index))
                least = max(2, *map(_centroids, parts))
                rows = max(_LEAST_SAMPLE, _LEARN_FROM * least)
                sample = keys.sample(max(least, min(rows, self.training_bytes // (4 * d))))
                frame = Frame.of(sample)
                seen = frame.into(sample)
                if not index.is_trained:
                    if len(seen) < least:  # learn from them again and again
                        seen = np.resize(seen, (least, d))
                    if not seen.any():  # all keys equal, and some codes divide by their spread
                        seen[-1] = 1
                    with _training(parts):
                        _find_axes(index, seen)
                        index.train(seen)
                del sample, seen
            for chunk in keys.chunks():
                index.add(frame.into(chunk))
            return self._ready(index, frame)
        except RuntimeError as e:
            raise InvalidInputError(
                f"faiss cannot build {self.factory!r} over {n} keys of dimension {d}; it says: {_reason(e)}"
            ) from e

    def _load(self, folder: Path, keys: Stored | None) -> FaissIndex:
        faiss = _faiss()
        memory_map = getattr(faiss, "IO_FLAG_MMAP_IFC", 0)  # older versions read it all
        return self._ready(faiss.read_index(str(folder / "index.faiss"), memory_map), Frame.load(folder))

    def _ready(self, index: Any, frame: Frame) -> FaissIndex:
        faiss = _faiss()
        for part in _parts(index):
            if isinstance(part, faiss.IndexIVF):
                part.nprobe = self.nprobe
            if isinstance(part, faiss.IndexHNSW):
                part.hnsw.efSearch = self.ef_search
        if self.device == "cuda":
            return FaissIndex(_to_gpu(index), frame, Lock())
        return FaissIndex(index, frame, nullcontext())


def _faiss() -> Any:
    return optional("faiss", "faiss")


def _to_gpu(index: Any) -> Any:
    faiss = _faiss()
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)


def _reason(error: RuntimeError) -> str:
    """What faiss says after naming the function and the line of its own source."""
    return re.split(r"failed: |\.cpp:\d+: ", str(error))[-1].strip() or str(error)


def _fewer_lists(factory: str, n: int) -> str:
    def fewer(match: re.Match[str]) -> str:
        lists = int(match[1]) * {"": 1, "k": 1 << 10, "M": 1 << 20}[match[2]]
        return f"IVF{max(1, min(lists, n // _ROWS_PER_LIST))}"

    return re.sub(r"\bIVF(\d+)([kM]?)", fewer, factory)


def _parts(index: Any) -> Iterator[Any]:
    """An index and everything in it that is trained by itself."""
    faiss = _faiss()
    index = faiss.downcast_index(index)
    yield index
    inner: list[Any] = []
    if isinstance(index, faiss.IndexPreTransform):
        yield from (faiss.downcast_VectorTransform(index.chain.at(i)) for i in range(index.chain.size()))
        inner = [index.index]
    elif isinstance(index, faiss.IndexRefine):
        inner = [index.base_index, index.refine_index]
    elif isinstance(index, faiss.IndexIVF):
        inner = [index.quantizer]
    elif isinstance(index, faiss.IndexHNSW):
        inner = [index.storage]
    for part in inner:
        yield from _parts(part)


def _centroids(part: Any) -> int:
    """How many rows a part must be trained on at least."""
    faiss = _faiss()
    if isinstance(part, faiss.VectorTransform):
        return part.d_out
    lists = part.nlist if isinstance(part, faiss.IndexIVF) and part.quantizer_trains_alone != 1 else 1
    return max(lists, getattr(getattr(part, "pq", None), "ksub", 1))


@contextmanager
def _training(parts: list[Any]) -> Generator[None]:
    """Training without advice on stderr about its rows, and without ordering codes for a filter that is never used."""
    faiss = _faiss()
    rotations = [part for part in parts if isinstance(part, faiss.OPQMatrix)]
    lent = [faiss.ProductQuantizer(rotation.d_out, rotation.M, 8) for rotation in rotations]  # as it would make itself
    for part in [*parts, *lent]:
        if hasattr(part, "do_polysemous_training"):
            part.do_polysemous_training = False
        for quantizer in (part, getattr(part, "pq", None), getattr(part, "rq", None)):
            clustering = getattr(quantizer, "cp", None)
            if clustering is not None:
                clustering.min_points_per_centroid = 1
    for rotation, quantizer in zip(rotations, lent, strict=True):
        rotation.pq = quantizer
    try:
        yield
    finally:
        for rotation in rotations:
            rotation.pq = None


def _find_axes(index: Any, rows: Float32[ndarray, "m d"]) -> None:
    """Train principal axes that come first on fewer rows than everything else."""
    faiss = _faiss()
    if not isinstance(index, faiss.IndexPreTransform):
        return
    first: Any = faiss.downcast_VectorTransform(index.chain.at(0))
    if isinstance(first, faiss.PCAMatrix):
        first.train(rows[:: max(1, len(rows) // max(_AXES_FROM, 4 * first.d_out))].copy())


def _core(index: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The index that searches, inside those that only prepare or refine, and how its parameters reach it."""
    faiss = _faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        core, wrapped = _core(index.index)
        return core, lambda params: faiss.SearchParametersPreTransform(index_params=wrapped(params))
    if isinstance(index, faiss.IndexRefine):
        core, wrapped = _core(index.base_index)
        return core, lambda params: faiss.IndexRefineSearchParameters(
            k_factor=index.k_factor, base_index_params=wrapped(params)
        )
    return index, lambda params: params


def _usual(index: Any, k: int) -> Any:
    """Parameters of a first search; None leaves everything as it is.

    `IndexFlat` subtracts only where a selector is given; without, it decides by the batch, and its ‖q‖² − 2 q·x + ‖x‖²
    names wrong neighbours in tight clusters. The other way to stop that is a threshold of the whole process.
    """
    faiss = _faiss()
    if isinstance(index, faiss.IndexFlat):
        return faiss.SearchParameters(sel=faiss.IDSelectorAll())
    core, wrapped = _core(index)
    if isinstance(core, faiss.IndexHNSW) and k > core.hnsw.efSearch:
        return wrapped(faiss.SearchParametersHNSW(efSearch=k))
    return None


def _harder(index: Any, k: int) -> Iterator[Callable[[ndarray], tuple[ndarray, ndarray]]]:
    """Searches that find more, each costlier than the one before."""
    faiss = _faiss()
    core, wrapped = _core(index)
    if isinstance(core, faiss.IndexIVF):
        probes = core.nprobe
        while probes < core.nlist:
            probes *= 2
            params = wrapped(faiss.SearchParametersIVF(nprobe=min(probes, core.nlist)))
            yield lambda queries, params=params: index.search(queries, k, params=params)
    if isinstance(core, faiss.IndexHNSW):
        ef = max(k, core.hnsw.efSearch)
        while ef < core.ntotal:
            ef *= 2
            params = wrapped(faiss.SearchParametersHNSW(efSearch=min(ef, core.ntotal)))
            yield lambda queries, params=params: index.search(queries, k, params=params)
        if isinstance(index, faiss.IndexHNSW):  # keys that the graph does not reach
            storage = faiss.downcast_index(core.storage)
            yield lambda queries: storage.search(queries, k, params=_usual(storage, k))
