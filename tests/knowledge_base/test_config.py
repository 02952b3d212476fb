from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given

from redi.errors import FingerprintMismatchError, InvalidInputError, KnowledgeBaseError
from redi.knowledge_base import Config
from redi.types import Record
from tests.knowledge_base.samples import config, records, storages


@given(records, storages)
def test_survives_json(record: Record, storage: str) -> None:
    mine = config(record, storage)
    assert Config.from_json(json.loads(json.dumps(mine.to_json(), allow_nan=False))) == mine


def test_another_schema_is_refused_by_number() -> None:
    with pytest.raises(KnowledgeBaseError, match="reads schema 1, given 2"):
        Config.from_json(config().to_json() | {"schema": 2})
    with pytest.raises(KnowledgeBaseError, match="reads schema 1, given None"):
        Config.from_json({})


def test_broken_fields_are_named(tmp_path: Path) -> None:
    whole = config().to_json()
    for change, said in [
        ({"storage": "int8"}, "storage must be one of float16, float32, bfloat16, given 'int8'"),
        ({"storage": 3}, "storage must be text, given 3"),
        ({"plans": "jump"}, "plans must be a list"),
        ({"created_with": {"torch": 2}}, "created_with must be an object"),
        ({"record": {"samples": [1], "denoised": []}}, "history is missing"),
        ({"record": {"samples": [-1], "denoised": [], "history": []}}, "samples must be a list"),
        ({"record": {"samples": [], "denoised": [], "history": []}}, "at least one sample"),
        ({"surprise": 1}, "surprise is unknown"),
        ({"fingerprint": {}}, "model is missing"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(whole | change))
        with pytest.raises(KnowledgeBaseError) as caught:
            Config.read(tmp_path / "config.json")
        assert said in str(caught.value)
        assert str(tmp_path / "config.json") in str(caught.value)


def test_values_that_can_never_work() -> None:
    with pytest.raises(InvalidInputError, match="storage"):
        config(storage="float64")
    with pytest.raises(InvalidInputError, match="noise"):
        Config(config().fingerprint, config().record, {"seed": object()})


def test_require_compares_all_but_versions() -> None:
    mine = config()
    mine.require(Config.from_json(mine.to_json() | {"created_with": {"torch": "1"}}), "")
    other = config(Record(samples=frozenset({1})), "float32", noises=4, steps=30)
    with pytest.raises(FingerprintMismatchError) as caught:
        mine.require(other, "choose another folder")
    assert set(caught.value.differences) == {
        "steps",
        "storage",
        "noise.size",
        "record.samples",
        "record.denoised",
        "record.history",
    }
