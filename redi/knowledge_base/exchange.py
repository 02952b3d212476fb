"""Exchanging `config.json` under a manifest that is bound to it: readers and crashes see the old pair or the new one.

What may differ between the two configurations is not decided here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from redi.errors import KnowledgeBaseError
from redi.knowledge_base import files
from redi.knowledge_base.config import Config
from redi.knowledge_base.manifest import CONFIG, MANIFEST, Manifest

PREVIOUS: Final = "config.previous.json"


def exchange(path: Path, config: Config, manifest: Manifest) -> Manifest:
    """Put another configuration in place, and the manifest bound to it.

    The old one stays beside it until the manifest has followed, so that at every moment there is one that fits.

    Args:
        path: the knowledge base; nobody else writes it.
        config: the new one.
        manifest: as it is on the disk.

    Returns:
        The manifest as it is then.

    Raises:
        OSError: the disk refused.
    """
    text = files.dump(config.to_json())
    files.write(path / PREVIOUS, files.read_bytes(path / CONFIG))
    files.write(path / CONFIG, text)
    followed = replace(manifest, config=files.digest(text))
    files.write(path / MANIFEST, followed.to_bytes())
    (path / PREVIOUS).unlink()
    return followed


def settle(path: Path) -> None:
    """Undo an exchange that a crash left half done; only where nobody else writes.

    Raises:
        OSError: the disk refused.
    """
    if not (path / PREVIOUS).exists():
        return
    manifest, _ = Manifest.read(path / MANIFEST)
    before = files.read_bytes(path / PREVIOUS)
    if manifest.config == files.digest(before):
        files.write(path / CONFIG, before)
    (path / PREVIOUS).unlink()


def fitting(path: Path, manifest: Manifest) -> Config | None:
    """The configuration that fits a manifest while an exchange is under way or half done; None if there is none.

    Args:
        path: the knowledge base.
        manifest: one that does not fit `config.json` as that was read.
    """
    for name in (PREVIOUS, CONFIG):  # the second for an exchange that ended in between
        try:
            config, digest = Config.read(path / name)
        except KnowledgeBaseError:
            continue
        if digest == manifest.config:
            return config
    return None
