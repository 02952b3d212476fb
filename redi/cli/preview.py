"""A contact sheet of a knowledge base's rows: the pictures its trajectories arrived at, as far as they were kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch

from redi.cli import sheet
from redi.demo import decode
from redi.errors import InvalidInputError
from redi.knowledge_base import KnowledgeBase

_ACROSS: Final = 8
_LETTERS: Final = 17  # of a prompt under its picture


def draw(pipe: Any, kb: KnowledgeBase, count: int) -> Path:
    """Draw `count` rows, evenly chosen, into preview.png in the knowledge base's folder.

    Args:
        pipe: the pipeline that made the rows; its autoencoder decodes them.
        kb: the knowledge base.
        count: pictures; as many as there are rows at most.

    Returns:
        The file.

    Raises:
        InvalidInputError: the pipeline has no autoencoder to decode with.
    """
    if getattr(pipe, "vae", None) is None:
        raise InvalidInputError(f"--preview needs a pipeline with a vae, given {type(pipe).__name__}")
    ids = torch.linspace(0, len(kb) - 1, min(count, len(kb))).round().long()
    rows = kb.gather(ids)
    last = max(rows.samples, default=-1)
    if last < max(rows.denoised, default=-1):  # what the model last thought the picture would be
        last, latents = max(rows.denoised), rows.denoised[max(rows.denoised)]
    else:
        latents = rows.samples[last]
    pictures = torch.cat([decode(pipe, x[None].float()) for x in latents])
    names = [f"{p[:_LETTERS]}…" if len(p) > _LETTERS else p for p in rows.prompts]
    lines = [
        sheet.Row(
            f"rows {int(ids[at])} to {int(ids[at : at + _ACROSS][-1])}",
            [f"noise {', '.join(map(str, sorted(set(rows.noise_ids[at : at + _ACROSS].tolist()))))}"],
            pictures[at : at + _ACROSS],
            names[at : at + _ACROSS],
        )
        for at in range(0, len(ids), _ACROSS)
    ]
    mark = kb.fingerprint
    drawn = sheet.draw(
        kb.path.name,
        f"{len(ids)} of {len(kb)} rows, entry {last} of a schedule of {mark.steps} steps",
        [""] * min(_ACROSS, len(ids)),
        lines,
        f"{mark.model}, {mark.scheduler}, guidance {mark.guidance:g}",
    )
    drawn.save(kb.path / "preview.png")
    return kb.path / "preview.png"
