"""Builds a knowledge base from a diffusers pipeline (the paper's Algorithm 1), and says what that pipeline is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from redi.errors import InvalidInputError
from redi.knowledge_base import Config, Fingerprint, KnowledgeBase, Writer, weight_hash
from redi.noise import NoiseBank
from redi.plan import Plan, Route
from redi.recorder import Recorder, listening
from redi.solvers import DiffusersSolver
from redi.transports import needs
from redi.types import Record


def network(pipe: Any) -> torch.nn.Module:
    """The denoising network of a pipeline: its `unet` or `transformer`."""
    for name in ("unet", "transformer"):
        module = getattr(pipe, name, None)
        if isinstance(module, torch.nn.Module):
            return _uncompiled(module)
    raise InvalidInputError(f"expected a pipeline with a unet or a transformer, given {type(pipe).__name__}")


def changeable(pipe: Any) -> dict[str, Any]:
    """The fields of a pipeline's fingerprint that its user may change from one call to the next."""
    net: Any = network(pipe)
    active = getattr(pipe, "get_active_adapters", list)
    return {
        "adapters": tuple(active()) if getattr(net, "peft_config", None) else (),
        "dtype": str(net.dtype).removeprefix("torch."),
    }


def _uncompiled(module: torch.nn.Module) -> torch.nn.Module:
    """What `torch.compile` wrapped: the same weights under their own names."""
    return getattr(module, "_orig_mod", module)


def fingerprint(
    pipe: Any,
    solver: DiffusersSolver,
    *,
    steps: int,
    guidance: float,
    sample_shape: Sequence[int],
    height: int | None = None,
    width: int | None = None,
    guidance_rescale: float = 0.0,
    negative_prompt: str = "",
    model: str | None = None,
) -> Fingerprint:
    """What a pipeline and its settings are, so that rows are served only where they belong.

    Args:
        pipe: the pipeline; network and text encoders are hashed.
        solver: the solver that runs.
        steps: fine solver steps.
        guidance: classifier-free guidance scale.
        sample_shape: shape of one sample.
        height: picture height in pixels.
        width: picture width in pixels.
        guidance_rescale: as the pipeline's argument.
        negative_prompt: as the pipeline's argument, "" for none.
        model: a name for the model; None takes the folder or Hub id it was loaded from.
    """
    net = network(pipe)
    encoders = [
        (name, _uncompiled(module))
        for name, module in sorted(pipe.components.items())
        if name.startswith("text_encoder") and isinstance(module, torch.nn.Module)
    ]
    tensors = (
        (f"{part}.{name}", tensor)
        for part, module in [("network", net), *encoders]
        for name, tensor in module.state_dict().items()
    )
    return Fingerprint(
        model=model or str(pipe.config.get("_name_or_path", "") or type(pipe).__name__),
        weights=weight_hash(tensors),
        pipeline=type(pipe).__name__,
        scheduler=solver.name,
        scheduler_config=dict(solver.config),
        steps=steps,
        guidance=float(guidance),
        guidance_rescale=float(guidance_rescale),
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        sample_shape=tuple(sample_shape),
        **changeable(pipe),
    )


@final
@dataclass(frozen=True)
class Progress:
    """Where a build stands.

    Args:
        done: rows finished, those of earlier builds included.
        total: rows in all.
        seconds: since this build began.
        refused: rows of this build that were not finite and so not written.
    """

    done: int
    total: int
    seconds: float
    refused: int = 0


def build(
    pipe: Any,
    prompts: Iterable[str],
    folder: str | Path,
    *,
    plans: Sequence[Plan],
    solver: DiffusersSolver | None = None,
    noises: int = 1,
    seed: int = 0,
    diversity: float = 0.0,
    guidance: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str = "",
    batch_size: int = 16,
    storage: str = "float16",
    model: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> KnowledgeBase:
    """Algorithm 1 of the paper: run every prompt from every bank noise finely and keep what the plans need.

    A folder that holds a knowledge base of the same settings is continued: finished rows are not computed again.

    Args:
        pipe: a diffusers pipeline.
        prompts: one row each, per noise.
        folder: where the knowledge base goes.
        plans: what it shall serve; all of the same fine steps.
        solver: the fine solver; None is the pipeline's own scheduler.
        noises: M, starting noises in the bank.
        seed: of the bank.
        diversity: η, how far from its bank noise a query may start.
        guidance: classifier-free guidance scale.
        height: in pixels; None is the pipeline's default.
        width: likewise.
        negative_prompt: for every row.
        batch_size: pictures per pipeline call.
        storage: dtype on disk.
        model: a name for the model.
        progress: told at the start and after every batch.

    Returns:
        The knowledge base, opened.

    Raises:
        InvalidInputError: arguments that cannot work, or a pipeline that does not start from noise.
        UnsupportedSolverError: a scheduler that does not replay.
        FingerprintMismatchError: the folder's rows are of other settings.
    """
    if isinstance(prompts, str):
        raise InvalidInputError(f"expected a list of prompts, given one text; for a single row: [{prompts!r}]")
    if batch_size < 1:
        raise InvalidInputError(f"batch_size must be at least 1, given {batch_size}")
    prompts = list(dict.fromkeys(prompts))
    if not prompts or not plans:
        raise InvalidInputError("a knowledge base needs at least one prompt and one plan, given none")
    if len({p.fine for p in plans}) > 1:
        raise InvalidInputError(f"plans of one build share their fine steps, given {', '.join(map(str, plans))}")
    solver = solver or DiffusersSolver.of(pipe.scheduler)
    steps = plans[0].fine
    schedule = solver.schedule(steps)
    record = Record()
    for plan in plans:
        record |= needs(Route.lay(plan, schedule), solver)
    net: Any = network(pipe)
    factor = int(getattr(pipe, "vae_scale_factor", 8))
    size = net.config.sample_size
    rows, columns = size if isinstance(size, (tuple, list)) else (size, size)
    high, wide = height or int(rows) * factor, width or int(columns) * factor
    multiple = math.lcm(factor, 8)  # latents are whole, and diffusers' pipelines refuse what 8 does not divide
    if high % multiple or wide % multiple:
        raise InvalidInputError(f"height and width must be multiples of {multiple} pixels, given {high} and {wide}")
    shape = (int(net.config.in_channels), high // factor, wide // factor)
    bank = NoiseBank(seed=seed, size=noises, shape=shape, diversity=diversity)
    mark = fingerprint(
        pipe,
        solver,
        steps=steps,
        guidance=guidance,
        sample_shape=shape,
        height=high,
        width=wide,
        negative_prompt=negative_prompt,
        model=model,
    )
    config = Config(
        fingerprint=mark, record=record, noise=bank.to_json(), plans=tuple(map(str, plans)), storage=storage
    )
    recorder = Recorder(solver, steps, record)
    start = time.monotonic()
    with listening(pipe, recorder), _quiet(pipe), Writer.open(Path(folder), config) as writer:
        todo = [(p, n) for n in range(noises) for p in prompts if (p, n) not in writer.done]
        total = len(prompts) * noises
        if progress is not None:
            progress(Progress(total - len(todo), total, time.monotonic() - start))
        for i in range(0, len(todo), batch_size):
            batch = todo[i : i + batch_size]
            ids = torch.tensor([n for _, n in batch])
            arguments: dict[str, Any] = {"negative_prompt": [negative_prompt] * len(batch)} if negative_prompt else {}
            pipe(
                prompt=[p for p, _ in batch],
                latents=bank.noise(ids).to(net.device, net.dtype),
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=high,
                width=wide,
                output_type="latent",
                **arguments,
            )
            writer.append(recorder.rows(ids, [p for p, _ in batch]))
            if progress is not None:
                done = total - len(todo) + i + len(batch)
                progress(Progress(done, total, time.monotonic() - start, len(writer.refused)))
    return KnowledgeBase.open(Path(folder))


@contextmanager
def _quiet(pipe: Any) -> Generator[None]:
    """One bar for the whole build, not one for every batch."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**before | {"disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
