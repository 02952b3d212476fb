"""A fair race over the same prompts and noise: the fine solve, plain solvers at a small budget, redi at that budget.

What runs, and where the results go, is for `redi demo` to say.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor

from redi.errors import InvalidInputError
from redi.knowledge_base import KnowledgeBase
from redi.metrics import frechet_distance, latent_error
from redi.plan import Plan, calls_of
from redi.scheduler import disable, enable, report

MOST_DIRECTIONS: Final = 64


@final
@dataclass(frozen=True, eq=False)
class Contender:
    """What one way of sampling made of the prompts.

    Args:
        name: of the solver.
        nfe: model calls per picture.
        seconds: of the denoising loop for one batch, median over batches.
        latents: one per prompt.
        frechet: distance to the fine solve's latents.
        latent_error: mean L2 distance to the fine solve's latents.
        errors: that distance for each prompt.
    """

    name: str
    nfe: int | float
    seconds: float
    latents: Float[Tensor, "b *s"]
    frechet: float
    latent_error: float
    errors: Sequence[float]

    def to_json(self) -> dict[str, Any]:
        """The figures, without the latents."""
        return {
            "solver": self.name,
            "nfe": self.nfe,
            "seconds": self.seconds,
            "frechet": self.frechet,
            "latent_error": self.latent_error,
        }


@final
@dataclass(frozen=True, eq=False)
class Race:
    """The result.

    Args:
        fine: the knowledge base's own solver with all its steps.
        plain: every plain solver at redi's budget, best Fréchet distance first.
        redi: the knowledge base served through its plan.
        batch_size: pictures that were solved together, in every timing.
        batches: timings that each median is over.
        directions: principal directions that Fréchet distances are measured in.
        neighbors: per prompt, row ids it learnt from.
        stages: seconds of redi's stages over all batches.
    """

    fine: Contender
    plain: Sequence[Contender]
    redi: Contender
    batch_size: int
    batches: int
    directions: int
    neighbors: Sequence[tuple[int, ...]]
    stages: Mapping[str, float]


def race(
    pipe: Any,
    kb: KnowledgeBase,
    prompts: Sequence[str],
    solvers: Mapping[str, Any],
    *,
    fine: Any,
    plan: Plan,
    batch_size: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Race:
    """Solve every prompt from the first bank noise in every way, batch after batch, all ways in turn.

    Timed is a pipeline call on embedded prompts that ends with latents, so the denoising loop and nothing around it.
    In every batch all ways have their turn, so that a machine busy with other things slows them alike.

    Args:
        pipe: the pipeline that `kb` was built with; it is left as it was.
        kb: the knowledge base.
        prompts: none of which is in the knowledge base.
        solvers: name → diffusers scheduler, to run with as many steps as the plan makes calls, on its own stock grid.
        fine: the scheduler that `kb` was built with.
        plan: a coarse plan of `kb`, the small budget.
        batch_size: pictures per pipeline call; the number of prompts must be a multiple of it.
        progress: told (calls done, calls in all).

    Raises:
        InvalidInputError: too few prompts, or a number that no whole batches make.
    """
    if len(prompts) < 3 or len(prompts) % batch_size:
        raise InvalidInputError(
            f"expected at least 3 prompts and whole batches of {batch_size}, given {len(prompts)} prompts"
        )
    mark = kb.fingerprint
    common: dict[str, Any] = {
        "guidance_scale": mark.guidance,
        "height": mark.height,
        "width": mark.width,
        "output_type": "latent",
    }
    noise = kb.bank.noise(torch.zeros(batch_size, dtype=torch.int64)).to(pipe.device, pipe.unet.dtype)
    served, original = type(pipe).from_pipe(pipe), pipe.scheduler
    served.set_progress_bar_config(disable=True)
    batches = [list(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
    ways: dict[str, tuple[Any, int, Any]] = {"fine": (pipe, mark.steps, fine), "redi": (served, plan.steps, None)}
    ways |= {f"plain {name}": (pipe, math.ceil(plan.calls), scheduler) for name, scheduler in solvers.items()}
    latents: dict[str, list[Tensor]] = {way: [] for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    neighbors: list[tuple[int, ...]] = []
    stages: dict[str, float] = {}
    nfe: dict[str, int | float] = {}
    enable(served, kb, plan=plan)
    counter = _Counter(pipe.unet)
    try:
        for i, batch in enumerate([batches[0], *batches]):  # the first one twice: once to warm up
            warm = i > 0
            embeddings = embed(pipe, batch)
            for way, (runner, count, scheduler) in ways.items():
                if scheduler is not None:
                    runner.scheduler = scheduler
                calls = count if warm or way == "redi" else 2
                counter.samples = 0
                start = time.perf_counter()
                out = runner(latents=noise, num_inference_steps=calls, **embeddings, **common).images
                took = time.perf_counter() - start
                nfe[way] = calls_of(counter.samples // batch_size)
                if warm:
                    latents[way].append(out.detach().cpu())
                    seconds[way].append(took)
                    progress(sum(map(len, latents.values())), len(ways) * len(batches))
            if warm:
                said = report(served)
                neighbors += said.neighbors
                for stage, s in said.seconds.items():
                    stages[stage] = stages.get(stage, 0.0) + s
    finally:
        pipe.scheduler = original
        counter.remove()
        disable(served)
    reference = torch.cat(latents["fine"])
    directions = min(MOST_DIRECTIONS, len(prompts) // 2)

    def contender(way: str, name: str) -> Contender:
        made = torch.cat(latents[way])
        return Contender(
            name,
            nfe[way],
            statistics.median(seconds[way]),
            made,
            frechet_distance(made.flatten(1), reference.flatten(1), directions=directions),
            latent_error(made, reference),
            [latent_error(a[None], b[None]) for a, b in zip(made, reference, strict=True)],
        )

    plain = sorted((contender(f"plain {name}", name) for name in solvers), key=lambda c: c.frechet)
    return Race(
        contender("fine", mark.scheduler),
        plain,
        contender("redi", f"redi on {mark.scheduler}"),
        batch_size,
        len(batches),
        directions,
        neighbors,
        stages,
    )


@final
class _Counter:
    """Counts the samples that a network is really called with: two of each picture, if it is guided by a whole call."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.samples = 0
        self._handle = network.register_forward_hook(self._count)  # by then half calls are cut

    def _count(self, _: Any, args: tuple[Tensor, ...], output: Any) -> None:
        self.samples += len(args[0])

    def remove(self) -> None:
        self._handle.remove()


@torch.no_grad()
def embed(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompts and the empty prompt as a pipeline's own text encoder embeds them, as arguments of its call."""
    positive, negative = pipe.encode_prompt(list(prompts), pipe.device, 1, True)[:2]
    return {"prompt_embeds": positive, "negative_prompt_embeds": negative}


@torch.no_grad()
def decode(pipe: Any, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 i j"]:
    """Pictures in [0, 1] of a Stable Diffusion pipeline's latents."""
    vae = pipe.vae
    scaled = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return (vae.decode(scaled).sample.float() / 2 + 0.5).clamp(0, 1).cpu()
