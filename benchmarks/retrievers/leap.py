"""What a retriever's mistakes do to the picture: held-out prompts served with its neighbours, and the fine solve."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch
from numpy import ndarray

from benchmarks.retrievers.data import GUIDANCE, Scale
from redi import KnowledgeBase, zoo
from redi.backends import Index, Keys, Retriever, Stored
from redi.cli import names
from redi.demo import embed
from redi.engine import ReDiEngine
from redi.metrics import latent_error


@final
@dataclass(frozen=True, eq=False)
class Said(Index):
    """An index that answers what another one has answered."""

    keys: ndarray
    queries: ndarray
    ids: ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """Number of keys and their dimension."""
        n, d = self.keys.shape
        return n, d

    def _search(self, queries: ndarray, k: int) -> tuple[ndarray, ndarray]:
        which = np.square(queries[:, None].astype(np.float64) - self.queries).sum(-1).argmin(1)
        ids = self.ids[which, :k]
        return ids, np.square(self.keys[ids] - queries[:, None].astype(np.float64)).sum(-1)

    def _save(self, folder: Path) -> None:
        np.save(folder / "ids.npy", self.ids)


@final
@dataclass(frozen=True, eq=False)
class Replay(Retriever):
    """Makes `Said`."""

    queries: ndarray
    ids: ndarray
    index_type: ClassVar[type[Index]] = Said

    def _build(self, keys: Keys) -> Index:
        return Said(keys.array(np.float32).astype(np.float64), self.queries.astype(np.float64), self.ids)

    def _load(self, folder: Path, keys: Stored | None) -> Index:
        raise OSError("built anew every time")


@final
@dataclass
class Leap:
    """Serves the coarse plan with given neighbours; the same neighbours are served once.

    Args:
        kb: rows.
        heldout: fine solves of the prompts that are served.
        scale: the plan.
    """

    kb: KnowledgeBase
    heldout: KnowledgeBase
    scale: Scale
    seen: dict[bytes, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pipe = zoo.load("emoji")
        self.reference = torch.cat([r.samples[self.scale.fine] for r in self.heldout.chunks()]).float()
        self.queries = torch.cat([r.denoised[0] for r in self.heldout.chunks()]).flatten(1).float().numpy()

    def error(self, ids: ndarray | None) -> float:
        """Mean L2 distance of the latents to the fine solve; without ids, of the plain solver on the same grid.

        Args:
            ids: (b, k) neighbours of each held-out prompt.
        """
        name = b"" if ids is None else ids.tobytes()
        if name not in self.seen:
            self.seen[name] = self._error(ids)
        return self.seen[name]

    @torch.no_grad()
    def _error(self, ids: ndarray | None) -> float:
        pipe: Any = self.pipe
        said = np.zeros((len(self.heldout), 1), np.int64) if ids is None else ids
        engine = ReDiEngine(
            self.kb,
            names.solver("dpmsolver++", pipe.scheduler),
            self.scale.coarse,
            retriever=Replay(self.queries, said),
            neighbors=said.shape[1],
        )

        def denoise(x: torch.Tensor, t: torch.Tensor, condition: dict[str, torch.Tensor]) -> torch.Tensor:
            both = torch.cat([condition["negative_prompt_embeds"], condition["prompt_embeds"]])
            plain, prompted = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=both).sample.chunk(2)
            return plain + GUIDANCE * (prompted - plain)

        made: list[torch.Tensor] = []
        prompts = list(self.heldout.prompts)
        for start in range(0, len(prompts), 32):
            batch = prompts[start : start + 32]
            noise = self.kb.bank.noise(torch.zeros(len(batch), dtype=torch.int64))
            noise_ids = torch.full((len(batch),), -1 if ids is None else 0)
            made.append(engine.sample(denoise, noise, condition=embed(pipe, batch), noise_ids=noise_ids)[0])
        return latent_error(torch.cat(made), self.reference)
