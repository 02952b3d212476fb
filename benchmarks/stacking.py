"""redi together with what makes a single call cheaper: what each saves on the bundled model, alone and together.

    pip install DeepCache
    python benchmarks/stacking.py --out bench          # --quick for a look

DeepCache (Ma et al., 2024) skips the UNet's deep blocks in every other step, torch.compile makes each call faster; redi
takes fewer calls. Leaves stacking.json and stacking.md: calls and deep calls counted, distances to the fine solve, and
seconds of the denoising loop, the median of turns in which every way was timed. `--clock processor` counts processor
time, for a machine that others use too. Without DeepCache its rows are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from tqdm import tqdm

import redi
from redi.cli import names
from redi.demo import embed
from redi.metrics import frechet_distance, latent_error

FINE, GUIDANCE = 40, 3.0
HEAD = """| | steps | network calls | of them deep | Fréchet distance | latent error | ms a picture |
|---|---|---|---|---|---|---|"""
Turn = Callable[[ExitStack], None]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--budget", type=int, default=8, help="steps of those that are not the fine solve")
    parser.add_argument("--interval", type=int, default=2, help="DeepCache goes deep in every so many steps")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5, help="in which every way is timed")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--quick", action="store_true", help="a look: figures of this size say little")
    given = parser.parse_args(argv)
    if given.quick:
        given.rows, given.prompts, given.turns = 24, 16, 1
    pipe = redi.zoo.load("emoji")
    pipe.set_progress_bar_config(disable=True)
    fine = names.fine_solver(pipe.scheduler)
    with tqdm(desc="building", unit="row") as bar:
        kb = redi.build(
            pipe,
            redi.zoo.prompts("emoji", "train")[: given.rows],
            given.out / f"kb-stacking-{given.rows}",
            plans=[redi.Plan.coarse(given.budget, FINE)],
            solver=fine,
            guidance=GUIDANCE,
            batch_size=given.batch_size,
            model="emoji",
            progress=lambda now: bar.update(now.done - bar.n),
        )
    served: Any = redi.ReDiEngine.serving(kb)[0].solver  # what redi's steps are: the plain solver to compare it with
    whole = len(redi.zoo.prompts("emoji", "heldout")[: given.prompts]) // given.batch_size * given.batch_size
    call = Call(pipe, kb, redi.zoo.prompts("emoji", "heldout")[:whole], given.batch_size)
    plain = f"{served.name.removesuffix('Scheduler').removesuffix('Multistep')}"
    compiler = Compiled(pipe.unet)

    def walking(solver: Any) -> Turn:
        def turn_on(stack: ExitStack) -> None:
            own, pipe.scheduler = pipe.scheduler, solver.scheduler()
            stack.callback(setattr, pipe, "scheduler", own)

        return turn_on

    def caching(stack: ExitStack) -> None:
        from DeepCache import DeepCacheSDHelper

        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=given.interval, cache_branch_id=0)
        helper.enable()
        stack.callback(helper.disable)

    def leaping(stack: ExitStack) -> None:
        redi.enable(pipe, kb)
        stack.callback(redi.disable, pipe)

    def compiling(stack: ExitStack) -> None:
        own, pipe.unet = pipe.unet, compiler.network
        stack.callback(setattr, pipe, "unet", own)

    ways: dict[str, tuple[int, list[Turn]]] = {}
    for base, steps, turned_on in (
        ("fine solve", FINE, [walking(fine)]),
        (plain, given.budget, [walking(served)]),
        ("redi", given.budget, [leaping]),
    ):
        ways[base] = (steps, turned_on)
        ways[f"{base}, compiled"] = (steps, [*turned_on, compiling])
        if steps != FINE and _installed("DeepCache"):
            ways[f"{base} and DeepCache"] = (steps, [*turned_on, caching])
    found: dict[str, dict[str, Any]] = {}
    latents: dict[str, Tensor] = {}
    for name, (steps, turned_on) in tqdm(ways.items(), desc="comparing"):
        with ExitStack() as stack:
            hidden = name.endswith("compiled")  # the compiler would count, too
            inner = compiler if hidden else Counted(pipe.unet.mid_block, stack)  # first, so that a cache skips it
            for turn_on in turned_on:
                turn_on(stack)
            outer = compiler if hidden else Counted(pipe.unet, stack)
            call(steps, 1)  # tables are read, the network is compiled
            outer.calls = inner.calls = 0
            latents[name] = call(steps)
        batches = len(call.prompts) // given.batch_size
        found[name] = {"steps": steps, "calls": outer.calls / batches, "deep_calls": inner.calls / batches}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in tqdm(range(given.turns), desc="timing"):
        for name, (steps, turned_on) in ways.items():
            with ExitStack() as stack:
                for turn_on in turned_on:
                    turn_on(stack)
                call(2 if steps == FINE else steps, 1)
                clock = time.process_time if given.clock == "processor" else time.perf_counter
                start = clock()
                call(steps, 2)
                seconds[name].append((clock() - start) / (2 * given.batch_size))
    for name, figures in found.items():
        mine, full = latents[name], latents["fine solve"]
        figures["seconds"] = statistics.median(seconds[name])
        figures["frechet"] = frechet_distance(mine.flatten(1), full.flatten(1), directions=min(64, whole - 1))
        figures["latent_error"] = latent_error(mine, full)
    document = {
        "command": ["benchmarks/stacking.py", *(sys.argv[1:] if argv is None else argv)],
        "quick": given.quick,
        "rows": len(kb),
        "prompts": whole,
        "solvers": {"fine": str(fine), "few steps": str(served)},
        "clock": given.clock,
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


class Compiled:
    """A compiled network that counts its calls from outside, where the compiler does not see it."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.calls = 0
        self.network: Any = torch.compile(network, dynamic=False)
        self.network.register_forward_pre_hook(lambda *_: setattr(self, "calls", self.calls + 1))


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


class Call:
    """Calls of a pipeline for some prompts, all from the bank's first noise; the prompts are encoded once."""

    def __init__(self, pipe: Any, kb: redi.KnowledgeBase, prompts: Sequence[str], batch_size: int) -> None:
        self.pipe, self.prompts = pipe, prompts
        self.batches = [embed(pipe, prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
        self.noise = kb.bank.noise(torch.zeros(batch_size, dtype=torch.int64))

    def __call__(self, steps: int, batches: int | None = None) -> Tensor:
        """Latents of all prompts, or of so many batches."""
        given = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "output_type": "latent"}
        return torch.cat([self.pipe(latents=self.noise, **part, **given).images for part in self.batches[:batches]])


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def line(name: str, f: dict[str, Any]) -> str:
    return (
        f"| {name} | {f['steps']} | {f['calls']:.0f} | {f['deep_calls']:.0f} | {f['frechet']:.3f} | "
        f"{f['latent_error']:.2f} | {1e3 * f['seconds']:.1f} |"
    )


if __name__ == "__main__":
    raise SystemExit(main())
