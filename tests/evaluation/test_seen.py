"""States of ranks, brought together, are those of one process, to the bit."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from redi.evaluation.seen import MEASURES, STAGES, Seen, SeenState, nothing


def drawn(n: int, seed: int, width: int = 5) -> Seen:
    g = torch.Generator().manual_seed(seed)
    measures = torch.randn(n, len(MEASURES), generator=g, dtype=torch.float64)
    measures[0, 3] = torch.nan  # as where there is no value
    return Seen(
        measures,
        torch.randn(n, width, generator=g),
        torch.rand(1, len(STAGES), generator=g, dtype=torch.float64),
    )


def same(a: Seen, b: Seen) -> bool:
    pairs = ((a.measures, b.measures), (a.features, b.features), (a.seconds, b.seconds))
    return all(torch.equal(x.nan_to_num(-1.0), y.nan_to_num(-1.0)) for x, y in pairs)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(1, 4), st.randoms(use_true_random=False))
def test_any_split_over_ranks_in_any_order_gives_the_same(sizes: list[int], ranks: int, random: object) -> None:
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    batches = [(first, drawn(n, seed)) for seed, (first, n) in enumerate(zip(firsts, sizes, strict=True))]
    alone = SeenState()
    for batch in batches:
        alone.update(*batch)

    shares: list[list[tuple[int, Seen]]] = [[] for _ in range(ranks)]
    random.shuffle(batches)  # type: ignore
    for i, batch in enumerate(batches):
        shares[i % ranks].append(batch)
    # what torch.distributed's gather does: the nth state that a rank brings meets the nth of every other
    brought: list[list[torch.Tensor]] = []
    for share in shares:
        state = SeenState(lambda x: [x])
        for batch in share:
            state.update(*batch)
        state.update(0, nothing(5))
        brought.append([torch.cat(state.pictures), torch.cat(state.clocks)])
    asked: list[int] = []

    def gather(mine: torch.Tensor) -> list[torch.Tensor]:
        asked.append(len(asked))
        return [other[asked[-1]] for other in brought]

    first = SeenState(gather)
    for batch in shares[0]:
        first.update(*batch)
    first.update(0, nothing(5))
    together = first.compute()
    assert same(Seen(**together), alone.seen)
    assert len(asked) == 2  # every state once


def test_medians_are_over_batches() -> None:
    state = SeenState()
    for i, seconds in enumerate((1.0, 5.0, 2.0)):
        one = drawn(2, i)
        state.update(2 * i, Seen(one.measures, one.features, torch.full((1, len(STAGES)), seconds).double()))
    assert state.seen.median_seconds == dict.fromkeys(STAGES, 2.0)
