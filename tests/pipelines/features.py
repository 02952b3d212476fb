"""What must hold of an enabled pipeline, one function for each feature; they refuse by letting redi's error through."""

from __future__ import annotations

import copy
import gc
import io
import tempfile
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from tqdm.auto import tqdm

import redi
from redi.errors import FingerprintMismatchError, InvalidInputError, PlanError
from tests.pipelines.beds import PROMPTS, STEPS, STRANGER, Bed, bed, parameters_of, relative

EXACT = 1e-5  # relative, float32


def _leaps(it: Bed, plan: str, transport: Any, calls: int) -> None:
    steps = it.few if plan.startswith("coarse") else STEPS
    with it.enabled(plan=plan, transport=transport), it.counted() as made:
        leapt = it(PROMPTS, steps)
        report = redi.report(it.pipe)
    assert relative(leapt, it.fine) <= EXACT
    assert report.neighbors == tuple((i,) for i in _rows_of(it, report.noise_ids))
    assert report.leapt == (True,) * len(PROMPTS)
    assert report.nfe == calls
    per_step = _network_calls_per_step(it)
    assert made == [calls * per_step]


def _rows_of(it: Bed, noise_ids: tuple[int, ...]) -> list[int]:
    """The rows of the prompts' own trajectories."""
    known = list(zip((p.split(" [")[0] for p in it.kb.prompts), it.kb.noise_ids.tolist(), strict=True))
    return [known.index((p, n)) for p, n in zip(PROMPTS, noise_ids, strict=True)]


def _network_calls_per_step(it: Bed) -> int:
    once_for_each = it.name == "Wan" and it.call["guidance_scale"] > 1  # with the prompt, and without
    return 2 if once_for_each or it.call.get("true_cfg_scale", 1) > 1 else 1


def coarse(it: Bed) -> None:
    """With its own row in the knowledge base a query gets the fine picture, in three calls."""
    _leaps(it, it.plans[0], None, 3)
    if not it.case.recorded:
        assert relative(it(PROMPTS, it.few, latents=it.noise(0)), it.fine) > 100 * EXACT  # as the solver alone does not


def half_calls(it: Bed) -> None:
    """So it does where half of its first calls is left to the rows (`at:0h,2h,4/10`)."""
    plan, folder = f"at:0h,2h,4/{it.steps}", Path(tempfile.mkdtemp()) / "kb"
    if it.case.recorded:  # say what says so to who tries
        with redi.record(it.pipe, folder, plans=[plan]):
            it(PROMPTS, STEPS)
    try:
        kb, rows = it.built([plan], folder), [0]
    except PlanError:
        assert not folder.exists()  # refused before anything was written
        raise

    def count(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        rows[0] += len(output[0])

    redi.enable(it.pipe, kb, neighbors=1)
    handle = it.network.register_forward_hook(count, with_kwargs=True, prepend=True)
    try:
        leapt = it(PROMPTS, 3)
        assert redi.report(it.pipe).nfe == 2
        assert rows[0] == 2 * 2 * len(PROMPTS)
        assert relative(leapt, it.fine) <= EXACT
    finally:
        handle.remove()
        redi.disable(it.pipe)


def _jump(it: Bed, transport: Any) -> None:
    plan = next((p for p in it.plans if p.startswith("jump")), None)
    if plan is None:  # say what says so to who tries
        with redi.record(it.pipe, Path(tempfile.mkdtemp()) / "kb", plans=[f"jump:2:4/{it.steps}"]):
            it(PROMPTS, STEPS)
    steps = STEPS + (it.pipe.scheduler.__class__.__name__ == "PNDMScheduler")
    two = "Heun" in it.pipe.scheduler.__class__.__name__
    calls = (2 * STEPS - 1 - 8 if two else steps - 4) + transport.calls
    _leaps(it, str(plan), transport, calls)


def jump_value(it: Bed) -> None:
    """The paper's jump leads to the fine picture."""
    _jump(it, redi.Value())


def jump_residual(it: Bed) -> None:
    """So does the jump that keeps what the neighbours do not explain."""
    _jump(it, redi.Residual())


def jump_defect(it: Bed) -> None:
    """So does the jump that calls the model once."""
    _jump(it, redi.Defect())


def generators(it: Bed) -> None:
    """A seed gives one picture, other seeds others; a list of generators is one for each picture."""
    with it.enabled():
        first, again = (it(PROMPTS, it.few, 1) for _ in range(2))
        assert torch.equal(first, again)
        others = [it(PROMPTS, it.few, seed) for seed in range(2, 8)]
        assert any(relative(x, first) > 1e-3 for x in others)
        it(PROMPTS, it.few, generator=[torch.Generator().manual_seed(s) for s in (1, 2, 3)])
        ids = redi.report(it.pipe).noise_ids
        for i, seed in enumerate((1, 2, 3)):
            it(PROMPTS[i : i + 1], it.few, generator=torch.Generator().manual_seed(seed))
            assert redi.report(it.pipe).noise_ids == ids[i : i + 1]


def pictures_per_prompt(it: Bed) -> None:
    """Two pictures of a prompt start from two noises."""
    name = next(n for n in parameters_of(it.name) if n.startswith("num_") and n.endswith("_per_prompt"))
    with it.enabled():
        out = it(PROMPTS[:1], it.few, generator=torch.Generator().manual_seed(0), **{name: 2})
        assert len(out) == 2
        assert sorted(redi.report(it.pipe).noise_ids) == [0, 1]
    assert relative(out[0], out[1]) > 1e-3


def batches(it: Bed) -> None:
    """A picture does not depend on what it is batched with."""
    with it.enabled():
        together = it(PROMPTS, it.few)
        alone = torch.cat([it([p], it.few) for p in PROMPTS])
    assert relative(together, alone) <= EXACT


def mixed_batches(it: Bed) -> None:
    """Near and far samples of a batch are what each is alone, and the report tells them apart."""
    for plan in it.plans:
        steps, transport = (it.few, None) if plan.startswith("coarse") else (STEPS, redi.Value())
        with it.enabled(plan=plan, transport=transport, neighbors=2):
            it(PROMPTS, steps)
            apart = min(d[-1] for d in redi.report(it.pipe).distances)  # of a row's nearest other row
        with it.enabled(plan=plan, transport=transport, gate=redi.Gate(1e-2 * apart)):
            pair = it([PROMPTS[0], STRANGER], steps)
            assert redi.report(it.pipe).leapt == (True, False)
            near, far = it(PROMPTS[:1], steps), it([STRANGER], steps)
            assert redi.report(it.pipe).leapt == (False,)
        assert relative(pair, torch.cat([near, far])) <= EXACT
        assert relative(near, it.fine[:1]) <= EXACT


def callbacks(it: Bed) -> None:
    """`callback_on_step_end` is called after each call that is made, and may change the sample."""
    seen: list[tuple[int, float]] = []

    def look(pipe: Any, i: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((i, float(t)))
        return {"latents": tensors["latents"] * 0.5} if len(seen) == 3 else {}

    with it.enabled():
        whole = it(PROMPTS, it.few)
        halved = it(PROMPTS, it.few, callback_on_step_end=look)
        assert relative(halved, 0.5 * whole) <= 0.1
        assert relative(halved, whole) > 0.1
    assert [i for i, _ in seen] == [0, 1, 2]
    assert [t for _, t in seen] == sorted((t for _, t in seen), reverse=True)


def guidance_off(it: Bed) -> None:
    """Rows without guidance serve calls without it, and no others."""
    off = bed(it.name, guidance_scale=1.0)
    coarse(off)
    with off.enabled(), pytest.raises(FingerprintMismatchError, match="guidance_scale"):
        off(PROMPTS, off.few, guidance_scale=3.0)


def negative_prompts(it: Bed) -> None:
    """Rows with a negative prompt serve calls with it, and no others."""
    negative = bed(it.name, negative_prompt=("old",) * 3, **({"true_cfg_scale": 2.0} if "Flux" in it.name else {}))
    coarse(negative)
    with negative.enabled(), pytest.raises(FingerprintMismatchError, match="negative_prompt"):
        negative(PROMPTS, negative.few, negative_prompt=None)


def guidance_rescale(it: Bed) -> None:
    """Rows with rescaled guidance serve calls with it, and no others."""
    rescaled = bed(it.name, guidance_rescale=0.7)
    coarse(rescaled)
    with rescaled.enabled(), pytest.raises(FingerprintMismatchError, match="guidance_rescale"):
        rescaled(PROMPTS, rescaled.few, guidance_rescale=0.1)


def half_precision(it: Bed) -> None:
    """A bfloat16 pipeline comes as near to its fine picture as its precision lets it."""
    half = bed(it.name, dtype="bfloat16")
    for plan in half.plans:
        transport = None if plan.startswith("coarse") else redi.Value()
        with half.enabled(plan=plan, transport=transport):
            out = half(PROMPTS, half.few if transport is None else STEPS)
        assert relative(out, half.fine) <= 3e-2


def eta_zero(it: Bed) -> None:
    """`eta=0` is the deterministic solver."""
    with it.enabled():
        assert relative(it(PROMPTS, it.few, eta=0.0), it.fine) <= EXACT


def eta(it: Bed) -> None:
    """`eta` above 0 draws noise in every step."""
    with it.enabled():
        it(PROMPTS, it.few, eta=0.3)


def custom_schedule(it: Bed) -> None:
    """Sigmas or timesteps of the caller's own are another schedule."""
    given = {"sigmas": [1.0, 0.6, 0.2]} if "sigmas" in parameters_of(it.name) else {"timesteps": [900, 500, 100]}
    with it.enabled():
        it(PROMPTS, it.few, **given)


def denoising_window(it: Bed) -> None:
    """A part of the schedule."""
    with it.enabled():
        it(PROMPTS, it.few, denoising_end=0.5)


def other_guidance(it: Bed) -> None:
    """Another guidance than the rows'."""
    with it.enabled():
        it(PROMPTS, it.few, guidance_scale=5.0)


def other_steps(it: Bed) -> None:
    """A number of steps that no plan has."""
    with it.enabled():
        it(PROMPTS, STEPS - 1)


def compiled(it: Bed) -> None:
    """A network compiled before or after enabling is the same network: the same rows serve, in as many calls."""
    own = Bed(it.name)
    name = "unet" if hasattr(own.pipe, "unet") else "transformer"
    with own.counted() as calls:  # of the network itself, inside what the compiler makes of it
        with own.enabled():
            setattr(own.pipe, name, torch.compile(own.network, backend="eager"))
            after = own(PROMPTS, own.few)
            assert redi.report(own.pipe).nfe == 3
        with own.enabled():
            before = own(PROMPTS, own.few)
    assert calls == [2 * 3 * _network_calls_per_step(own)]
    assert max(relative(before, own.fine), relative(after, own.fine)) <= EXACT


def adapters(it: Bed) -> None:
    """A LoRA loaded after enabling is noticed at the next call; rows made with it serve it."""
    peft = pytest.importorskip("peft")
    own = Bed(it.name)
    target = [n.rpartition(".")[2] for n, m in own.network.named_modules() if isinstance(m, torch.nn.Linear)]
    config = peft.LoraConfig(r=2, target_modules=sorted(set(target) & {"to_q", "to_v"}), init_lora_weights=False)
    with own.enabled():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own.network.add_adapter(config, "mine")
        with own.counted() as calls, pytest.raises(FingerprintMismatchError, match="adapters"):
            own(PROMPTS, own.few)
        assert calls == [0]
    own.remember()
    coarse(own)


def eight_bits(it: Bed) -> None:
    """Weights stored in eight bits after enabling are noticed at the next call, and have rows of their own."""
    own = Bed(it.name)
    with own.enabled():
        own.network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        with own.counted() as calls, pytest.raises(FingerprintMismatchError, match="float8_e4m3fn"):
            own(PROMPTS, own.few)
        assert calls == [0]
    own.remember()
    coarse(own)


def offloaded(it: Bed) -> None:
    """Weights that are offloaded once redi is enabled are served; before it they cannot be told from others."""
    accelerate = pytest.importorskip("accelerate")
    own = Bed(it.name)
    with own.enabled():
        accelerate.cpu_offload(own.network, torch.device("cpu"))
        assert relative(own(PROMPTS, own.few), own.fine) <= EXACT
    with pytest.raises(InvalidInputError, match="enable redi"), own.enabled():
        pass


def stochastic_scheduler(it: Bed) -> None:
    """A scheduler that draws noise in every step."""
    pipe = copy.copy(it.pipe)
    flow = isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    pipe.scheduler = (
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True) if flow else EulerAncestralDiscreteScheduler()
    )
    if it.case.recorded:
        with redi.record(pipe, Path(tempfile.mkdtemp()) / "kb", plans=it.plans[:1]):
            raise AssertionError("nothing may run")
    size = {name: it.call[name] for name in ("height", "width")}
    plans = [redi.Plan.parse(it.plans[0])]
    redi.build(pipe, PROMPTS, Path(tempfile.mkdtemp()) / "kb", plans=plans, **size)


def plain_fallback(it: Bed) -> None:
    """With `on_mismatch="plain"` other settings get the pipeline's own picture."""
    plain = it(PROMPTS, STEPS - 1, guidance_scale=2.0)
    with it.enabled(on_mismatch="plain"):
        assert torch.equal(it(PROMPTS, STEPS - 1, guidance_scale=2.0), plain)
        assert "plain solver" in str(redi.report(it.pipe))


def recorded_calls(it: Bed) -> None:
    """`redi.record` remembers a call's run; with it the same call leaps to the same result."""
    with tempfile.TemporaryDirectory() as folder:
        with redi.record(it.pipe, Path(folder, "kb"), plans=it.plans[:1], storage="float32") as rows:
            fine = it(PROMPTS, STEPS, 5)
        assert rows.rows == len(PROMPTS)
        redi.enable(it.pipe, redi.KnowledgeBase.open(Path(folder, "kb")), neighbors=1)
        try:
            assert relative(it(PROMPTS, it.few, 5), fine) <= EXACT
        finally:
            redi.disable(it.pipe)


def progress(it: Bed) -> None:
    """The bar ends full, and `num_timesteps` is the number of calls made."""
    for plan in it.plans:
        bars: list[Any] = []

        def bar(*args: Any, bars: list[Any] = bars, **kwargs: Any) -> Any:
            bars.append(tqdm(*args, **kwargs | {"disable": False, "file": io.StringIO()}))
            return bars[-1]

        transport = None if plan.startswith("coarse") else redi.Value()
        with pytest.MonkeyPatch.context() as patch, it.enabled(plan=plan, transport=transport):
            patch.setattr("diffusers.pipelines.pipeline_utils.tqdm", bar)
            it(PROMPTS, it.few if transport is None else STEPS)
            nfe = redi.report(it.pipe).nfe
        assert [bar.n for bar in bars] == [bar.total for bar in bars] == [nfe]
        if hasattr(it.pipe, "num_timesteps"):
            assert it.pipe.num_timesteps == nfe


def deep_copies(it: Bed) -> None:
    """A copy of an enabled pipeline is enabled, and apart from it."""
    with it.enabled():
        before = it(PROMPTS, it.few)
        twin = copy.deepcopy(it.pipe)
        other = copy.copy(it)
        other.pipe = twin
        assert torch.equal(other(PROMPTS, it.few), before)
        redi.disable(twin)
        assert torch.equal(it(PROMPTS, it.few), before)


def saving(it: Bed) -> None:
    """An enabled pipeline is saved as the pipeline it is."""
    if getattr(it.network, "_keep_in_fp32_modules", None):
        pytest.importorskip("accelerate", reason="diffusers does not load this class without it")
    with it.enabled(), tempfile.TemporaryDirectory() as folder:
        it(PROMPTS, it.few)
        it.pipe.save_pretrained(folder)
        loaded = type(it.pipe).__mro__[1].from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    other = copy.copy(it)
    other.pipe = loaded
    assert type(loaded.scheduler) is type(it.pipe.scheduler)
    configs = [{k: v for k, v in p.scheduler.config.items() if k[0] != "_"} for p in (loaded, it.pipe)]
    assert configs[0] == configs[1]
    redi.enable(loaded, it.kb, neighbors=1)
    assert relative(other(PROMPTS, it.few), it.fine) <= EXACT


def no_leaks(it: Bed) -> None:
    """Enabling and disabling a hundred times leaves the pipeline as it was, and nothing behind."""
    before = {k: id(v) for k, v in vars(it.pipe).items()}
    own = type(it.pipe), it.pipe.scheduler, set(vars(it.pipe.scheduler))
    seen: list[Any] = []
    for i in range(100):
        with it.enabled():
            if i % 50 == 0:
                it(PROMPTS[:1], it.few)
            seen += [weakref.ref(it.pipe.scheduler), weakref.ref(it.pipe._redi_interception)]
    gc.collect()
    assert not any(ref() for ref in seen)
    assert (type(it.pipe), it.pipe.scheduler, set(vars(it.pipe.scheduler))) == own
    after = {k: id(v) for k, v in vars(it.pipe).items() if k in before and not k.startswith("_")}
    assert after == {k: before[k] for k in after}
    assert set(vars(it.pipe)) - set(before) == set()


FEATURES: dict[str, Callable[[Bed], None]] = {
    f.__name__: f
    for f in (
        *(coarse, half_calls, jump_value, jump_residual, jump_defect, recorded_calls, mixed_batches, batches),
        *(generators, pictures_per_prompt, callbacks, guidance_off, negative_prompts, guidance_rescale),
        *(
            half_precision,
            eta_zero,
            compiled,
            adapters,
            eight_bits,
            offloaded,
            progress,
            plain_fallback,
            deep_copies,
            saving,
            no_leaks,
        ),
        *(eta, custom_schedule, denoising_window, other_guidance, other_steps, stochastic_scheduler),
    )
}
