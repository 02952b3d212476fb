"""Single shards on the disk. A finished one has a note beside it, a manifest of its own, until *the* manifest lists it.

So every rank of a build can finish shards, while one writes the manifest; and a crash between the two loses nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor

from redi.errors import KnowledgeBaseError
from redi.knowledge_base import files, layout, tensorfile
from redi.knowledge_base.config import Config
from redi.knowledge_base.inspection import checked_shard, missized, read_prompts
from redi.knowledge_base.manifest import SHARDS, Manifest, Shard

_NOTE: Final = ".finished.json"
_OURS: Final = re.compile(r"([0-9]{5,9})\.(safetensors|prompts\.json|finished\.json)(\.tmp)?", re.ASCII)


def note_file(name: str) -> str:
    """The note of a shard, relative to the knowledge base."""
    return f"{SHARDS}/{name}{_NOTE}"


def write(path: Path, number: int, tensors: Mapping[str, Tensor], prompts: Sequence[str], config_hash: str) -> Manifest:
    """Put a shard and then its note on the disk.

    Args:
        path: the knowledge base.
        number: becomes its name; nobody else's.
        tensors: in their storage dtypes, first dimension: rows.
        prompts: of those rows.
        config_hash: sha256 of `config.json`.

    Returns:
        The note.

    Raises:
        OSError: the disk refused; what there is of the shard is no shard yet.
    """
    shard = Shard(f"{number:05d}", len(prompts), 0, "", 0, "")
    text = files.dump(list(prompts), indent=0)
    (path / SHARDS).mkdir(exist_ok=True)
    with files.replacing(path / shard.file) as temporary:
        with temporary.open("wb") as file:
            shapes = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
            for name, entry in tensorfile.begin(file, shapes).items():
                tensorfile.put(file, entry, 0, tensors[name])
        shard = replace(shard, bytes=files.size(temporary), sha256=files.digest_file(temporary))
    files.write(path / shard.prompts_file, text)
    shard = replace(shard, prompts_bytes=len(text), prompts_sha256=files.digest(text))
    finished = Manifest(config_hash, {name: tuple(t.shape[1:]) for name, t in tensors.items()}, (shard,))
    files.write(path / note_file(shard.name), finished.to_bytes())
    return finished


def finished(path: Path, among: Sequence[str] = ()) -> list[Manifest]:
    """Notes of shards that no manifest lists yet, in the order of their names; a note that cannot be read is none.

    Args:
        path: the knowledge base.
        among: names of shards to look for even if the folder does not show them.
    """
    there = {p.name.removesuffix(_NOTE) for p in _files(path) if p.name.endswith(_NOTE)}
    found: list[Manifest] = []
    for name in sorted({*there, *among}, key=int):
        try:
            manifest, _ = Manifest.read(path / note_file(name))
        except KnowledgeBaseError:
            continue
        if [s.name for s in manifest.shards] == [name]:
            found.append(manifest)
    return found


@final
@dataclass(frozen=True)
class Finished:
    """The content of a finished shard: its tensors, and the prompt and noise id of each row."""

    tensors: Mapping[str, Tensor]
    prompts: tuple[str, ...]
    keys: list[tuple[str, int]]

    def only(self, kept: Sequence[int]) -> tuple[dict[str, Tensor], list[str]]:
        """Copies of some rows of every tensor, and their prompts."""
        at = torch.tensor(kept)
        return {name: tensor[at] for name, tensor in self.tensors.items()}, [self.prompts[i] for i in kept]


def content(path: Path, note: Manifest, config: Config, among: Manifest, hashes: bool) -> Finished | None:
    """The one shard of a note, if it is what the note says and what its knowledge base promises.

    Args:
        path: the knowledge base.
        note: of the shard.
        config: of the knowledge base.
        among: its manifest.
        hashes: whether to check every byte.
    """
    (shard,) = note.shards
    both = ((shard.file, shard.bytes, shard.sha256), (shard.prompts_file, shard.prompts_bytes, shard.prompts_sha256))
    if note.config != among.config or (among.layout and dict(note.layout) != dict(among.layout)):
        return None
    if layout.wrong(note.layout, config) or any(missized(path / file, size) for file, size, _ in both):
        return None
    if hashes and any(files.digest_file(path / file) != sha for file, _, sha in both):
        return None
    try:
        tensors, prompts = checked_shard(path, shard, note, config).tensors, read_prompts(path, shard)
    except KnowledgeBaseError:
        return None
    ids: list[int] = tensors[layout.NOISE_ID].tolist()
    return Finished(tensors, prompts, list(zip(prompts, ids, strict=True)))


def after(path: Path) -> int:
    """A number above those of all shards there are, finished or not."""
    return 1 + max((int(m[1]) for p in _files(path) if (m := _OURS.fullmatch(p.name))), default=-1)


def sweep(path: Path, manifest: Manifest) -> None:
    """Remove what interrupted writers left: temporary files, parts of shards, and notes of shards that are listed.

    Only where nobody else writes, and when every shard that has a note is listed or to be forgotten.
    """
    listed = {f for s in manifest.shards for f in (s.file, s.prompts_file)}
    for file in _files(path):
        if _OURS.fullmatch(file.name) and f"{SHARDS}/{file.name}" not in listed:
            file.unlink()
    for file in path.glob(f"*{files.TEMPORARY}"):
        file.unlink()


def _files(path: Path) -> list[Path]:
    return list((path / SHARDS).iterdir()) if (path / SHARDS).is_dir() else []
