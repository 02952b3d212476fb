"""The knowledge bases of the tables: which solver, which plans, which prompts."""

from __future__ import annotations

from typing import Final

from benchmarks.paper.common import World
from benchmarks.paper.settings import caption
from redi import KnowledgeBase, zoo

PNDM: Final = tuple(f"jump:10:{v}/50" for v in (15, 20, 25, 30, 35, 40, 45)) + tuple(
    f"jump:{k}:{k + 20}/50" for k in (2, 5, 15, 20, 25)
)
DPM: Final = (
    *(f"jump:5:{v}/20" for v in (7, 8, 10, 13, 15, 18)),
    *(f"jump:{k}:{k + 5}/20" for k in (1, 2, 3, 8, 10, 12)),
    *(f"coarse:{n}/20" for n in (5, 8, 10, 12)),
)


def pndm(world: World) -> KnowledgeBase:
    """PNDM's 50 steps on train prompts."""
    return world.build("pndm", "pndm", PNDM, train(world))


def dpm(world: World) -> KnowledgeBase:
    """DPM-Solver++'s 20 steps on train prompts."""
    return world.build("dpm", "dpmsolver++", DPM, train(world))


def style_free(world: World) -> KnowledgeBase:
    """PNDM's first 10 steps of 50 on the train captions alone."""
    captions = list(dict.fromkeys(caption(p) for p in zoo.prompts("emoji", "train")))
    return world.build("style-free", "pndm", ["jump:3:10/50"], captions[: world.settings.rows])


def train(world: World) -> list[str]:
    """Prompts of captions that no query has."""
    return zoo.prompts("emoji", "train")[: world.settings.rows]
