"""Products of codes stay within their bound, and exact search is the same with and without them."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray

from redi.backends import Exact, Retriever
from redi.backends import codes as codes_module
from redi.backends.codes import Codes
from redi.backends.exact import ExactIndex
from redi.testing import RetrieverContract
from redi.testing.retriever import brute_force


class TestExactWithoutCodes(RetrieverContract):
    """As on a processor that multiplies floats faster."""

    adds: ClassVar[bool] = True

    @pytest.fixture
    def retriever(self) -> Retriever:
        return Exact(code_bytes=0)


class TestExactWithCodesOfAnything(RetrieverContract):
    """Even where they do not pay."""

    adds: ClassVar[bool] = True

    @pytest.fixture(autouse=True, scope="class")
    @staticmethod
    def always() -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Codes, "pay", staticmethod(lambda keys, most: keys.shape[1] > 1))
            yield

    @pytest.fixture
    def retriever(self) -> Retriever:
        return Exact()


def some(rows: int, columns: int, seed: int, scale: float = 1.0, centre: float = 0.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return centre + scale * torch.randn(rows, columns, generator=g) * torch.rand(rows, 1, generator=g).exp2()


def coded(keys: torch.Tensor, centre: torch.Tensor) -> Codes:
    return Codes.of(keys, centre, (keys.double() - centre.double()).square().sum(1))


@given(
    rows=st.integers(1, 40),
    columns=st.integers(32, 200),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e30]),
    centre=st.sampled_from([0.0, 1.0, -1e4]),
)
def test_comparisons_are_within_their_bound(rows: int, columns: int, seed: int, scale: float, centre: float) -> None:
    keys, middle = some(rows, columns, seed, scale, centre), torch.full((columns,), centre)
    queries = torch.cat([keys[:3], some(2, columns, seed + 1, scale, centre), torch.zeros(1, columns)]).double()
    u = queries - middle.double()
    y = keys.double() - middle.double()
    found, off = coded(keys, middle).compared(u)
    assert ((found - (y.square().sum(1) - 2 * u @ y.T)).abs() <= off).all()


def test_codes_of_whole_numbers_lose_nothing() -> None:
    g = torch.Generator().manual_seed(4)
    keys = torch.randint(-127, 128, (30, 64), generator=g).float()
    keys[:, 0] = 127
    codes = coded(keys, torch.zeros(64))
    assert torch.equal(codes.digits.float(), keys)
    u = torch.arange(-32_512, 32_512).view(-1, 64).double()  # every value of the second digit
    found, off = codes.compared(u / 32_512 * 3)
    true = keys.double().square().sum(1) - 2 * (u / 32_512 * 3) @ keys.double().T
    assert ((found - true).abs() <= off).all()
    assert float(off.max()) < 0.05 * float(true.abs().max())


def test_the_bound_is_of_use() -> None:
    keys = some(400, 512, 0)
    _, off = coded(keys, torch.zeros(512)).compared(keys[:5].double())
    sizes = keys[:5].double().norm(dim=1)[:, None] * keys.double().norm(dim=1)
    assert float((off / sizes).max()) < 2.0**-5


def test_few_keys_are_looked_at_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Codes, "pay", staticmethod(lambda keys, most: True))
    keys = some(4000, 128, 1).numpy()
    index = Exact().build(keys)
    assert isinstance(index, ExactIndex)
    assert index._codes is not None
    monkeypatch.setattr(ExactIndex, "_candidates_by", lambda *_, **__: pytest.fail("the keys themselves were read"))
    assert int(index._candidates(torch.from_numpy(keys[:9]).double() - index.centre.double(), 16).sum(1).max()) < 100
    np.testing.assert_array_equal(index.search(keys[:9], 16).ids, brute_force(keys, keys[:9], 16).ids)


def test_codes_that_tell_nothing_apart_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Codes, "pay", staticmethod(lambda keys, most: True))
    keys = some(4000, 64, 2)
    keys[torch.arange(4000), torch.arange(4000) % 64] = 1e4  # one large number in each key leaves the others no digits
    index = Exact().build(keys.numpy())
    assert isinstance(index, ExactIndex)
    assert index._codes is None
    np.testing.assert_array_equal(
        index.search(keys[:7].numpy(), 5).ids, brute_force(keys.numpy(), keys[:7].numpy(), 5).ids
    )


@pytest.mark.parametrize("shape", [(5, 8), (3, 140_000)])
def test_keys_that_codes_do_not_suit(shape: tuple[int, int]) -> None:
    assert not Codes.pay(torch.zeros(shape), 1 << 28)


@pytest.mark.parametrize("wrong", ["no instructions", "wrong sums", "no function"])
def test_a_processor_or_a_torch_that_cannot(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    codes_module._multiplies_integers.cache_clear()
    try:
        if wrong == "no instructions":
            monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False, raising=False)
        elif wrong == "wrong sums":
            monkeypatch.setattr(torch, "_int_mm", lambda a, b: torch.zeros(len(a), b.shape[1], dtype=torch.int32))
        else:
            monkeypatch.delattr(torch, "_int_mm")
        keys: ndarray = some(200, 64, 3).numpy()
        assert not Codes.pay(torch.from_numpy(keys), 1 << 28)
        np.testing.assert_array_equal(Exact().build(keys).search(keys[:4], 3).ids, brute_force(keys, keys[:4], 3).ids)
    finally:
        codes_module._multiplies_integers.cache_clear()


def test_codes_take_no_more_memory_than_they_may() -> None:
    keys = torch.zeros(100, 64)
    assert not Codes.pay(keys, 6399)
    assert Codes.pay(keys, 6400) == codes_module._multiplies_integers()


def test_the_default_device_is_of_no_matter() -> None:
    keys = some(300, 64, 5).numpy()
    with torch.device("meta"):
        codes_module._multiplies_integers.cache_clear()
        found = Exact().build(keys).search(keys[:5], 4)
    np.testing.assert_array_equal(found.ids, brute_force(keys, keys[:5], 4).ids)


def test_the_bound_holds_where_small_numbers_are_taken_for_zero() -> None:
    keys = (1 + some(200, 64, 6, 2.0**-3)) * 2.0**-125
    middle = keys.mean(0)
    true = keys.double() - middle.double()
    before = torch.set_flush_denormal(True)
    try:
        found, off = coded(keys, middle).compared(true[:5])
    finally:
        torch.set_flush_denormal(False)
    assert before
    assert ((found - (true.square().sum(1) - 2 * true[:5] @ true.T)).abs() <= off).all()


def test_batches_do_not_look_twice_at_many_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes that leave more than the float pass would are not what a batch is searched by."""
    monkeypatch.setattr(Codes, "pay", staticmethod(lambda keys, most: True))
    keys = torch.randn(2000, 4096, generator=torch.Generator().manual_seed(7)).numpy()
    index = Exact().build(keys)
    assert isinstance(index, ExactIndex)
    u = torch.from_numpy(keys[:16]).double() - index.centre.double()
    assert int(index._candidates(u, 8).sum()) <= max(len(keys) // 8, 4 * 8 * 16)
