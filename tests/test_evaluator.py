"""The evaluator's shapes, its refusals, and that it tells the bundled model's own pictures apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from redi import zoo
from redi.errors import InvalidInputError
from redi.evaluator import Evaluator

CAPTIONS = ("grinning face", "red heart", "sunflower", "octopus")
BLACK_AND_WHITE = {"emojione bw", "fluent high contrast"}


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator.load()


@pytest.fixture(scope="module")
def drawn(evaluator: Evaluator) -> tuple[Tensor, list[str], Tensor]:
    """Pictures of every caption in every style, their prompts, and the index of their style."""
    prompts = [f"{caption}, {style} style" for caption in CAPTIONS for style in evaluator.styles]
    images = zoo.load("emoji")(
        prompts,
        num_inference_steps=10,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    return images, prompts, torch.arange(len(evaluator.styles)).repeat(len(CAPTIONS))


def test_shapes(evaluator: Evaluator) -> None:
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features, joint = evaluator.features(images), evaluator.image_features(images)
    assert features.shape == (5, 128)
    assert evaluator.style_logits(images).shape == (5, len(evaluator.styles)) == (5, 11)
    texts = evaluator.text_features(["a dog", "", "привет"])
    assert texts.shape == (3, joint.shape[1])
    assert torch.isfinite(texts).all()
    torch.testing.assert_close(joint.norm(dim=1), torch.ones(5))
    assert evaluator.score(images, ["a"] * 5).abs().max() <= 1.0 + 1e-6


def test_rows_do_not_influence_each_other(evaluator: Evaluator) -> None:
    images = torch.rand(300, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(evaluator.features(images)[290:], evaluator.features(images[290:]), atol=1e-4, rtol=1e-4)
    texts = ["dog", "a very long caption with many more words"]
    torch.testing.assert_close(evaluator.text_features(texts)[:1], evaluator.text_features(texts[:1]))


def test_nothing_gives_nothing(evaluator: Evaluator) -> None:
    assert evaluator.features(torch.zeros(0, 3, 32, 32)).shape == (0, 128)
    assert len(evaluator.text_features([])) == 0


def test_recognises_the_style_it_was_drawn_in(evaluator: Evaluator, drawn: tuple[Tensor, list[str], Tensor]) -> None:
    images, _, styles = drawn
    found = evaluator.style_logits(images).argmax(dim=1)
    assert (found == styles).float().mean() > 0.4  # by chance 0.09
    uncoloured = torch.tensor([style in BLACK_AND_WHITE for style in evaluator.styles])
    assert (uncoloured[found] == uncoloured[styles]).float().mean() > 0.9  # by chance 0.7


def test_prefers_the_right_caption(evaluator: Evaluator, drawn: tuple[Tensor, list[str], Tensor]) -> None:
    images, _, styles = drawn
    cosines = evaluator.image_features(images) @ evaluator.text_features(CAPTIONS).T
    own = torch.arange(len(CAPTIONS)).repeat_interleave(len(evaluator.styles))
    assert (cosines.argmax(dim=1) == own).float().mean() > 0.7  # by chance 0.25
    assert len(styles) == len(own)


def test_scores_the_right_style_above_a_wrong_one(
    evaluator: Evaluator, drawn: tuple[Tensor, list[str], Tensor]
) -> None:
    images, prompts, _ = drawn
    wrong = [
        f"{caption}, {evaluator.styles[(i + 5) % len(evaluator.styles)]} style"
        for caption in CAPTIONS
        for i in range(len(evaluator.styles))
    ]
    assert (evaluator.score(images, prompts) > evaluator.score(images, wrong)).float().mean() > 0.7


def test_refuses_what_it_cannot_judge(evaluator: Evaluator) -> None:
    with pytest.raises(InvalidInputError, match="resize"):
        evaluator.features(torch.zeros(1, 3, 64, 64))
    with pytest.raises(InvalidInputError, match="one prompt for each picture"):
        evaluator.score(torch.zeros(2, 3, 32, 32), ["a dog"])
    with pytest.raises(InvalidInputError, match="list of strings"):
        evaluator.text_features("a dog")
