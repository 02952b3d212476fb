"""Many columns at a time give what one at a time gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redi.evaluation.resampling import Draws, difference, interval
from redi.intervals import bootstrap, paired


def draw(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=9), st.integers(0, 10**6))
def test_intervals_and_p_values_are_those_of_one_column(sizes: list[int], seed: int) -> None:
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    x, y = draw(len(groups), seed), draw(len(groups), seed + 1) * 0.5
    draws = Draws(groups, 700, seed)
    means, gaps = draws.means(x), draws.means(x - y)
    for k in range(3):
        expected = bootstrap(lambda z: float(z.mean()), x[:, k], groups=groups, repeats=700, seed=seed)
        found = interval(float(x[:, k].mean()), means[:, k])
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-12)
        test = paired(x[:, k], y[:, k], groups, repeats=700, seed=seed)
        mine = difference(float((x - y)[:, k].mean()), gaps[:, k])
        ends = (test.interval.low, test.interval.high)
        assert (mine.interval.low, mine.interval.high) == pytest.approx(ends, rel=1e-9, abs=1e-12)
        if len(set(sizes)) == 1:  # else draws differ in how many pictures they have, and their mean from the value
            assert mine.p == pytest.approx(test.p, abs=0.05)


def test_rows_of_a_draw_are_whole_groups() -> None:
    groups = [0, 0, 1, 2, 2, 2]
    draws = Draws(groups, 50, 0)
    x = torch.arange(6.0, dtype=torch.float64)[:, None]
    means = draws.means(x)
    for r in range(50):
        rows = draws.rows(r)
        assert float(x[rows].mean()) == pytest.approx(float(means[r, 0]), rel=1e-12)
        counts = torch.bincount(rows, minlength=6).tolist()
        assert counts[0] == counts[1]
        assert counts[3] == counts[4] == counts[5]


def test_what_is_not_there_is_no_sample() -> None:
    groups = [0, 1, 2]
    draws = Draws(groups, 200, 0)
    nan = float("nan")
    x = torch.tensor([[1.0, nan, 2.0], [3.0, nan, nan], [5.0, nan, nan]], dtype=torch.float64)
    means = draws.means(x)
    assert means[:, 1].isnan().all()
    third = means[:, 2]
    assert set(third[~third.isnan()].tolist()) == {2.0}  # draws without the only sample have none
    assert third.isnan().any()
    assert interval(2.0, third) == interval(2.0, third[~third.isnan()])
    assert torch.tensor(interval(nan, means[:, 1]).low).isnan()
    assert difference(nan, means[:, 1]).p == 1.0
