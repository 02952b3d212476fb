"""Eight-bit codes of keys: a quarter of the bytes to read, products without rounding, and a bound on what was lost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Final, final

import torch
from jaxtyping import Float, Float32, Float64, Int8, Int32
from torch import Tensor

_LARGEST: Final = 127
_FINE: Final = 256  # a query has two digits to this base, −128 … 127
_LONGEST: Final = (2**31 - 1) // 128**2  # columns: products of two digits then add up in int32
_SHORTEST: Final = 32  # columns: keys of fewer are read as fast as they are
_STRETCH: Final = 1 << 20  # numbers coded at once
_SMALLEST: Final = 2.0**-100  # a unit
_FLUSHED: Final = 2.0**-125  # numbers below this may be taken for zero
_SUMMED: Final = 2.0**-6  # what a float32 norm of so many numbers loses at most
_ROUNDING: Final = 2.0**-30  # generous: the share of ‖y‖² and of ‖u‖² that is lost in the few float64 operations here


@final
@dataclass(frozen=True, eq=False)
class Codes:
    """y_i ≈ s_i c_i, where y_i = x_i − c is a key seen from the centre and c_i are whole numbers.

    Args:
        digits: c_i.
        unit: s_i, the largest |y_ij| over 127, or what is small beside any number.
        squared: ‖y_i‖².
        lost: ‖y_i − s_i c_i‖.
        kept: at least ‖s_i c_i‖.
    """

    digits: Int8[Tensor, "n d"]
    unit: Float64[Tensor, " n"]
    squared: Float64[Tensor, " n"]
    lost: Float64[Tensor, " n"]
    kept: Float64[Tensor, " n"]

    @staticmethod
    def pay(keys: Float[Tensor, "n d"], most: int) -> bool:
        """Whether codes of these keys fit in so many bytes, and this processor multiplies them faster than floats."""
        fit = keys.numel() <= most and _SHORTEST <= keys.shape[1] <= _LONGEST
        return fit and keys.device.type == "cpu" and _multiplies_integers()

    @classmethod
    def of(cls, keys: Float[Tensor, "n d"], centre: Float32[Tensor, " d"], squared: Float64[Tensor, " n"]) -> Codes:
        """Codes of keys seen from their centre.

        In float32: what roundings and the sum of a norm add to what is lost is allowed for.

        Args:
            keys: x_i.
            centre: c.
            squared: ‖y_i‖².
        """
        n, d = keys.shape
        digits = torch.empty(n, d, dtype=torch.int8, device=keys.device)
        unit, lost = torch.empty(2, n, dtype=torch.float64, device=keys.device)
        rows = max(1, _STRETCH // d)
        for top in range(0, n, rows):
            part = slice(top, top + rows)
            y = torch.sub(keys[part], centre)
            s = (y.abs().amax(1) / _LARGEST).clamp(min=_SMALLEST)
            y /= s[:, None]  # squares of these neither overflow nor vanish
            c = y.round()
            unit[part], digits[part] = s, c
            lost[part] = y.sub_(c).norm(dim=1)
        length = squared.sqrt()
        lost = lost.mul_(unit).mul_(1 + _SUMMED).add_(length, alpha=2.0**-20).add_(d**0.5 * _FLUSHED)
        return cls(digits, unit, squared, lost, length + lost)

    def compared(self, u: Float64[Tensor, "b d"]) -> tuple[Float64[Tensor, "b n"], Float64[Tensor, "b n"]]:
        """a_i = ‖y_i‖² − 2 u·y_i, which is ‖u − y_i‖² up to a constant, and τ_i, how far from the truth it can be.

        With û = t w and w = 256 h + l in whole numbers, û·s_i c_i is exact, |u·(y_i − s_i c_i)| is at most
        ‖u‖‖y_i − s_i c_i‖ and |(u − û)·s_i c_i| at most t √d/2 ‖s_i c_i‖.
        """
        t = u.abs().amax(1, keepdim=True) / (_LARGEST * _FINE)
        whole = (u / torch.where(t > 0, t, 1)).round_()
        high = ((whole + _FINE // 2) / _FINE).floor_()
        digits = torch.cat([high, whole.sub_(high, alpha=_FINE)]).to(torch.int8)
        sums = _integer_product(self.digits, digits.T)
        first, second = sums.T.to(torch.float64, memory_format=torch.contiguous_format).split(len(u))
        a = torch.addcmul(self.squared, second.add_(first, alpha=_FINE).mul_(t), self.unit, value=-2)
        squared = u.square().sum(1, keepdim=True)
        tau = torch.addcmul(self._rounded, squared.sqrt(), self.lost, value=2)
        return a, tau.addcmul_(t, self.kept, value=(1 + _ROUNDING) * u.shape[1] ** 0.5).add_(_ROUNDING * squared)

    @cached_property
    def _rounded(self) -> Float64[Tensor, " n"]:
        """What float64 loses that grows with the key."""
        return _ROUNDING * self.squared


def _integer_product(a: Int8[Tensor, "n d"], b: Int8[Tensor, "d m"]) -> Int32[Tensor, "n m"]:
    """Without a rounding; torch has no public name for it."""
    able: Any = torch
    return able._int_mm(a, b)


@cache
def _multiplies_integers() -> bool:
    """Whether the processor has instructions for products of eight-bit integers, and torch makes no mistake with them.

    Without, they are emulated, slowly, or saturate.
    """
    vnni: Any = getattr(torch.cpu, "_is_vnni_supported", None)
    if vnni is None or not vnni() or not hasattr(torch, "_int_mm"):
        return False
    codes = torch.arange(97 * 64, device="cpu").remainder(2 * _LARGEST + 1).sub(_LARGEST).view(97, 64).to(torch.int8)
    return torch.equal(_integer_product(codes, codes[:6].T).double(), codes.double() @ codes[:6].double().T)
