"""One process: what is finished stays finished, another evaluation never meets it, and it ends when told to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from redi.errors import InvalidInputError, KnowledgeBaseError
from redi.evaluation import LatentFeatures, Progress, Way, evaluate
from redi.knowledge_base import KnowledgeBase
from tests.evaluation.conftest import QUERIES, Calls, contest, folder_of


def test_a_second_run_calls_no_model_and_finds_the_same(
    pipe: Any, kb: KnowledgeBase, ways: Sequence[Way], tmp_path: Path
) -> None:
    first = evaluate(pipe, contest(kb, ways), tmp_path)
    with Calls(pipe) as calls:
        second = evaluate(pipe, contest(kb, ways), tmp_path)
    assert calls.count == 0
    assert first is not None
    assert second is not None
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.measures.nan_to_num(-1), b.measures.nan_to_num(-1))
        assert torch.equal(a.features, b.features)
        assert torch.equal(a.seconds, b.seconds)


def test_what_was_ended_early_goes_on_with_what_is_left(
    pipe: Any, kb: KnowledgeBase, ways: Sequence[Way], tmp_path: Path
) -> None:
    ways = ways[:2]
    each = sum(w.calls for w in ways)
    seen: list[Progress] = []
    few = contest(kb, ways, batch_size=1)
    assert evaluate(pipe, few, tmp_path, progress=seen.append, stop=lambda: len(seen) > 2) is None
    assert [p.done for p in seen] == [0, 1, 2]
    assert len(folder_of(tmp_path)) == 2
    with Calls(pipe) as calls:
        whole = evaluate(pipe, few, tmp_path)
    assert calls.count == 4 * each
    at_once = evaluate(pipe, few, tmp_path / "other")
    assert whole is not None
    assert at_once is not None
    assert all(torch.equal(a.features, b.features) for a, b in zip(whole, at_once, strict=True))
    with Calls(pipe) as calls:  # more prompts: those that were drawn are not drawn again
        evaluate(pipe, contest(kb, ways, (*QUERIES, "a heart"), batch_size=1), tmp_path)
    assert calls.count == 2 * each


def test_another_evaluation_in_the_same_folder_meets_nothing_of_it(
    pipe: Any, kb: KnowledgeBase, ways: Sequence[Way], tmp_path: Path
) -> None:
    plain = ways[:2]
    evaluate(pipe, contest(kb, plain), tmp_path)
    for other in (contest(kb, plain[:1]), contest(kb, plain, features=LatentFeatures())):
        with Calls(pipe) as calls:
            evaluate(pipe, other, tmp_path)
        assert calls.count > 0
    with Calls(pipe) as calls:
        evaluate(pipe, contest(kb, plain), tmp_path)
    assert calls.count == 0


def test_a_damaged_batch_is_drawn_again(pipe: Any, kb: KnowledgeBase, ways: Sequence[Way], tmp_path: Path) -> None:
    test = contest(kb, ways[:1])
    evaluate(pipe, test, tmp_path)
    victim = folder_of(tmp_path)[0]
    victim.write_bytes(victim.read_bytes()[:40])
    with Calls(pipe) as calls:
        evaluate(pipe, test, tmp_path)
    assert calls.count == ways[0].calls


def test_a_folder_that_cannot_be_written_is_said(
    pipe: Any, kb: KnowledgeBase, ways: Sequence[Way], tmp_path: Path
) -> None:
    (tmp_path / "batches").write_text("a file")
    with pytest.raises(KnowledgeBaseError, match="cannot be written"):
        evaluate(pipe, contest(kb, ways[:1]), tmp_path)


def test_contests_that_cannot_be(kb: KnowledgeBase, ways: Sequence[Way]) -> None:
    for more, says in (
        ({"prompts": ("one",)}, "at least 2"),
        ({"noise_ids": []}, "starting noise"),
        ({"batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(InvalidInputError, match=says):
            contest(kb, ways, **{"prompts": QUERIES} | more)
    with pytest.raises(InvalidInputError, match="fine solve"):
        contest(kb, ways[1:])
    with pytest.raises(InvalidInputError, match="names of their own"):
        contest(kb, [*ways, ways[1]])
