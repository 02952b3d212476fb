"""Pipeline × scheduler × feature: every cell of the table in docs/pipelines.md is run."""

from __future__ import annotations

import pytest

import redi
from tests.pipelines.beds import CASES, JUMPS_ONLY, bed
from tests.pipelines.features import FEATURES, coarse, jump_defect, jump_residual, jump_value
from tests.pipelines.matrix import ABSENT, PAGE, REFUSED, WORDS, expected, updated

_ALWAYS = ("coarse", "jump_value")  # of every pipeline in the fast tests; of StableDiffusion everything
_LONG = ("no_leaks",)


def _cells() -> list[object]:
    return [
        pytest.param(
            name,
            feature,
            marks=[]
            if feature in _ALWAYS or (name == "StableDiffusion" and feature not in _LONG)
            else pytest.mark.slow,
        )
        for name in CASES
        for feature in FEATURES
        if expected(name, feature) != ABSENT
    ]


@pytest.mark.filterwarnings("ignore:You have passed 2 text prompts:FutureWarning")  # and one picture for both
@pytest.mark.parametrize(("name", "feature"), _cells())
def test_matrix(name: str, feature: str) -> None:
    it = bed(name)
    try:
        if expected(name, feature) != REFUSED:
            FEATURES[feature](it)
            return
        with it.counted() as calls, pytest.raises(redi.ReDiError, match=WORDS[feature]):
            FEATURES[feature](it)
        # refused before sampling starts, or by what the first step shows
        assert calls[0] <= (2 if feature == "half_calls" else 0)
    finally:
        redi.disable(it.pipe)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scheduler"), [(n, s) for n, case in CASES.items() for s in case.schedulers])
def test_schedulers(name: str, scheduler: str) -> None:
    it = bed(name, scheduler)
    try:
        if scheduler not in JUMPS_ONLY:
            coarse(it)
        if it.jumps:
            jump_value(it)
            jump_residual(it)
            if scheduler not in JUMPS_ONLY:
                jump_defect(it)
    finally:
        redi.disable(it.pipe)


def test_the_page_shows_this_matrix() -> None:
    page = PAGE.read_text()
    assert page == updated(page), "run python -m tests.pipelines.matrix"
