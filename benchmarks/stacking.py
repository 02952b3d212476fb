"""redi together with caches inside the network: what each saves on the bundled model, alone and together.

    pip install DeepCache
    python benchmarks/stacking.py --out bench          # --quick for a look

DeepCache (Ma et al., 2024) skips the UNet's deep blocks in every other step; redi takes fewer steps. Leaves
stacking.json and stacking.md: calls and deep calls counted, distances to the fine solve, seconds of the denoising loop.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from tqdm import tqdm

import redi
from redi.metrics import frechet_distance, latent_error

FINE, GUIDANCE = 40, 3.0
HEAD = """| | steps | network calls | of them deep | Fréchet distance | latent error | seconds a picture |
|---|---|---|---|---|---|---|"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--budget", type=int, default=8, help="steps of those that are not the fine solve")
    parser.add_argument("--interval", type=int, default=2, help="DeepCache goes deep in every so many steps")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="a look: figures of this size say little")
    given = parser.parse_args(argv)
    if given.quick:
        given.rows, given.prompts = 24, 16
    from DeepCache import DeepCacheSDHelper

    pipe = redi.zoo.load("emoji")
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    plan = redi.Plan.coarse(given.budget, FINE)
    with tqdm(desc="building", unit="row") as bar:
        kb = redi.build(
            pipe,
            redi.zoo.prompts("emoji", "train")[: given.rows],
            given.out / f"kb-stacking-{given.rows}",
            plans=[plan],
            guidance=GUIDANCE,
            batch_size=given.batch_size,
            model="emoji",
            progress=lambda now: bar.update(now.done - bar.n),
        )
    prompts = redi.zoo.prompts("emoji", "heldout")[: given.prompts]

    def cached(stack: ExitStack) -> None:
        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=given.interval, cache_branch_id=0)
        helper.enable()
        stack.callback(helper.disable)

    def leaping(stack: ExitStack) -> None:
        redi.enable(pipe, kb)
        stack.callback(redi.disable, pipe)

    ways: dict[str, tuple[int, list[Any]]] = {
        "fine solve": (FINE, []),
        "DPM-Solver++": (given.budget, []),
        "DPM-Solver++ and DeepCache": (given.budget, [cached]),
        "redi": (given.budget, [leaping]),
        "redi and DeepCache": (given.budget, [leaping, cached]),
    }
    found: dict[str, dict[str, Any]] = {}
    latents: dict[str, Tensor] = {}
    for name, (steps, turned_on) in tqdm(ways.items(), desc="comparing"):
        with ExitStack() as stack:
            inner = Counted(pipe.unet.mid_block, stack)  # first, so that a cache skips it
            for turn_on in turned_on:
                turn_on(stack)
            outer = Counted(pipe.unet, stack)
            sample(pipe, kb, prompts[: given.batch_size], steps, given.batch_size)  # tables are read
            outer.calls = inner.calls = 0
            start = time.perf_counter()
            latents[name] = sample(pipe, kb, prompts, steps, given.batch_size)
            seconds = time.perf_counter() - start
        batches = -(-len(prompts) // given.batch_size)
        found[name] = {
            "steps": steps,
            "calls": outer.calls / batches,
            "deep_calls": inner.calls / batches,
            "seconds": seconds / len(prompts),
        }
    for name, figures in found.items():
        mine, fine = latents[name], latents["fine solve"]
        figures["frechet"] = frechet_distance(mine.flatten(1), fine.flatten(1), directions=min(64, len(prompts) - 1))
        figures["latent_error"] = latent_error(mine, fine)
    document = {
        "command": ["benchmarks/stacking.py", *(sys.argv[1:] if argv is None else argv)],
        "quick": given.quick,
        "rows": len(kb),
        "prompts": len(prompts),
        "found": found,
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"redi": redi.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "stacking.json").write_text(json.dumps(document, indent=1))
    table = "\n".join([HEAD, *(line(name, figures) for name, figures in found.items())])
    (given.out / "stacking.md").write_text(table + "\n")
    print(table)
    return 0


class Counted:
    """Counts the calls that reach a module's own `forward`, for as long as a stack stands."""

    def __init__(self, module: torch.nn.Module, stack: ExitStack) -> None:
        self.calls = 0
        forward = module.forward

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return forward(*args, **kwargs)

        module.forward = counting  # type: ignore[method-assign]
        stack.callback(setattr, module, "forward", forward)


def sample(pipe: Any, kb: redi.KnowledgeBase, prompts: Sequence[str], steps: int, batch_size: int) -> Tensor:
    """Latents of these prompts, all from the bank's first noise."""
    made: list[Tensor] = []
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        noise = kb.bank.noise(torch.zeros(len(part), dtype=torch.int64))
        made += pipe(
            part, num_inference_steps=steps, guidance_scale=GUIDANCE, latents=noise, output_type="latent"
        ).images
    return torch.stack(made)


def line(name: str, f: dict[str, Any]) -> str:
    return (
        f"| {name} | {f['steps']} | {f['calls']:.0f} | {f['deep_calls']:.0f} | {f['frechet']:.3f} | "
        f"{f['latent_error']:.2f} | {f['seconds']:.4f} |"
    )


if __name__ == "__main__":
    raise SystemExit(main())
