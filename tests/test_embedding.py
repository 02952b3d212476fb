"""Repeated prompts are not encoded again, whatever a pipeline's `encode_prompt` gives; strange ones are left alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from redi.embedding import Embeddings


def numbers(text: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(map(ord, text)) + len(text)))


class Encoder:
    """An `encode_prompt` that counts what it encodes."""

    def __init__(self, kind: str) -> None:
        self.kind, self.encoded = kind, list[str]()

    def encode_prompt(
        self, prompt: Any, device: Any = None, negative_prompt: Any = None, prompt_embeds: Any = None
    ) -> Any:
        texts = prompt if isinstance(prompt, list) else [prompt]
        self.encoded += texts
        rows = torch.stack([numbers(t, 5, 4) for t in texts])
        if self.kind == "bare":
            return rows
        if self.kind == "twice":  # with and without the prompt, in one tensor
            return torch.cat([rows, rows]), None
        negative = [numbers(n, 5, 4) for n in negative_prompt or [""] * len(texts)]
        pooled = torch.stack([numbers(t, 6) for t in texts])
        ids = torch.zeros(7, 3)  # one for all, as some pipelines have
        if self.kind == "none":
            return rows, None, pooled, ids
        return rows, torch.stack(negative), pooled, ids


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    return len(left) == len(right) and all(
        a is b is None or (isinstance(a, Tensor) and torch.equal(a, b)) for a, b in zip(left, right, strict=True)
    )


CALLS = st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6), min_size=1, max_size=4)


@given(CALLS, st.sampled_from(["bare", "several", "none", "twice"]), st.booleans())
def test_the_outputs_are_the_encoders_own(calls: list[list[str]], kind: str, negative: bool) -> None:
    pipe, plain, memory = Encoder(kind), Encoder(kind), Embeddings()
    before: set[str] = set()
    for prompts in calls:
        more = {"negative_prompt": [p.upper() for p in prompts]} if negative else {}
        pipe.encoded.clear()
        with memory.active(pipe):
            out = pipe.encode_prompt(prompts, "cpu", **more)
        assert same(out, plain.encode_prompt(prompts, "cpu", **more))
        if kind != "twice":
            assert sorted(pipe.encoded) == sorted({*prompts} - before)
        before = {*prompts}
    assert "encode_prompt" not in vars(pipe)


def test_what_it_does_not_understand_it_leaves_alone() -> None:
    pipe = Encoder("several")
    with Embeddings().active(pipe):
        pipe.encode_prompt("one text")
        pipe.encode_prompt(["a", "a"], prompt_embeds=torch.zeros(2, 5, 4))
    assert pipe.encoded == ["one text", "a", "a"]
    with Embeddings().active(SimpleNamespace()):
        pass


def test_lengths_that_depend_on_the_batch_are_encoded_together() -> None:
    """A tokenizer may pad to the longest prompt of a batch, so that rows of two calls do not fit together."""

    class Padding(Encoder):
        def encode_prompt(self, prompt: Any, device: Any = None) -> Any:
            self.encoded += prompt
            return torch.stack([numbers(p, max(map(len, prompt)), 4) for p in prompt])

    pipe, plain = Padding("bare"), Padding("bare")
    memory = Embeddings()
    for prompts in (["a", "a", "bcd"], ["bcd", "ef", "ef"]):
        with memory.active(pipe):
            out = pipe.encode_prompt(prompts)
        assert same(out, plain.encode_prompt(prompts))


def test_an_error_leaves_the_pipeline_as_it_was() -> None:
    pipe = Encoder("bare")
    with pytest.raises(ZeroDivisionError), Embeddings().active(pipe):
        _ = 1 / 0
    assert "encode_prompt" not in vars(pipe)
