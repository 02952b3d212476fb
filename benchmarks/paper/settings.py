"""How much is measured and where it goes: the command line of every script, and the prompts that follow from it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import bundled


@dataclass(frozen=True)
class Settings:
    """How much is measured, and where things go.

    Args:
        out: folder of the results.
        cache: folder of knowledge bases and latents; a script goes on with what it finds there.
        rows: prompts of each knowledge base.
        queries: held-out prompts.
        noises: bank noises, each with every prompt.
        seed: of the bank and of the bootstrap.
        data: folder of the real pictures, or None.
        quick: whether this is only a look.
    """

    out: Path
    cache: Path
    rows: int
    queries: int
    noises: int
    seed: int
    data: Path | None
    quick: bool

    @classmethod
    def parse(cls, argv: Sequence[str] | None, prog: str, doc: str | None) -> Settings:
        """Read the command line of a script."""
        parser = argparse.ArgumentParser(
            prog=f"python -m {prog}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--out", type=Path, default=Path("bench/paper"))
        parser.add_argument("--cache", type=Path, help="for rows and latents; by default a folder in --out")
        parser.add_argument("--rows", type=int, default=1024, help="prompts of each knowledge base")
        parser.add_argument("--queries", type=int, default=128, help="prompts of captions never seen")
        parser.add_argument("--noises", type=int, default=3, help="bank noises each prompt starts from")
        parser.add_argument("--data", type=Path, help="folder of emoji32.npz, for the distance to real pictures")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--quick", action="store_true", help="a look: figures of this size say little")
        given = parser.parse_args(argv)
        if given.quick:
            given.rows, given.queries, given.noises = 12, 4, 2
        given.out.mkdir(parents=True, exist_ok=True)
        given.cache = given.cache or given.out / "cache"
        return cls(**vars(given))


def spread(prompts: Sequence[str], count: int) -> list[str]:
    """So many prompts in whole batches, of as many captions as there are."""
    whole = max(1, count // bundled.BATCH) * bundled.BATCH if count >= bundled.BATCH else count
    by_caption: dict[str, list[str]] = {}
    for prompt in prompts:
        by_caption.setdefault(caption(prompt), []).append(prompt)
    longest = max(map(len, by_caption.values()))
    turns = [texts[i] for i in range(longest) for texts in by_caption.values() if i < len(texts)]
    return turns[:whole]


def caption(prompt: str) -> str:
    """What a prompt shows, without its style."""
    return prompt.rsplit(", ", 1)[0]
