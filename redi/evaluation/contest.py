"""What is compared on what: ways of sampling, prompts, starting noises, and what is measured on the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, final

from redi.errors import InvalidInputError
from redi.evaluation.features import Features
from redi.evaluation.lpips import Lpips
from redi.evaluation.scores import Score
from redi.evaluation.ways import Way
from redi.knowledge_base import KnowledgeBase
from redi.recipe import Item

_FORMAT: Final = 1  # of what is kept of a batch


@final
@dataclass(frozen=True)
class Batch:
    """Pictures that every way solves together.

    Args:
        first: place of its first picture among all.
        items: prompt and noise id of each.
    """

    first: int
    items: Sequence[Item]

    def __len__(self) -> int:
        return len(self.items)


@final
@dataclass(frozen=True, eq=False)
class Contest:
    """A comparison to be made.

    Args:
        kb: the knowledge base.
        prompts: each is drawn once from every noise.
        noise_ids: of the bank.
        ways: the first is the fine solve.
        features: what Fréchet distances are measured on.
        score: how a picture fits its prompt.
        lpips: the learned distance to the fine solve's picture, where it is there.
        batch_size: pictures solved together, the same whatever the number of processes.
    """

    kb: KnowledgeBase
    prompts: Sequence[str]
    noise_ids: Sequence[int]
    ways: Sequence[Way]
    features: Features
    score: Score
    lpips: Lpips | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        if len(set(self.prompts)) < 2:
            raise InvalidInputError(
                f"intervals are over prompts, so at least 2 are needed, given {len(set(self.prompts))}"
            )
        if not self.noise_ids:
            raise InvalidInputError("at least one starting noise is needed, given none")
        if self.batch_size < 1:
            raise InvalidInputError(f"batch_size must be at least 1, given {self.batch_size}")
        if not self.ways or [w.kind for w in self.ways].count("fine") != 1 or self.ways[0].kind != "fine":
            raise InvalidInputError("the first way, and no other, must be the fine solve")
        names = [w.name for w in self.ways]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise InvalidInputError(f"ways need names of their own, given twice: {', '.join(twice)}")

    @cached_property
    def items(self) -> list[Item]:
        """Every picture: a prompt's noises together."""
        return [(p, n) for p in dict.fromkeys(self.prompts) for n in self.noise_ids]

    @property
    def groups(self) -> list[int]:
        """For each picture, the number of its prompt: pictures of one prompt are drawn together, or left out."""
        return [i // len(self.noise_ids) for i in range(len(self.items))]

    @cached_property
    def batches(self) -> list[Batch]:
        """The pictures in batches, in order."""
        size = self.batch_size
        return [Batch(i, self.items[i : i + size]) for i in range(0, len(self.items), size)]

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """Everything that what is seen of a batch depends on, besides its items, as JSON."""
        return {
            "format": _FORMAT,
            "rows": self.kb.manifest_hash,
            "fingerprint": self.kb.fingerprint.to_json(),
            "noise": self.kb.bank.to_json(),
            "ways": [w.identity for w in self.ways],
            "features": self.features.identity,
            "score": self.score.identity,
            "lpips": self.lpips is not None,
        }
