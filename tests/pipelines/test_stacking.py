"""redi together with what else changes a pipeline: adapters, caches inside the network, compilation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

import redi
from redi.errors import FingerprintMismatchError
from redi.pipelines import fingerprint
from redi.solvers import DiffusersSolver
from tests.pipelines.beds import PROMPTS, Bed, relative
from tests.pipelines.features import coarse


def _count(module: torch.nn.Module) -> tuple[list[int], Any]:
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    return calls, module.register_forward_hook(count)


def test_a_fused_adapter_is_refused() -> None:
    it = Bed("StableDiffusion")
    with it.enabled():
        it.pipe._merged_adapters = {"mine"}  # where diffusers keeps the names of what it fused into the weights
        assert it.pipe.fused_loras == {"mine"}
        with pytest.raises(FingerprintMismatchError, match="adapters"):
            it(PROMPTS, it.few)


def test_deepcache_and_redi_both_save() -> None:
    deepcache = pytest.importorskip("DeepCache")
    it = Bed("StableDiffusion")
    helper = deepcache.DeepCacheSDHelper(pipe=it.pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    inner = [0]
    original = it.pipe.unet.mid_block.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        inner[0] += 1
        return original(*args, **kwargs)

    it.pipe.unet.mid_block.forward = counting
    for plan, transport, steps, nfe, deep in (
        (it.plans[0], None, it.few, 3, 2),
        (it.plans[1], redi.Value(), 10, 6, 3),  # entries 0, 1, 6, 7, 8, 9, of which the even ones go deep
    ):
        with it.enabled(plan=plan, transport=transport):
            helper.enable()
            inner[0] = 0
            with it.counted() as whole:
                out = it(PROMPTS, steps)
            helper.disable()
        assert whole == [nfe]
        assert inner == [deep]
        assert torch.isfinite(out).all()


def _first_block(pipe: Any) -> Any:
    return FirstBlockCacheConfig(threshold=1e6)


def _broadcast(pipe: Any) -> Any:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("single_transformer_blocks",),
        current_timestep_callback=lambda: pipe._current_timestep,
    )


@pytest.mark.parametrize("cache", [_first_block, _broadcast])
def test_a_transformer_cache_and_redi_both_save(cache: Any) -> None:
    it = Bed("Flux")
    network = it.pipe.transformer
    inner, handle = _count(network.single_transformer_blocks[0].attn.to_q)
    with it.enabled(), it.counted() as calls:
        it(PROMPTS, it.few)
        assert (calls, inner) == ([3], [3])
        network.enable_cache(cache(it.pipe))
        inner[0] = 0
        out = it(PROMPTS, it.few)
        network.disable_cache()
    handle.remove()
    assert calls == [6]
    assert inner[0] < 3
    assert torch.isfinite(out).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_network_leaps() -> None:
    it = Bed("StableDiffusion")
    it.pipe.unet = torch.compile(it.pipe.unet)
    with it.enabled():
        out = it(PROMPTS, it.few)
        assert redi.report(it.pipe).nfe == 3
    assert relative(out, it.fine) <= 1e-4


def test_weights_quantised_by_torchao_are_another_model_and_serve_their_own_rows() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    it = Bed("StableDiffusion")
    with it.enabled():
        torchao.quantize_(it.pipe.unet, torchao.Int8WeightOnlyConfig())
        with it.counted() as calls, pytest.raises(FingerprintMismatchError, match="float32 stored as Int8Tensor"):
            it(PROMPTS, it.few)
        assert calls == [0]
    with pytest.raises(FingerprintMismatchError, match="weights"), it.enabled():
        pass
    small = copy.copy(it)
    small.remember()
    coarse(small)
    other = Bed("StableDiffusion")
    torchao.quantize_(other.pipe.unet, torchao.Int8WeightOnlyConfig())
    assert fingerprint_of(other) == fingerprint_of(small)


def fingerprint_of(it: Bed) -> str:
    mark, solver = it.kb.fingerprint, DiffusersSolver.of(it.pipe.scheduler)
    return fingerprint(it.pipe, solver, steps=mark.steps, guidance=3.0, sample_shape=mark.sample_shape).weights
