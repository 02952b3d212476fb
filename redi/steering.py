"""Timesteps that only a pipeline's own loop walks as it is told, and everyone else as an ordinary tensor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, final, no_type_check

import torch
from torch import Tensor


@final
class SteeredTimesteps(Tensor):
    """Timesteps that a pipeline's own loop walks as `follow` says; to everyone else an ordinary tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore
    code: Any
    follow: Callable[[], Iterator[int]]

    @classmethod
    def of(cls, timesteps: Tensor, code: Any, follow: Callable[[], Iterator[int]]) -> SteeredTimesteps:
        """Steer the loop whose code object is `code` through the entries that `follow()` yields."""
        steered = timesteps.as_subclass(cls)
        steered.code, steered.follow = code, follow
        return steered

    @no_type_check  # a checker's wrapper would stand between us and our caller
    def __iter__(self) -> Iterator[Tensor]:
        plain = self.as_subclass(Tensor)
        caller: FrameType | None = inspect.currentframe()
        caller = caller.f_back if caller else None
        if caller is not None and caller.f_code is self.code:
            return (plain[entry] for entry in self.follow())
        return iter(plain.unbind(0))
