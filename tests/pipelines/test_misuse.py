"""What users do to a pipeline while redi is active in it: what is noticed, what is refused, and that it survives."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import redi
from redi.errors import FingerprintMismatchError, InvalidInputError
from tests.pipelines.beds import PROMPTS, Bed, bed, relative

EXACT = 1e-5


@pytest.fixture
def it() -> Iterator[Bed]:
    shared = bed("StableDiffusion")
    yield shared
    redi.disable(shared.pipe)


def embedded(it: Bed, negative: list[str] | None = None, **more: Any) -> Tensor:
    embeds, negatives = it.pipe.encode_prompt(PROMPTS, "cpu", 1, True, negative_prompt=negative)
    own = [torch.Generator().manual_seed(0) for _ in PROMPTS]
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negatives, "generator": own} | more
    return it.pipe(num_inference_steps=it.few, **it.call | given)[0]


@pytest.mark.parametrize("key", [None, "prompt"])
def test_embeddings_serve_as_prompts_do(it: Bed, key: Any) -> None:
    with it.enabled(key=key):
        assert relative(embedded(it), it.fine) <= EXACT


def test_embeddings_of_another_negative_prompt_are_refused_by_name(it: Bed) -> None:
    with it.enabled(), it.counted() as calls:
        with pytest.raises(FingerprintMismatchError, match="negative_prompt: knowledge base has '', given 'embeddings"):
            embedded(it, ["old"] * 3)
        with pytest.raises(FingerprintMismatchError, match="negative_prompt"):
            embedded(it, ["", "", "old"])
        assert calls == [0]
    with it.enabled(on_mismatch="plain"):
        embedded(it, ["old"] * 3)
        assert "negative_prompt differ" in str(redi.report(it.pipe))


def test_embeddings_of_the_rows_own_negative_prompt_are_served() -> None:
    it = bed("StableDiffusion", negative_prompt=("old",) * 3)
    with it.enabled():
        assert relative(embedded(it, ["old"] * 3, negative_prompt=None), it.fine) <= EXACT
        with pytest.raises(FingerprintMismatchError, match="negative_prompt"):
            embedded(it, negative_prompt=None)


def test_rows_remember_which_negative_embeddings_they_were_made_with(it: Bed, tmp_path: Path) -> None:
    other = it.pipe.encode_prompt(["an old cat"], "cpu", 1, False)[0].expand(3, -1, -1)
    with redi.record(it.pipe, tmp_path, plans=it.plans[:1], storage="float32"):
        fine = _fine(it, other)
    redi.enable(it.pipe, redi.KnowledgeBase.open(tmp_path), neighbors=1)
    assert relative(embedded(it, negative_prompt_embeds=other), fine) <= EXACT
    with pytest.raises(FingerprintMismatchError, match="negative_prompt: knowledge base has 'embeddings"):
        embedded(it)
    with pytest.raises(FingerprintMismatchError, match="negative_prompt"):
        it(PROMPTS, it.few)


def test_rows_of_negative_embeddings_remember_what_belongs_to_them(tmp_path: Path) -> None:
    it = bed("StableDiffusionXL")
    given = encoded(it)
    other = {name: given[name] + 0.5 for name in given if name.startswith("negative_p") and given[name] is not None}
    call = it.call | given | other
    with redi.record(it.pipe, tmp_path, plans=it.plans[:1], storage="float32"):
        fine = it.pipe(num_inference_steps=it.steps, **call)[0]
    redi.enable(it.pipe, redi.KnowledgeBase.open(tmp_path), neighbors=1)
    try:
        assert relative(it.pipe(num_inference_steps=it.few, **call)[0], fine) <= EXACT
        for name in other:
            with pytest.raises(FingerprintMismatchError, match="negative_prompt: knowledge base has 'embeddings"):
                it.pipe(num_inference_steps=it.few, **call | {name: given[name]})
    finally:
        redi.disable(it.pipe)


def test_no_text_is_made_up_for_rows_of_negative_embeddings(it: Bed, tmp_path: Path) -> None:
    other = it.pipe.encode_prompt(["an old cat"], "cpu", 1, False)[0].expand(3, -1, -1)
    with redi.record(it.pipe, tmp_path, plans=it.plans[:1], storage="float32"):
        _fine(it, other)
    with pytest.raises(InvalidInputError, match=r"rows were made with negative embeddings [0-9a-f]{8}"):
        redi.tune(redi.KnowledgeBase.open(tmp_path), pipe=it.pipe, prompts=[f"an old cat {i}" for i in range(8)])


@pytest.mark.parametrize(("name", "part"), [("StableDiffusionXL", "pooled"), ("PixArtSigma", "mask")])
def test_what_belongs_to_negative_embeddings_is_compared_too(name: str, part: str) -> None:
    it = bed(name)
    given = encoded(it)
    with it.enabled():
        assert relative(it.pipe(num_inference_steps=it.few, **it.call | given)[0], it.fine) <= EXACT
        (other,) = (n for n in given if n.startswith("negative") and part in n)
        with pytest.raises(FingerprintMismatchError, match="negative_prompt: knowledge base has '', given 'embeddings"):
            it.pipe(num_inference_steps=it.few, **it.call | given | {other: 1 - given[other]})


def encoded(it: Bed) -> dict[str, Any]:
    """What a pipeline makes of the prompts, as its call takes it, and no prompts."""
    names = {
        "StableDiffusionXL": ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds"),
        "PixArtSigma": ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds"),
    }[it.name]
    last = "negative_pooled_prompt_embeds" if it.name == "StableDiffusionXL" else "negative_prompt_attention_mask"
    own = [torch.Generator().manual_seed(0) for _ in PROMPTS]
    made = it.pipe.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=True)
    return {**dict(zip((*names, last), made, strict=True)), "generator": own, "negative_prompt": None}


def test_an_empty_negative_prompt_is_none_unless_none_is_zeros(it: Bed) -> None:
    with it.enabled():
        assert relative(it(PROMPTS, it.few, negative_prompt=[""] * 3), it.fine) <= EXACT
    xl = bed("StableDiffusionXL")
    with xl.enabled():
        assert relative(xl(PROMPTS, xl.few, negative_prompt=None), xl.fine) <= EXACT
        for empty in ("", [""] * 3):
            with pytest.raises(FingerprintMismatchError, match="has '', given 'an empty text, not none'"):
                xl(PROMPTS, xl.few, negative_prompt=empty)
        given = encoded(xl)
        text = xl.pipe.encode_prompt(PROMPTS, negative_prompt=[""] * 3, do_classifier_free_guidance=True, device="cpu")
        with pytest.raises(FingerprintMismatchError, match="given 'embeddings"):
            xl.pipe(num_inference_steps=xl.few, **xl.call | given | {"negative_prompt_embeds": text[1]})
    empty = bed("StableDiffusionXL", negative_prompt=("",) * 3)
    with empty.enabled():
        assert relative(empty(PROMPTS, empty.few), empty.fine) <= EXACT
        with pytest.raises(FingerprintMismatchError, match="has 'an empty text, not none', given ''"):
            empty(PROMPTS, empty.few, negative_prompt=None)


def _fine(it: Bed, negatives: Tensor) -> Tensor:
    embeds = it.pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    own = [torch.Generator().manual_seed(0) for _ in PROMPTS]
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negatives, "generator": own}
    return it.pipe(num_inference_steps=it.steps, **it.call | given)[0]


def test_text_encoders_may_go_once_prompts_are_embedded(it: Bed) -> None:
    other = copy.copy(it)
    other.pipe = copy.deepcopy(it.pipe)
    embeds, negatives = it.pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    with other.enabled():
        other.pipe.text_encoder = None
        own = [torch.Generator().manual_seed(0) for _ in PROMPTS]
        given = {"prompt_embeds": embeds, "negative_prompt_embeds": negatives, "generator": own}
        out = other.pipe(num_inference_steps=it.few, **it.call | given)[0]
    assert relative(out, it.fine) <= EXACT


@pytest.mark.parametrize(
    ("given", "name"),
    [({"clip_skip": 1}, "clip_skip"), ({"cross_attention_kwargs": {"scale": 0.5}}, "cross_attention_kwargs")],
)
def test_what_shapes_every_picture_must_be_what_it_was(it: Bed, given: dict[str, Any], name: str) -> None:
    with it.enabled(), it.counted() as calls, pytest.raises(FingerprintMismatchError, match=name):
        it(PROMPTS, it.few, **given)
    assert calls == [0]


def test_more_pictures_than_noises_are_refused_before_the_model_is_called(it: Bed) -> None:
    with it.enabled(), it.counted() as calls, pytest.raises(redi.ReDiError, match="bank of 2 noises"):
        it(PROMPTS[:1], it.few, generator=torch.Generator().manual_seed(0), num_images_per_prompt=3)
    assert calls == [0]


@pytest.mark.parametrize("generator", [[1, 2, 3], 7])
def test_seeds_that_are_no_generators_are_refused_with_what_to_write(it: Bed, generator: Any) -> None:
    with it.enabled(), pytest.raises(InvalidInputError, match="manual_seed"):
        it(PROMPTS, it.few, generator=generator)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_another_network_in_a_networks_place_is_refused(part: str) -> None:
    it = Bed("StableDiffusion")
    with it.enabled():
        own = getattr(it.pipe, part)
        setattr(it.pipe, part, copy.deepcopy(own))
        with it.counted() as calls, pytest.raises(InvalidInputError, match=f"{part} became another"):
            it(PROMPTS, it.few)
        assert calls == [0]
        setattr(it.pipe, part, own)
        assert relative(it(PROMPTS, it.few), it.fine) <= EXACT


def test_new_words_are_refused() -> None:
    it = Bed("StableDiffusion")
    with it.enabled():
        embedding = torch.randn(16, generator=torch.Generator().manual_seed(0))
        it.pipe.load_textual_inversion({"<mine>": embedding}, token="<mine>")
        with pytest.raises(InvalidInputError, match="text_encoder became another while redi is active, or learnt new"):
            it(PROMPTS, it.few)


def test_freeu_is_another_model_and_has_rows_of_its_own() -> None:
    it = Bed("StableDiffusion")
    with it.enabled():
        it.pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
        with pytest.raises(FingerprintMismatchError, match=r"adapters: .*FreeU\(s1=0.9, s2=0.2, b1=1.5, b2=1.6\)"):
            it(PROMPTS, it.few)
        it.pipe.disable_freeu()
        assert relative(it(PROMPTS, it.few), it.fine) <= EXACT
    it.pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    small = copy.copy(it)
    small.remember()
    with small.enabled():
        assert relative(small(PROMPTS, it.few), small.fine) <= EXACT
        it.pipe.disable_freeu()
        with pytest.raises(FingerprintMismatchError, match="adapters"):
            small(PROMPTS, it.few)


def test_a_call_from_within_a_call_is_refused_and_leaves_no_trace(it: Bed) -> None:
    refused: list[str] = []

    def again(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(InvalidInputError, match="in the middle of a call") as found:
            pipe(PROMPTS[0], num_inference_steps=it.few, guidance_scale=3.0)
        refused.append(str(found.value))
        return {}

    with it.enabled():
        before = it(PROMPTS, it.few)
        assert torch.equal(it(PROMPTS, it.few, callback_on_step_end=again), before)
        assert len(refused) == 3
        assert torch.equal(it(PROMPTS, it.few), before)


def test_two_pipelines_in_two_threads_do_not_meet() -> None:
    both = [Bed("StableDiffusion") for _ in range(2)]
    kb = both[0].kb
    redi.enable(both[0].pipe, kb, neighbors=1)
    redi.enable(both[1].pipe, kb, neighbors=1, plan=both[1].plans[1], transport=redi.Value())
    steps = (both[0].few, 10)
    alone = [it(PROMPTS, n) for it, n in zip(both, steps, strict=True)]
    wrong: list[Any] = []

    def work(it: Bed, n: int, expected: Tensor) -> None:
        wrong.extend(n for _ in range(5) if not torch.equal(it(PROMPTS, n), expected))

    threads = [threading.Thread(target=work, args=given) for given in zip(both, steps, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_one_pipeline_in_two_threads_is_refused(it: Bed) -> None:
    inside, told = threading.Event(), threading.Event()
    found: list[BaseException] = []

    def wait(*_: Any) -> dict[str, Any]:
        inside.set()
        assert told.wait(30)
        return {}

    def other() -> None:
        assert inside.wait(30)
        try:
            it(PROMPTS, it.few)
        except redi.ReDiError as e:
            found.append(e)
        finally:
            told.set()

    with it.enabled():
        before = it(PROMPTS, it.few)
        thread = threading.Thread(target=other)
        thread.start()
        out = it(PROMPTS, it.few, callback_on_step_end=wait)
        thread.join()
    assert torch.equal(out, before)
    assert "another thread" in str(found[0])


def test_an_interrupted_coarse_call_ends_and_the_next_is_whole(it: Bed) -> None:
    def stop(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True  # as diffusers documents it
        return {}

    with it.enabled():
        before = it(PROMPTS, it.few)
        it(PROMPTS, it.few, callback_on_step_end=stop)
        assert redi.report(it.pipe).nfe == 1
        assert torch.equal(it(PROMPTS, it.few), before)


def test_a_default_dtype_of_the_users_own_changes_nothing(it: Bed) -> None:
    noise = it.noise(0)
    with it.enabled():
        before = it(PROMPTS, it.few, latents=noise)
        distances = redi.report(it.pipe).distances
        torch.set_default_dtype(torch.bfloat16)
        try:
            weights = redi.ReDiEngine.serving(it.kb, it.plans[0])[0].recall(noise, torch.zeros(3, dtype=torch.int64), 0)
            after = it(PROMPTS, it.few, latents=noise)
        finally:
            torch.set_default_dtype(torch.float32)
        assert weights.weights.dtype == weights.distances.dtype == torch.float32
        assert redi.report(it.pipe).distances == distances
    assert relative(after, before) <= EXACT


def test_another_pipeline_of_the_same_parts_runs_as_it_always_does(it: Bed) -> None:
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    given = {**it.call, "num_inference_steps": 7, "latents": latents}
    plain = it.pipe(PROMPTS, **given)[0]
    with it.enabled():
        it(PROMPTS, it.few)
        other = diffusers.StableDiffusionPipeline(**it.pipe.components, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        assert torch.equal(other(PROMPTS, **given)[0], plain)
        it(PROMPTS, it.few)
    assert torch.equal(other(PROMPTS, **given)[0], plain)


def test_settings_that_no_row_could_keep_are_refused(it: Bed, tmp_path: Path) -> None:
    for settings in ({"ip_adapter_image": torch.rand(1, 3, 8, 8)}, {"generator": 3}, {"negative_prompt_embeds": 1}):
        with pytest.raises(InvalidInputError, match=next(iter(settings))):
            redi.build(it.pipe, PROMPTS, tmp_path, plans=[redi.Plan.coarse(3, 10)], settings=settings)
    assert not (tmp_path / "config.json").exists()


def test_adapters_are_loaded_weighed_fused_and_unloaded(tmp_path: Path) -> None:
    """By diffusers' own `load_lora_weights`, from a file."""
    pytest.importorskip("peft")
    it = Bed("StableDiffusion")
    folder = _lora(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with it.enabled():
            it.pipe.load_lora_weights(folder, adapter_name="mine")
            with it.counted() as calls, pytest.raises(FingerprintMismatchError, match=r"adapters: .*\('mine',\)"):
                it(PROMPTS, it.few)
            assert calls == [0]
        small = copy.copy(it)
        small.remember()
        with small.enabled():
            assert relative(small(PROMPTS, it.few), small.fine) <= EXACT
            it.pipe.set_adapters(["mine"], [0.5])
            with pytest.raises(FingerprintMismatchError, match=r"mine@0\.5"):
                small(PROMPTS, it.few)
            it.pipe.set_adapters(["mine"], [1.0])
            assert relative(small(PROMPTS, it.few), small.fine) <= EXACT
            it.pipe.unload_lora_weights()
            with pytest.raises(FingerprintMismatchError, match="adapters"):
                small(PROMPTS, it.few)
        with it.enabled():
            assert relative(it(PROMPTS, it.few), it.fine) <= EXACT
            it.pipe.load_lora_weights(folder, adapter_name="mine")
            it.pipe.fuse_lora()
            it.pipe.unload_lora_weights()  # what stays is in the weights
            with pytest.raises(FingerprintMismatchError, match="adapters"):
                it(PROMPTS, it.few)


def _lora(folder: Path) -> Path:
    """A LoRA in diffusers' file format."""
    import peft
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    pipe = Bed("StableDiffusion").pipe
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
        pipe.unet.add_adapter(config, "x")
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet, adapter_name="x"))
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder


def test_schedulers_of_sound_are_refused_by_name() -> None:
    with pytest.raises(redi.ReDiError, match="counts signal"):  # LongCat-AudioDiT's
        redi.DiffusersSolver.of(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    with pytest.raises(redi.ReDiError, match="CosineDPMSolverMultistepScheduler"):  # Stable Audio's
        redi.DiffusersSolver.from_config("CosineDPMSolverMultistepScheduler", {})
