from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redi.errors import InvalidInputError
from redi.intervals import bootstrap, holm, paired
from redi.metrics import frechet_distance

probabilities = st.floats(0, 1, allow_nan=False)


def mean(x: torch.Tensor) -> float:
    return float(x.mean())


def clusters(seed: int, groups: int = 30, size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures that share their group's standard normal, with little of their own."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(groups, 1, generator=generator, dtype=torch.float64)
    own = 0.1 * torch.randn(groups, size, generator=generator, dtype=torch.float64)
    return (shared + own).flatten(), torch.arange(groups).repeat_interleave(size)


def test_the_interval_covers_a_known_mean_as_often_as_it_says_and_rows_as_groups_would_not() -> None:
    runs, covered, naive = 200, 0, 0
    for seed in range(runs):
        x, groups = clusters(seed)
        covered += 0.0 in bootstrap(mean, x, groups=groups, repeats=200, level=0.9)
        naive += 0.0 in bootstrap(mean, x, groups=range(len(x)), repeats=200, level=0.9)
    assert 0.82 < covered / runs < 0.96  # 0.9 ± 3.5 standard errors, less what 30 groups cost
    assert naive / runs < 0.7


def test_its_width_is_that_of_the_normal_theory() -> None:
    x, groups = clusters(0, groups=200)
    of_groups = x.view(200, 4).mean(1)
    got = bootstrap(mean, x, groups=groups, repeats=2000)
    assert got.high - got.low == pytest.approx(2 * 1.96 * float(of_groups.std()) / 200**0.5, rel=0.1)


def test_the_order_of_pictures_does_not_matter_but_for_the_order_of_groups() -> None:
    x, groups = clusters(1, groups=10, size=3)
    order = torch.arange(30).view(10, 3).flip(1).flatten()
    assert bootstrap(mean, x, groups=groups).low == pytest.approx(bootstrap(mean, x[order], groups=groups[order]).low)


def test_a_frechet_distance_of_equal_sets_is_zero_and_of_shifted_ones_is_its_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(120, 6, generator=generator)
    equal = bootstrap(frechet_distance, a, a, groups=[f"caption {i % 40}" for i in range(120)], repeats=50)
    assert 0.0 in equal
    assert equal.high < 1e-9
    shifted = bootstrap(frechet_distance, a + 1, a, groups=range(120), repeats=50)
    assert shifted.value == pytest.approx(6.0, rel=1e-5)
    assert shifted.value in shifted


def test_a_biased_statistic_keeps_its_value_inside() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 60, 12, generator=generator)
    got = bootstrap(lambda x: frechet_distance(x, b), a, groups=range(60), repeats=100)
    assert got.low < got.value < got.high


def test_the_same_seed_draws_the_same() -> None:
    x, groups = clusters(2)
    assert bootstrap(mean, x, groups=groups) == bootstrap(mean, x, groups=groups.tolist())
    assert bootstrap(mean, x, groups=groups) != bootstrap(mean, x, groups=groups, seed=1)


def test_a_difference_is_found_where_it_is_and_equal_numbers_have_none() -> None:
    x, groups = clusters(3)
    noise = 0.05 * torch.randn(len(x), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = paired(x + 0.2 + noise, x, groups, repeats=999)
    assert found.interval.low > 0.15
    assert found.p == pytest.approx(1 / 1000)
    none = paired(x, x, groups, repeats=99)
    assert none.p == 1.0
    assert 0.0 in none.interval


def test_p_values_are_uniform_where_there_is_no_difference() -> None:
    p = torch.tensor([paired(clusters(s)[0], clusters(s + 500)[0], clusters(s)[1], repeats=99).p for s in range(200)])
    assert 0.02 < float((p <= 0.1).double().mean()) < 0.19


@given(st.lists(probabilities, max_size=8))
def test_holm_raises_every_value_keeps_their_order_and_is_no_more_than_bonferroni(p: list[float]) -> None:
    q = holm(p)
    assert all(a <= b <= min(1.0, len(p) * a) + 1e-15 for a, b in zip(p, q, strict=True))
    assert all(q[i] <= q[j] for i in range(len(p)) for j in range(len(p)) if p[i] <= p[j])


def test_holm_gives_the_textbook_values() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize(
    ("groups", "more"), [([0, 0, 0], {}), ([0, 1], {}), ([0, 1, 2], {"level": 1.0}), ([0, 1, 2], {"repeats": 0})]
)
def test_what_cannot_be_drawn_is_refused(groups: list[int], more: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError):
        bootstrap(mean, torch.zeros(3), groups=groups, **more)
    with pytest.raises(InvalidInputError):
        holm([1.5])
