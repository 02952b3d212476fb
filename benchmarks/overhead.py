"""What redi adds to a generation, against one model call, and what of the plan's saving arrives as wall time.

    python benchmarks/overhead.py --out bench          # --quick for a look

For each pipeline, number of rows and batch (prompts are encoded before, nothing is decoded):

- added: a call with redi minus the same call without it and with the same solver, both with a network that answers at
  once, so that nothing but the pipeline's own loop and redi is on the clock: wrapping, key, search, gather, combine,
  transport;
- model: one guided call of the real network;
- speed-up: the fine run's denoising loop over redi's, with the real network, against the ratio of their model calls.

What is compared is timed in turns, and every ratio is the median of the turns' own. `--clock processor` counts the
processor's seconds instead of the wall's, for a machine that others use too. The rows are random: what they teach does
not matter here, what they weigh does. Leaves overhead.json and overhead.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from tqdm import tqdm

import redi
from redi.cli import names
from redi.knowledge_base import Writer
from redi.pipelines import network
from redi.recipe import Recipe
from redi.types import Rows

PLAN, FINE = redi.Plan.coarse(8, 40), 40
ADDED, KEPT = 0.25, 0.95  # what is wanted: model calls added per generation, share of the saving that arrives
TOGETHER = 128
EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--pipelines", nargs="+", choices=PIPELINES, default=list(PIPELINES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--quick", action="store_true", help="a look: figures of this size say little")
    given = parser.parse_args(argv)
    if given.quick:
        given.rows, given.batches, given.turns = [100], [1, 2], 1
    figures: list[dict[str, Any]] = []
    for name in given.pipelines:
        pipe = PIPELINES[name]().to(given.device)
        pipe.set_progress_bar_config(disable=True)
        for rows in given.rows:
            with tempfile.TemporaryDirectory(prefix="redi-overhead-") as folder:
                kb = remember(pipe, Path(folder, "kb"), rows)
                for batch in given.batches:
                    figures.append({"pipeline": name, "rows": rows, "batch": batch} | measure(pipe, kb, batch, given))
                    print(line(figures[-1]))
    document = {
        "command": ["benchmarks/overhead.py", *(sys.argv[1:] if argv is None else argv)],
        "quick": given.quick,
        "plan": str(PLAN),
        "clock": given.clock,
        "wanted": {"added_model_calls": ADDED, "kept": KEPT},
        "figures": figures,
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"redi": redi.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "overhead.json").write_text(json.dumps(document, indent=1))
    (given.out / "overhead.md").write_text("\n".join([HEAD, *map(line, figures)]) + "\n")
    return 0


def emoji() -> Any:
    """The bundled model with the solver of its rows."""
    pipe = redi.zoo.load("emoji")
    pipe.scheduler = names.fine_solver(pipe.scheduler).scheduler()
    return pipe


def sdxl() -> Any:
    """Stable Diffusion XL's blocks, conditioning and 16,384 numbers in a sample, in very narrow networks."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(32, 64, 128),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 8),
        use_linear_projection=True,
        cross_attention_dim=128,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + 64,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=512,
    )
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=vae, unet=unet.eval(), scheduler=scheduler, add_watermarker=False, **parts
    )
    # nothing encodes in this shape: embeddings are what is passed, or a row of their own for each prompt
    pipe.encode_prompt = lambda *_, **given: (
        embeddings(pipe, len(given["prompt"]))
        if given["prompt_embeds"] is None
        else [given[name] for name in EMBEDDINGS]
    )
    return pipe


def embeddings(pipe: Any, batch: int) -> tuple[Tensor, ...]:
    """Embeddings of as many prompts: with and without, and pooled where the pipeline wants them."""
    if not isinstance(pipe, diffusers.StableDiffusionXLPipeline):
        return pipe.encode_prompt(redi.zoo.prompts("emoji", "heldout")[:batch], pipe.device, 1, True)
    net, g = network(pipe), torch.Generator().manual_seed(1)
    width: Any = net.config.cross_attention_dim  # type: ignore[attr-defined]
    without, *tokens = torch.randn(1 + batch, 77, width, generator=g).to(net.device, net.dtype)  # type: ignore
    pooled = torch.randn(2, batch, 64, generator=g).to(without)
    return torch.stack(tokens), without.expand(batch, -1, -1), pooled[0], pooled[1]


PIPELINES: dict[str, Callable[[], Any]] = {"emoji": emoji, "sdxl-shaped": sdxl}


def remember(pipe: Any, folder: Path, rows: int) -> redi.KnowledgeBase:
    """A knowledge base of random rows, as large on disk and in memory as one of real rows."""
    recipe = Recipe.of(pipe, plans=[PLAN], guidance=3.0)
    record, shape, g = recipe.config.record, recipe.bank.shape, torch.Generator().manual_seed(0)
    with Writer.open(folder, recipe.config) as writer, tqdm(total=rows, desc="random rows", leave=False) as bar:
        for start in range(0, rows, TOGETHER):
            n = min(TOGETHER, rows - start)
            samples, denoised = (
                {entry: torch.randn(n, *shape, generator=g) for entry in sorted(entries)}
                for entries in (record.samples, record.denoised)
            )
            names = [str(i) for i in range(start, start + n)]
            writer.append(Rows(samples, denoised, {}, torch.zeros(n, dtype=torch.int64), torch.zeros(n, 0), names))
            bar.update(n)
    return redi.KnowledgeBase.open(folder)


def measure(pipe: Any, kb: redi.KnowledgeBase, batch: int, given: argparse.Namespace) -> dict[str, Any]:
    """All clocks."""
    call = dict(zip(EMBEDDINGS, embeddings(pipe, batch), strict=False))
    call |= {"guidance_scale": 3.0, "output_type": "latent", "latents": noise(pipe, kb, batch)}
    served: Any = redi.ReDiEngine.serving(kb)[0].solver
    fine_scheduler, same = pipe.scheduler, served.scheduler()

    def run(steps: int, scheduler: Any = None) -> tuple[float, float]:
        pipe.scheduler = scheduler or pipe.scheduler
        loop.seconds, start = 0.0, clock(given)
        pipe(num_inference_steps=steps, **call)
        seconds = clock(given) - start
        if scheduler is not None:
            pipe.scheduler = fine_scheduler
        return seconds, loop.seconds

    def leaping() -> tuple[float, float]:
        redi.enable(pipe, kb)
        pipe(num_inference_steps=PLAN.steps, **call)  # tables are read, indexes built
        seconds = run(PLAN.steps)
        stages.append(redi.report(pipe).seconds)
        redi.disable(pipe)
        return seconds

    loop = Loop(given)
    pipe.progress_bar = lambda *_, **__: loop  # pipelines open a bar around their loop

    stages: list[Any] = []
    run(2)
    model_call(pipe, batch, given)
    whole = [(run(FINE)[1], leaping()[1]) for _ in range(given.turns)]  # in turns, so that all meet the same machine
    stages.clear()
    turns: list[tuple[float, float, float]] = []
    for _ in range(2 * given.turns + 1):
        model = model_call(pipe, batch, given)
        with hollow(pipe):
            turns.append((run(PLAN.steps, same)[0], leaping()[0], model))
    fine, leapt = (statistics.median(side) for side in zip(*whole, strict=True))
    speed_up = statistics.median(a / b for a, b in whole)
    del pipe.progress_bar
    return {
        "added_seconds": statistics.median(b - a for a, b, _ in turns),
        "model_seconds": statistics.median(m for *_, m in turns),
        "added_model_calls": statistics.median((b - a) / m for a, b, m in turns),
        "fine_seconds": fine,
        "redi_seconds": leapt,
        "speed_up": speed_up,
        "kept": speed_up / (FINE / PLAN.steps),
        "stages": {stage: statistics.median(s.get(stage, 0.0) for s in stages) for stage in stages[0]},
    }


def noise(pipe: Any, kb: redi.KnowledgeBase, batch: int) -> Tensor:
    """The bank's only noise."""
    net: Any = network(pipe)
    return kb.bank.noise(torch.zeros(batch, dtype=torch.int64)).to(net.device, net.dtype)


def clock(given: argparse.Namespace) -> float:
    if given.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.process_time() if given.clock == "processor" else time.perf_counter()


@torch.no_grad()
def model_call(pipe: Any, batch: int, given: argparse.Namespace) -> float:
    """One guided call: two network rows for each picture."""
    net: Any = network(pipe)
    tokens, *rest = embeddings(pipe, 2 * batch)
    shape = (2 * batch, net.config.in_channels, net.config.sample_size, net.config.sample_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(tokens)
    more: dict[str, Any] = {}
    if len(rest) > 1:
        more = {"added_cond_kwargs": {"text_embeds": rest[1], "time_ids": torch.ones(2 * batch, 6).to(tokens)}}
    start = clock(given)
    net(x, 500, encoder_hidden_states=tokens, **more)
    return clock(given) - start


class Loop:
    """Times a pipeline's loop, in the place of its progress bar."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.seconds, self.start = given, 0.0, 0.0
        self.n = self.total = 0

    def __enter__(self) -> Loop:
        self.start = clock(self.given)
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = clock(self.given) - self.start

    def update(self, *_: object) -> None:
        """Nothing to show."""


class hollow:  # noqa: N801
    """A pipeline whose network answers at once, for the block."""

    def __init__(self, pipe: Any) -> None:
        self.net: Any = network(pipe)

    def __enter__(self) -> None:
        self.net.forward = lambda sample, *_, **__: (0.1 * sample,)

    def __exit__(self, *_: object) -> None:
        del self.net.forward


HEAD = """| pipeline | rows | batch | redi adds | one model call | model calls added | speed-up | of the NFE ratio |
|---|---|---|---|---|---|---|---|"""


def line(f: dict[str, Any]) -> str:
    return (
        f"| {f['pipeline']} | {f['rows']:,} | {f['batch']} | {1e3 * f['added_seconds']:.1f} ms | "
        f"{1e3 * f['model_seconds']:.1f} ms | {f['added_model_calls']:.2f} | {f['speed_up']:.2f} | {f['kept']:.0%} |"
    )


if __name__ == "__main__":
    raise SystemExit(main())
