"""Test beds: a tiny pipeline, a knowledge base of its own fine runs, and those runs' results to compare with."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

import redi
from redi.builder import build
from redi.settings import walked
from tests.pipelines.models import make

PROMPTS = ["a red fox", "two green apples", "a blue car"]
STRANGER = "an old cat"  # of which there is no row
STEPS = 10
JUMP = "jump:2:6"
_SMALL, _WIDE = {"height": 16, "width": 16}, {"height": 32, "width": 32}
_EXACT = {"use_resolution_binning": False}
_SCHEDULES = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpm": ("DPMSolverMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "heun": ("HeunDiscreteScheduler", {}),
    "single": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "flow-heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "flow-dpm": ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    "flow-unipc": ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 2.0}),
}
JUMPS_ONLY = ("pndm", "heun", "single", "flow-heun")
_DIFFUSION = ("ddim", "dpm", "unipc", "euler", "lms", "deis", "pndm", "heun", "single")
_FLOW = ("flow-euler", "flow-unipc", "flow-dpm", "flow-heun")


def _pictures(**more: Any) -> dict[str, Any]:
    return {"image": torch.rand(len(PROMPTS), 3, 16, 16, generator=torch.Generator().manual_seed(7)), **more}


def _masked(**more: Any) -> dict[str, Any]:
    mask = torch.zeros(len(PROMPTS), 1, 16, 16)
    mask[..., :8] = 1
    return _pictures(mask_image=mask, **more)


@dataclass(frozen=True)
class Case:
    """A pipeline class in the matrix.

    Args:
        call: arguments of each of its calls; tensors among them have a row for each prompt.
        schedulers: that it runs with besides its own.
    """

    call: Mapping[str, Any] = field(default_factory=dict)
    schedulers: tuple[str, ...] = ()

    @property
    def recorded(self) -> bool:
        """Whether its rows come from calls that were made anyway."""
        return "image" in self.call


CASES: dict[str, Case] = {
    "StableDiffusion": Case(_SMALL, _DIFFUSION),
    "StableDiffusionXL": Case(_SMALL, _DIFFUSION),
    "StableDiffusion3": Case(_SMALL, ("flow-dpm",)),
    "Flux": Case(_SMALL, ("flow-dpm", "flow-unipc")),
    "PixArtSigma": Case(_SMALL | _EXACT, ("ddim", "euler")),
    "Sana": Case(_WIDE | _EXACT, _FLOW),
    "Wan": Case(_WIDE | {"num_frames": 5}, _FLOW),
    "AnimateDiff": Case(_SMALL | {"num_frames": 2}, ("dpm", "euler")),
    "StableDiffusionImg2Img": Case(_pictures(strength=0.6), ("dpm", "unipc", "euler")),
    "StableDiffusionInpaint": Case(_masked(strength=0.7, **_SMALL), ("dpm", "unipc", "euler")),
    "StableDiffusionControlNet": Case(_pictures(), ("dpm", "pndm")),
    "StableDiffusionXLImg2Img": Case(_pictures(strength=0.6), ("ddim",)),
    "StableDiffusionXLInpaint": Case(_masked(strength=1.0, **_SMALL), ("ddim",)),
    "StableDiffusionXLControlNet": Case(_pictures(), ("ddim",)),
    "StableDiffusion3Img2Img": Case(_pictures(strength=0.6, **_SMALL)),
    "FluxImg2Img": Case(_pictures(strength=0.6, **_SMALL)),
    "FluxInpaint": Case(_masked(strength=0.7, **_SMALL)),
}


class Bed:
    """A pipeline with its knowledge base.

    Args:
        name: of the case.
        scheduler: another than its own, by its name in this file.
        dtype: of the pipeline.
        call: further arguments of the runs that are remembered, and of all others.

    Attributes:
        fine: the results of the fine runs.
    """

    def __init__(self, name: str, scheduler: str = "", dtype: str = "float32", **call: Any) -> None:
        self.name, self.case, self.pipe = name, CASES[name], make(name)
        if scheduler:
            cls, settings = _SCHEDULES[scheduler]
            own = self.pipe.scheduler.config
            named = ("use_dynamic_shifting",) if scheduler.startswith("flow") else own
            kept = {k: own[k] for k in named if k in own and k not in ("prediction_type", "timestep_spacing")}
            self.pipe.scheduler = getattr(diffusers, cls).from_config(kept | settings)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.pipe.to(self.dtype)
        call = {k: list(v) if isinstance(v, tuple) else v for k, v in call.items()}
        self.call = {"guidance_scale": 3.0, "output_type": "latent", **self.case.call, **call}
        self.call = {k: v for k, v in self.call.items() if k in parameters_of(name)}
        self.steps: int = walked(self.pipe, {"num_inference_steps": STEPS, **self.call})
        self.jumps = "timestep" not in prepares(name)
        self.plans = [] if scheduler in JUMPS_ONLY else [f"coarse:3/{self.steps}"]
        self.plans += [f"{JUMP}/{self.steps}"] if self.jumps else []
        self.remember()

    def remember(self) -> None:
        """Make the knowledge base and the fine pictures, with the pipeline as it is."""
        folder = Path(tempfile.mkdtemp(dir=_folder().name)) / "kb"
        if self.case.recorded:
            with redi.record(self.pipe, folder, plans=self.plans, noises=2, storage="float32"):
                self.fine = self(PROMPTS, STEPS)
        else:
            self.built(self.plans, folder)
        self.kb = redi.KnowledgeBase.open(folder)
        if not self.case.recorded:
            self.fine = self(PROMPTS, STEPS, latents=self.noise(0))

    def built(self, plans: list[str], folder: Path) -> redi.KnowledgeBase:
        """A knowledge base of the prompts for these plans."""
        known = ("guidance_scale", "height", "width", "negative_prompt", "output_type")
        return build(
            self.pipe,
            PROMPTS,
            folder,
            plans=[redi.Plan.parse(p) for p in plans],
            noises=2,
            guidance=self.call.get("guidance_scale", 1.0),
            height=self.call["height"],
            width=self.call["width"],
            negative_prompt=self.call.get("negative_prompt", [None])[0],
            settings={k: v for k, v in self.call.items() if k not in known},
            storage="float32",
        )

    def noise(self, seed: int) -> Tensor:
        """The noise from which an enabled pipeline starts a call of all prompts with this generator."""
        with self.enabled():
            self(PROMPTS, self.few, seed)
            ids = torch.tensor(redi.report(self.pipe).noise_ids)
        return self.kb.bank.noise(ids).to(self.dtype)

    @property
    def network(self) -> torch.nn.Module:
        """The denoiser."""
        return getattr(self.pipe, "unet", None) or self.pipe.transformer

    @property
    def few(self) -> int:
        """`num_inference_steps` of a call that the first plan serves."""
        if not self.plans[0].startswith("coarse"):
            return STEPS
        return next(n for n in range(1, STEPS + 1) if walked(self.pipe, {"num_inference_steps": n, **self.call}) == 3)

    def __call__(self, prompts: list[str], steps: int, seed: int = 0, **more: Any) -> Tensor:
        """A call for these prompts: latents."""
        at = [PROMPTS.index(p) if p in PROMPTS else 1 for p in prompts]
        rows = {k: v[at] for k, v in self.call.items() if isinstance(v, Tensor)}
        lists = {k: v[: len(prompts)] for k, v in self.call.items() if isinstance(v, list)}
        # a generator for each, so that what is drawn for one (in encoding its picture, too) does not move another's
        own = [torch.Generator().manual_seed(seed) for _ in prompts]
        drawn = {} if "latents" in more or "generator" in more else {"generator": own}
        return self.pipe(prompts, num_inference_steps=steps, **self.call | rows | lists | drawn | more)[0]

    @contextmanager
    def enabled(self, **settings: Any) -> Iterator[Any]:
        """With redi on; from the nearest row alone, so that a row of its own gives the fine run's picture."""
        redi.enable(self.pipe, self.kb, **{"neighbors": 1} | settings)
        try:
            yield self.pipe
        finally:
            redi.disable(self.pipe)

    @contextmanager
    def counted(self) -> Iterator[list[int]]:
        """Calls of the network in the block, and in the fine run of as many steps."""
        calls = [0]

        def count(*_: Any) -> None:
            calls[0] += 1

        handle = self.network.register_forward_hook(count)
        try:
            yield calls
        finally:
            handle.remove()


def parameters_of(name: str) -> Mapping[str, Any]:
    """Parameters of a pipeline's call."""
    return inspect.signature(_class(name).__call__).parameters


def prepares(name: str) -> Mapping[str, Any]:
    """Parameters of its `prepare_latents`."""
    return inspect.signature(_class(name).prepare_latents).parameters


def _class(name: str) -> Any:
    return getattr(diffusers, f"{name}Pipeline")


@cache
def bed(name: str, scheduler: str = "", **call: Any) -> Bed:
    """A bed that tests share; they leave its pipeline as they found it."""
    return Bed(name, scheduler, **call)


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="redi-beds-")


def relative(a: Tensor, b: Tensor) -> float:
    """Distance relative to the length of b."""
    return float((a.double() - b.double()).norm() / b.double().norm())
