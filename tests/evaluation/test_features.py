"""Networks that judge pictures: the real loading code, and what is said where weights are missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity, interpolate
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from redi.errors import InvalidInputError, MissingExtraError
from redi.evaluation import Clip, EvaluatorFeatures, EvaluatorScore, Inception, LatentFeatures, Lpips
from redi.evaluator import Evaluator
from tests.tiny import seeded, tiny_tokenizer

WORDS = ["red apple", "green heart", "a cat"]


def pictures(n: int, side: int) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(n))


def test_the_evaluators_features_and_score_are_its_own() -> None:
    x, own = pictures(3, 32), Evaluator.load()
    latents = torch.zeros(3, 4, 8, 8)
    assert torch.equal(EvaluatorFeatures()(x, latents), own.features(x))
    assert torch.equal(EvaluatorScore()(x, WORDS), own.score(x, WORDS))
    # another size is brought to its own: of one colour it is the same picture
    colours = x[:, :, :1, :1]
    large, small = (colours.expand(3, 3, side, side) for side in (96, 32))
    torch.testing.assert_close(EvaluatorFeatures()(large, latents), own.features(small))
    torch.testing.assert_close(EvaluatorScore()(large, WORDS), own.score(small, WORDS))


def test_latents_are_their_own_features() -> None:
    latents = torch.randn(5, 2, 3, 3).half()
    assert torch.equal(LatentFeatures()(pictures(5, 8), latents), latents.float().flatten(1))
    assert [LatentFeatures().directions(n) for n in (2, 9, 40, 256, 5000)] == [1, 2, 10, 64, 64]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights, saved as the real one is."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = tiny_tokenizer(8)
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 8, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with seeded(0):
        config = CLIPConfig(
            text_config=text | sizes, vision_config=sizes | {"image_size": 16, "patch_size": 8}, projection_dim=8
        )
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
    return folder


def test_clip_is_loaded_from_a_folder_and_gives_the_cosine(clip: Path) -> None:
    score = Clip(clip)
    assert score.identity == f"clip:{clip}"
    x = pictures(3, 16)
    found = score(x, WORDS)
    # by hand: eight bits, OpenAI's mean and deviation, both towers
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    model, tokenizer = CLIPModel.from_pretrained(clip), tiny_tokenizer(8)
    for i, (picture, word) in enumerate(zip(x, WORDS, strict=True)):
        pixels = (((picture * 255).round() / 255 - mean) / deviation)[None]
        with torch.no_grad():
            seen = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
            ids = tokenizer(word, return_tensors="pt")
            read = model.text_projection(model.text_model(**ids).pooler_output)
        assert float(found[i]) == pytest.approx(float(cosine_similarity(seen, read)), abs=1e-5)
    assert score(x, ["red " * 50] * 3).isfinite().all()  # longer than it reads
    larger = interpolate(x, (40, 40), mode="bilinear")
    assert score(larger, WORDS).shape == (3,)


def test_weights_that_are_not_here_are_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInputError, match=r"CLIP's weights .*nowhere are not on this machine.*clip:FOLDER"):
        Clip(tmp_path / "nowhere")
    for package, make in (("torch_fidelity", Inception), ("torchvision", Lpips)):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(MissingExtraError, match=r"redi\[perceptual\]"):
                make()


def test_inceptions_weights_are_looked_for_on_this_machine_alone(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    with pytest.raises(InvalidInputError, match=r"not at .*none.pth; put torch-fidelity's"):
        Inception(tmp_path / "none.pth")


def test_alexnets_weights_are_looked_for_on_this_machine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InvalidInputError, match="LPIPS needs AlexNet's weights at"):
        Lpips()
