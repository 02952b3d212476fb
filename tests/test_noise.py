"""A noise depends on its seed and id alone, is normal, and is recognised however it was cast and scaled."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from redi.errors import NoiseError
from redi.noise import NoiseBank, _bank, _normal

SHAPE = (4, 16, 16)


def ids(*wanted: int) -> torch.Tensor:
    return torch.tensor(wanted, dtype=torch.int64)


# -- the bank -------------------------------------------------------------------------------------------------------


def test_noises_are_standard_normal_and_independent() -> None:
    x = NoiseBank(seed=1, size=64, shape=SHAPE).noise(torch.arange(64)).flatten(1).double()
    assert scipy.stats.kstest(x.flatten().numpy(), "norm").pvalue > 1e-3
    n = x.numel()
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    correlation = torch.corrcoef(x)
    assert float((correlation - torch.eye(64)).abs().max()) < 6 / math.sqrt(x.shape[1])
    along = torch.corrcoef(x.T[:200])
    assert float((along - torch.eye(200)).abs().max()) < 6 / math.sqrt(64)


@given(st.lists(st.integers(0, 99), max_size=6), st.integers(-5, 2**64))
def test_a_noise_depends_on_seed_and_id_alone(wanted: list[int], seed: int) -> None:
    small, large = NoiseBank(seed, 100, (3, 5)), NoiseBank(seed, 100_000, (3, 5), diversity=0.5)
    together = small.noise(ids(*wanted))
    assert together.shape == (len(wanted), 3, 5)
    for row, i in zip(together, wanted, strict=True):
        assert torch.equal(row, large.noise(ids(i))[0])
    torch.manual_seed(0)
    assert torch.equal(together, small.noise(ids(*wanted)))


def test_other_seeds_and_ids_give_other_noises() -> None:
    rows = torch.cat([NoiseBank(seed, 12, (64,)).noise(torch.arange(12)) for seed in (0, 1, 10, 11, 2**32, 2**64)])
    cosines = torch.nn.functional.normalize(rows, dim=1) @ torch.nn.functional.normalize(rows, dim=1).T
    assert float((cosines - torch.eye(len(rows))).abs().max()) < 0.8


def test_the_numbers_are_the_inverse_normal_of_the_raw_stream() -> None:
    """Written down from the definition, with another implementation of the hash's consumer and of the inverse."""
    import hashlib

    parts = [b"bank", b"7", b"3"]
    h = hashlib.blake2b(b"".join(len(p).to_bytes(8, "little") + p for p in parts), digest_size=16, person=b"redi noise")
    raw = np.random.Philox(key=int.from_bytes(h.digest(), "little")).random_raw(20)
    expected = [scipy.stats.norm.ppf((int(r) // 4096 + 0.5) / 2**52) for r in raw]
    found = NoiseBank(7, 4, (20,)).noise(ids(3))[0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_another_process_makes_the_same_noise() -> None:
    code = (
        "import torch, hashlib; torch.set_num_threads(1); from redi.noise import NoiseBank;"
        "print(hashlib.sha256(NoiseBank(5, 9, (4, 8, 8)).noise(torch.tensor([8])).numpy().tobytes()).hexdigest())"
    )
    import hashlib

    mine = hashlib.sha256(NoiseBank(5, 9, (4, 8, 8)).noise(ids(8)).numpy().tobytes()).hexdigest()
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert mine == theirs


def test_the_ends_of_the_uniform_distribution_stay_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ends:
        def random_raw(self, n: int) -> np.ndarray:
            return np.array([0, 2**64 - 1], np.uint64)

    monkeypatch.setattr("redi.noise._philox", lambda *name: Ends())
    low, high = _normal((2,), "x").tolist()
    assert -9 < low < -8
    assert high == -low


@pytest.mark.parametrize("wrong", [-1, 3])
def test_ids_out_of_the_bank_are_refused(wrong: int) -> None:
    with pytest.raises(NoiseError, match="bank of 3"):
        NoiseBank(0, 3, (2,)).noise(ids(0, wrong))


# -- drawing --------------------------------------------------------------------------------------------------------

keys = st.lists(st.binary(max_size=4), min_size=1, max_size=12)


@given(keys, st.integers(1, 20), st.sampled_from([0.0, 0.3]))
def test_no_noise_is_drawn_twice_while_there_are_others(drawn: list[bytes], size: int, diversity: float) -> None:
    bank = NoiseBank(3, size, (2, 3), diversity)
    if len(drawn) > size and not diversity:
        with pytest.raises(NoiseError, match=f"at most {size}"):
            bank.draw(drawn)
        return
    found, noise = bank.draw(drawn)
    assert noise.shape == (len(drawn), 2, 3)
    for start in range(0, len(drawn), size):
        window = found[start : start + size].tolist()
        assert len(set(window)) == len(window)
    assert len({tuple(row.flatten().tolist()) for row in noise}) == len(drawn), "two pictures are the same"
    again, same = bank.draw(drawn)
    assert torch.equal(found, again)
    assert torch.equal(noise, same)
    if not diversity:
        assert torch.equal(noise, bank.noise(found))


@given(keys)
def test_a_picture_depends_on_its_own_key(drawn: list[bytes]) -> None:
    bank = NoiseBank(3, 1000, (8,), 0.4)
    found, noise = bank.draw(drawn)
    alone_id, alone = bank.draw(drawn[:1])
    assert found[0] == alone_id[0]
    assert torch.equal(noise[0], alone[0])
    last_id, last = bank.draw(drawn[-1:])
    if found[-1] == last_id[0] and drawn.count(drawn[-1]) == 1:
        assert torch.equal(noise[-1], last[0])


def test_one_key_serves_a_whole_batch_and_begins_the_same() -> None:
    bank = NoiseBank(3, 10, (8,))
    many, _ = bank.draw([b"seed"], 10)
    few, _ = bank.draw([b"seed"], 4)
    assert sorted(many.tolist()) == list(range(10))
    assert torch.equal(many[:4], few)
    with pytest.raises(NoiseError, match="2 keys for 3 pictures"):
        bank.draw([b"a", b"b"], 3)


def test_every_noise_is_drawn_equally_often() -> None:
    bank = NoiseBank(0, 5, (1,))
    counts = torch.bincount(torch.cat([bank.draw([str(i).encode()])[0] for i in range(1000)]), minlength=5)
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_diversity_mixes_in_fresh_noise_at_unit_variance() -> None:
    bank = NoiseBank(0, 4, SHAPE, diversity=0.6)
    found, noise = bank.draw([str(i).encode() for i in range(40)])
    d = math.prod(SHAPE)
    assert abs(noise.double().var() - 1) < 5 * math.sqrt(2 / noise.numel()) + 0.02
    rest = ((noise - 0.8 * bank.noise(found)) / 0.6).flatten(1)
    correlation = torch.corrcoef(torch.cat([rest, bank.noise(torch.arange(4)).flatten(1)]))
    assert float((correlation - torch.eye(44)).abs().max()) < 6 / math.sqrt(d), "the fresh part is not fresh"


# -- recognising ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 14.6146])
@pytest.mark.parametrize("diversity", [0.0, 0.1, 0.5, 0.7])
def test_noise_is_recognised_after_casting_and_scaling(dtype: torch.dtype, scale: float, diversity: float) -> None:
    bank = NoiseBank(1, 50, SHAPE, diversity)
    found, noise = bank.draw([b"a"], 50)
    cast = (noise * scale).to(dtype)
    assert torch.equal(bank.match(cast, scale=scale), found)
    assert torch.equal(bank.match(cast.double() / scale), found)
    assert torch.equal(bank.match(bank.noise(found) if not diversity else noise), found)


@pytest.mark.parametrize("diversity", [0.0, 0.5])
def test_strangers_are_not_recognised(diversity: float) -> None:
    bank = NoiseBank(1, 50, SHAPE, diversity)
    other = NoiseBank(2, 50, SHAPE, diversity)
    own = bank.noise(ids(0, 1))
    strangers = torch.cat([other.noise(torch.arange(50)), -own, 2 * own, 0 * own, own * torch.nan, own.flip(1)])
    assert (bank.match(strangers) == -1).all()
    mixed = bank.match(torch.stack([own[1], strangers[0]]).half())
    assert mixed.tolist() == ([1, -1] if diversity == 0 else [bank.match(own[1:])[0].item(), -1])


def test_noise_with_too_much_fresh_noise_is_a_stranger() -> None:
    bank = NoiseBank(1, 10, SHAPE)
    assert (bank.match(NoiseBank(1, 10, SHAPE, 0.3).draw([b"x"], 10)[1]) == -1).all()


def test_large_banks_are_matched_in_single_precision() -> None:
    bank = NoiseBank(1, 300, (4, 64, 64))
    assert bank.size * math.prod(bank.shape) > 1 << 22
    wanted = ids(299, 7)
    assert torch.equal(bank.match(bank.noise(wanted).half()), wanted)
    _bank.cache_clear()


def test_noise_of_another_shape_is_refused() -> None:
    with pytest.raises(NoiseError, match=r"\(4, 16, 16\), given \(4, 8, 8\)"):
        NoiseBank(0, 2, SHAPE).match(torch.randn(1, 4, 8, 8))


# -- as data --------------------------------------------------------------------------------------------------------


@given(st.integers(), st.integers(1, 10**6), st.lists(st.integers(1, 64), min_size=1, max_size=4), st.floats(0, 0.99))
def test_json_round_trip(seed: int, size: int, shape: list[int], diversity: float) -> None:
    bank = NoiseBank(seed, size, tuple(shape), diversity)
    assert NoiseBank.from_json(json.loads(json.dumps(bank.to_json()))) == bank


@pytest.mark.parametrize(
    "change", [{"size": 0}, {"shape": []}, {"shape": 4}, {"diversity": 1.0}, {"seed": "x"}, {"more": 1}, {"size": 1.5}]
)
def test_what_describes_no_bank_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(NoiseError):
        NoiseBank.from_json(NoiseBank(0, 1, (2,)).to_json() | change)
