from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redi.errors import FingerprintMismatchError, InvalidInputError, KnowledgeBaseError
from redi.knowledge_base import Fingerprint, weight_hash
from tests.knowledge_base.samples import fingerprint

_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text(max_size=5), _json, max_size=4))
def test_survives_json(scheduler_config: dict[str, object]) -> None:
    mine = fingerprint(scheduler_config=scheduler_config)
    text = json.dumps(mine.to_json(), allow_nan=False)
    assert Fingerprint.from_json(json.loads(text)) == mine
    assert mine.scheduler_config == scheduler_config
    assert not mine.differences(Fingerprint.from_json(json.loads(text)))


def test_scheduler_config_is_plain_json() -> None:
    mine = fingerprint(scheduler_config={"betas": np.array([0.5, 1.0]), "n": np.float32(2), "t": (1, (2,))})
    assert mine.scheduler_config == {"betas": [0.5, 1.0], "n": 2.0, "t": [1, [2]]}
    with pytest.raises(InvalidInputError, match=r"scheduler_config\.f must be JSON"):
        fingerprint(scheduler_config={"f": print})
    with pytest.raises(InvalidInputError, match="guidance must be finite"):
        fingerprint(guidance=float("nan"))


def test_every_difference_is_named() -> None:
    changes: dict[str, object] = {
        "model": "b",
        "weights": "x",
        "adapters": (),
        "pipeline": "P",
        "scheduler": "S",
        "steps": 41,
        "guidance": 3.5,
        "guidance_rescale": 0.1,
        "negative_prompt": "blurry",
        "height": None,
        "width": 64,
        "dtype": "float16",
        "sample_shape": (2, 4),
    }
    mine = fingerprint()
    for name, value in changes.items():
        assert set(mine.differences(fingerprint(**{name: value}))) == {name}
    assert set(mine.differences(fingerprint(**changes))) == set(changes)
    assert set(mine.differences(fingerprint(**changes), ignoring=("steps", "model"))) == set(changes) - {
        "steps",
        "model",
    }


def test_differences_inside_the_scheduler_are_dotted() -> None:
    mine = fingerprint()
    other = fingerprint(
        scheduler_config={"solver_order": 3, "nested": {"a": [1, 2], "b": "x"}, "new": 1, "_diffusers_version": "9"}
    )
    assert mine.differences(other) == {
        "scheduler_config.solver_order": (2, 3),
        "scheduler_config.lambda_min_clipped": (-float("inf"), "(absent)"),
        "scheduler_config.trained_betas": (None, "(absent)"),
        "scheduler_config.nested.b": ("text", "x"),
        "scheduler_config.new": ("(absent)", 1),
    }
    assert not mine.differences(other, ignoring=("scheduler_config",))
    assert "scheduler_config.nested.b" not in mine.differences(other, ignoring=("scheduler_config.nested",))


def test_require_lists_what_differs() -> None:
    mine = fingerprint()
    mine.require(fingerprint())
    mine.require(fingerprint(steps=20), ignoring=("steps",))
    with pytest.raises(FingerprintMismatchError) as caught:
        mine.require(fingerprint(steps=20, guidance=7.5), what_to_do="pass guidance=3.0")
    assert caught.value.differences == {"steps": (40, 20), "guidance": (3.0, 7.5)}
    for said in ("steps", "40", "20", "guidance", "3.0", "7.5", "pass guidance=3.0"):
        assert said in str(caught.value)


def test_broken_json_names_every_field() -> None:
    broken = fingerprint().to_json() | {"steps": "40", "guidance": True, "more": 1}
    del broken["model"]
    with pytest.raises(KnowledgeBaseError) as caught:
        Fingerprint.from_json(broken)
    for said in ("model is missing", "more is unknown", "steps must be an integer", "guidance must be a number"):
        assert said in str(caught.value)
    with pytest.raises(KnowledgeBaseError, match="expected an object"):
        Fingerprint.from_json([1])


def _weights() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "large": torch.randn(90, 100, generator=g),
        "small": torch.randn(5, generator=g),
        "scalar": torch.tensor(2.5),
        "ids": torch.arange(7),
        "empty": torch.empty(0, 3),
        "flag": torch.tensor([True, False]),
    }


@given(st.permutations(sorted(_weights())))
def test_weight_hash_ignores_order(order: list[str]) -> None:
    weights = _weights()
    assert weight_hash((n, weights[n]) for n in order) == weight_hash(weights.items())


def test_weight_hash_agrees_with_a_half_precision_copy() -> None:
    half = {n: t.half() if t.is_floating_point() else t for n, t in _weights().items()}
    assert weight_hash(half.items()) == weight_hash(_weights().items())
    transposed = {n: t.T.contiguous().T if t.ndim == 2 else t for n, t in _weights().items()}
    assert weight_hash(transposed.items()) == weight_hash(_weights().items())


@given(st.sampled_from(["small", "scalar", "ids", "flag"]), st.data())
def test_weight_hash_sees_any_element_of_a_small_tensor(name: str, data: st.DataObject) -> None:
    weights = _weights()
    flat = weights[name].reshape(-1)
    i = data.draw(st.integers(0, flat.numel() - 1))
    flat[i] = ~flat[i] if flat.dtype == torch.bool else flat[i] * 2 + 1
    assert weight_hash(weights.items()) != weight_hash(_weights().items())


def test_weight_hash_sees_names_shapes_and_extra_tensors() -> None:
    weights = _weights()
    base = weight_hash(weights.items())
    renamed = {("tiny" if n == "small" else n): t for n, t in weights.items()}
    swapped = weights | {"large": weights["large"].reshape(100, 90)}
    adapted = weights | {"large.lora_A": torch.zeros(4, 100)}
    everywhere = weights | {"large": weights["large"] * 1.01}
    hashes = [base, *(weight_hash(w.items()) for w in (renamed, swapped, adapted, everywhere, {}))]
    assert len(set(hashes)) == len(hashes)
    assert all(len(h) == 64 for h in hashes)
    with pytest.raises(InvalidInputError, match="twice"):
        weight_hash([("a", torch.zeros(1)), ("a", torch.zeros(1))])
