"""The bundled model as benchmarks use it: its denoiser compiled, and in bfloat16 where the CPU has units for it.

With them this is 3.5 times as fast, and changes a solver's latent error to the fine solve by 1 to 3 %; without them
bfloat16 is far slower than float32, which is taken then. `python -m benchmarks.bundled` measures what the CPU has.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from tqdm import tqdm

from redi import KnowledgeBase, Plan, build, zoo
from redi.cli import names
from redi.demo import embed
from redi.metrics import latent_error

GUIDANCE: Final = 3.0
BATCH: Final = 64
"""Pictures of every call: one size, so that the denoiser is compiled once."""


def precision() -> torch.dtype:
    """What the denoiser computes in: bfloat16 where that is in the hardware."""
    gpu = torch.cuda.is_available()
    return torch.bfloat16 if gpu or torch.cpu._is_avx512_bf16_supported() else torch.float32  # pyright: ignore


def load(*, compiled: bool = True) -> Any:
    """The bundled pipeline, its denoiser as `hurry` leaves it.

    Args:
        compiled: half a minute once, and half as fast again after it.
    """
    pipe = zoo.load("emoji")
    pipe.set_progress_bar_config(disable=True)
    hurry(pipe.unet, compiled=compiled)
    return pipe


def hurry(network: Any, *, compiled: bool) -> None:
    """Let a UNet compute in `precision()` from now on; it takes and gives float32."""
    plain, dtype = network.forward, precision()

    def inner(sample: torch.Tensor, timestep: Any, states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(sample.device.type, dtype, enabled=dtype is not torch.float32):
            return plain(sample, timestep, states, return_dict=False)[0].float()

    quick = torch.compile(inner, dynamic=False) if compiled else inner

    def forward(
        sample: torch.Tensor, timestep: Any, encoder_hidden_states: torch.Tensor, *, return_dict: bool = True, **_: Any
    ) -> Any:
        at = torch.as_tensor(timestep, device=sample.device).reshape(-1)[:1].expand(len(sample)).float()
        out = quick(sample, at, encoder_hidden_states)
        return UNet2DConditionOutput(out) if return_dict else (out,)

    network.forward = forward


def rows(pipe: Any, folder: Path, plans: Sequence[Plan], prompts: Sequence[str], **more: Any) -> KnowledgeBase:
    """A knowledge base of whole batches, continued if it was begun; `more` goes to `redi.build`."""
    whole = prompts[: max(1, len(prompts) // BATCH) * BATCH]
    with tqdm(desc=f"building {folder.name}", unit="row") as bar:
        given = {"solver": names.solver("dpmsolver++", pipe.scheduler), "guidance": GUIDANCE, "model": "emoji"} | more
        return build(
            pipe,
            whole,
            folder,
            plans=plans,
            batch_size=BATCH,
            shard_rows=16 * BATCH,
            progress=lambda now: (setattr(bar, "total", now.total), bar.update(now.done - bar.n)),
            **given,
        )


def solve(
    pipe: Any, scheduler: Any, steps: int, prompts: Sequence[str], noise: torch.Tensor, **more: Any
) -> torch.Tensor:
    """Latents of a plain solver.

    Args:
        pipe: from `load`.
        scheduler: a diffusers scheduler.
        steps: of it.
        prompts: as many as there are noises.
        noise: unit starting noise of each, (n, c, h, w).
        more: further arguments of the pipeline's call.
    """
    own, pipe.scheduler = pipe.scheduler, scheduler
    given: dict[str, Any] = {"guidance_scale": GUIDANCE, "output_type": "latent", "num_inference_steps": steps} | more
    try:
        made = [
            pipe(latents=noise[i : i + BATCH].clone(), **embed(pipe, prompts[i : i + BATCH]), **given).images
            for i in range(0, len(prompts), BATCH)
        ]
    finally:
        pipe.scheduler = own
    return torch.cat(made)


def main() -> int:
    """How fast the hurried denoiser is, and how far from the plain one in float32."""
    prompts = zoo.prompts("emoji", "heldout")[:BATCH]
    noise = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0)).expand(BATCH, -1, -1, -1)
    plain = zoo.load("emoji")
    plain.set_progress_bar_config(disable=True)
    fine: dict[str, torch.Tensor] = {}
    for name, pipe in {"plain": plain, "hurried": load()}.items():
        scheduler = names.solver("dpmsolver++", pipe.scheduler).scheduler()
        solve(pipe, scheduler, 2, prompts, noise)
        start = time.perf_counter()
        fine[name] = solve(pipe, scheduler, 40, prompts, noise)
        seconds = time.perf_counter() - start
        few = {n: latent_error(solve(pipe, scheduler, n, prompts, noise), fine[name]) for n in (5, 8, 12, 20)}
        said = ", ".join(f"{n} steps {e:.3f}" for n, e in few.items())
        print(f"{name:9} {40 * BATCH / seconds:5.0f} calls a second; latent error to 40 steps: {said}")
    apart = latent_error(fine["hurried"], fine["plain"])
    print(f"between the two, float32 and {precision()}, at 40 steps: {apart:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
