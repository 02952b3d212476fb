"""Negative prompts given as embeddings, of pipelines that encode in ways of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from redi.negatives import negative_prompts, negative_texts, unverified


def embedding(text: str, encoder: int, tokens: int) -> Tensor:
    seed = sum(ord(c) * (i + 1) for i, c in enumerate(text)) + 1000 * encoder
    return torch.randn(1, tokens, 4, generator=torch.Generator().manual_seed(seed))


@dataclass(eq=False)
class Two:
    """Encodes with one of two encoders in each call, as HunyuanDiT does."""

    text_encoder: Any = "there"

    def encode_prompt(
        self, prompt: list[str], negative_prompt: list[str], text_encoder_index: int = 0
    ) -> tuple[Tensor, ...]:
        if self.text_encoder is None:
            raise AttributeError
        tokens = (5, 7)[text_encoder_index]
        made = [embedding(t, text_encoder_index, tokens) for t in (prompt[0], negative_prompt[0])]
        return (*made, torch.ones(1, tokens), torch.ones(1, tokens))


@dataclass(eq=False)
class Zeroes:
    """Takes zeros where there is no negative prompt, or where it is empty."""

    empty_too: bool
    config: dict[str, Any] = field(default_factory=lambda: {"force_zeros_for_empty_prompt": True})

    def encode_prompt(self, prompt: list[str], negative_prompt: list[str] | None = None) -> tuple[Tensor, Tensor]:
        text = None if negative_prompt is None or (self.empty_too and not negative_prompt[0]) else negative_prompt[0]
        return embedding(prompt[0], 0, 5), torch.zeros(1, 5, 4) if text is None else embedding(text, 0, 5)


def passed(text: str, other: str) -> dict[str, Tensor]:
    """What two encoders make of a negative prompt each, and their masks."""
    return {
        "negative_prompt_embeds": embedding(text, 0, 5),
        "negative_prompt_embeds_2": embedding(other, 1, 7),
        "negative_prompt_attention_mask": torch.ones(1, 5),
    }


def test_every_encoders_embeddings_are_compared() -> None:
    pipe = Two()
    assert negative_prompts(pipe, passed("", ""), "") == {""}
    assert negative_prompts(pipe, passed("old", "old"), "old") == {"old"}
    for other in (passed("", "old"), passed("old", ""), {"negative_prompt_embeds_2": embedding("old", 1, 7)}):
        (name,) = negative_prompts(pipe, other, "")
        assert name.startswith("embeddings ")
    assert unverified(pipe, passed("", ""), "") == []


def test_what_has_nothing_to_be_compared_with_is_named() -> None:
    pipe = Two()
    given = passed("", "") | {"negative_attention_mask": torch.ones(1, 9)}
    assert negative_prompts(pipe, given, "") == {""}
    assert unverified(pipe, given, "") == ["negative_attention_mask"]
    pipe.text_encoder = None
    assert negative_prompts(pipe, passed("old", ""), "") == {""}
    assert unverified(pipe, passed("old", ""), "") == list(passed("old", ""))


def test_embeddings_of_another_length_are_others() -> None:
    (name,) = negative_prompts(Two(), {"negative_prompt_embeds": embedding("", 0, 6)}, "")
    assert name.startswith("embeddings ")


@pytest.mark.parametrize("empty_too", [True, False])
def test_an_empty_text_is_none_only_where_it_is_encoded_so(empty_too: bool) -> None:
    pipe = Zeroes(empty_too)
    (name,) = negative_prompts(pipe, {"negative_prompt": ["", ""]})
    assert (name == "") == empty_too
    assert negative_texts(name, 2) == (None if empty_too else ["", ""])
    assert negative_prompts(pipe, {"negative_prompt": None}) == {""}
    none = {"negative_prompt_embeds": torch.zeros(1, 5, 4)}
    assert negative_prompts(pipe, none, "") == {""}
    assert (negative_prompts(pipe, {"negative_prompt_embeds": embedding("one", 0, 5)}, "") == {""}) is False


def test_a_name_is_of_all_that_was_passed() -> None:
    (first,) = negative_prompts(Two(), passed("old", "old"), "")
    (again,) = negative_prompts(Two(), passed("old", "old"), first)
    (other,) = negative_prompts(Two(), passed("old", "new"), first)
    assert first == again != other
