"""Build a small knowledge base of the bundled model and race it: fine solve, plain solvers, redi. Needs no hub.

Leaves comparison.png and report.json in the output folder. Run it again to go on where it was interrupted.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from redi.cli import models, names
from redi.cli.console import Console, require_at_least, table, write_json
from redi.errors import FingerprintMismatchError, InvalidInputError

if TYPE_CHECKING:
    from redi.demo import Race
    from redi.knowledge_base import KnowledgeBase
    from redi.plan import Plan

HELP = "see it work: build, generate and compare with the bundled model"
RESUMES = "finished rows are kept, the same command resumes"

# every solver here is among those that people use at few steps; Karras spacing is what many of them turn on
_PLAIN: Final[tuple[tuple[str, str, dict[str, Any]], ...]] = (
    ("DPM-Solver++ 2M", "dpmsolver++", {}),
    ("DPM-Solver++ 2M Karras", "dpmsolver++", {"use_karras_sigmas": True}),
    ("UniPC", "unipc", {}),
    ("DEIS", "deis", {}),
    ("DEIS Karras", "deis", {"use_karras_sigmas": True}),
    ("DDIM", "ddim", {}),
)
_SHOWN: Final = 8


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--out", default="demo", metavar="DIR", help="folder for everything it makes")
    parser.add_argument("--rows", type=int, default=300, metavar="N", help="trajectories in the knowledge base")
    parser.add_argument("--prompts", type=int, default=64, metavar="N", help="held-out prompts that are measured")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="the small budget, in model calls")
    parser.add_argument("--fine", type=int, default=40, metavar="N", help="steps of the fine solve")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the noise bank")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="pictures solved together")
    models.configure(parser)


def run(given: argparse.Namespace, console: Console) -> int:
    """The whole demonstration."""
    require_at_least(given, 1, "rows", "prompts", "steps", "fine", "batch_size")
    if given.prompts < 3 or given.prompts % min(given.batch_size, given.prompts):
        raise InvalidInputError(
            f"--prompts must be at least 3 and a multiple of --batch-size {given.batch_size}, given {given.prompts}"
        )
    from redi.plan import Plan

    plan = Plan.placed(given.steps, given.fine, guidance=models.guidance_of(models.BUNDLED), halved=None)
    start, seconds = time.perf_counter(), dict[str, float]()
    pipe = models.load(models.BUNDLED, given)
    seconds["load"] = time.perf_counter() - start

    from redi import zoo

    train, heldout = (zoo.prompts(models.BUNDLED, split) for split in zoo.SPLITS)
    if given.rows > len(train) or given.prompts > len(heldout):
        raise InvalidInputError(
            f"the bundled lists have {len(train)} train and {len(heldout)} held-out prompts, "
            f"asked for {given.rows} and {given.prompts}"
        )
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    console.say(f"1/3  solving {given.rows} train prompts finely ({given.fine} model calls each), once and for all")
    stamp = time.perf_counter()
    kb = _build(given, console, pipe, train[: given.rows], plan)
    seconds["build"] = time.perf_counter() - stamp
    console.say(f"2/3  solving {given.prompts} held-out prompts finely, plainly at {given.steps} calls, and with redi")
    stamp = time.perf_counter()
    found = _race(given, console, pipe, kb, plan, heldout[: given.prompts])
    seconds["compare"] = time.perf_counter() - stamp
    console.say("3/3  drawing")
    stamp = time.perf_counter()
    _draw(out / "comparison.png", pipe, kb, found, heldout[: given.prompts])
    seconds["draw"] = time.perf_counter() - stamp
    seconds["total"] = time.perf_counter() - start
    result = summary(kb, found, given, seconds)
    write_json(out / "report.json", result)
    _tell(console, found, result, out)
    console.result(result)
    return 0


def _build(given: argparse.Namespace, console: Console, pipe: Any, prompts: list[str], plan: Plan) -> KnowledgeBase:
    from redi.builder import build

    folder = Path(given.out) / "kb"
    with console.bar("building", "row") as bar:
        try:
            return build(
                pipe,
                prompts,
                folder,
                plans=[plan],
                solver=names.fine_solver(pipe.scheduler),
                seed=given.seed,
                guidance=models.guidance_of(models.BUNDLED),
                batch_size=given.batch_size,
                model=models.BUNDLED,
                progress=lambda now: bar(now.done, now.total),
            )
        except FingerprintMismatchError as e:
            raise FingerprintMismatchError(
                e.differences, f"delete {folder}, or choose another folder with --out"
            ) from e


def _race(
    given: argparse.Namespace, console: Console, pipe: Any, kb: KnowledgeBase, plan: Plan, prompts: list[str]
) -> Race:
    from redi.demo import race

    def stock(name: str, more: dict[str, Any]) -> Any:
        scheduler = names.solver(name, pipe.scheduler).scheduler()
        return type(scheduler).from_config(scheduler.config, **more)

    with console.bar("comparing", "call") as bar:
        return race(
            pipe,
            kb,
            prompts,
            {label: stock(name, more) for label, name, more in _PLAIN},
            fine=names.fine_solver(pipe.scheduler).scheduler(),
            plan=plan,
            batch_size=min(given.batch_size, given.prompts),
            progress=bar,
        )


def _draw(path: Path, pipe: Any, kb: KnowledgeBase, found: Race, prompts: list[str]) -> None:
    from redi.cli.sheet import Row, draw
    from redi.demo import decode

    shown = min(_SHOWN, len(prompts))
    best = found.plain[0]

    def row(title: str, way: Any, *, marked: bool = False, reference: bool = False) -> Row:
        said = "what the others are measured against"
        return Row(
            title,
            (
                f"{way.nfe} model calls · {1000 * way.seconds / found.batch_size:.0f} ms a picture",
                *(
                    [said]
                    if reference
                    else (f"Fréchet distance {way.frechet:.3g}", f"latent error {way.latent_error:.3g}")
                ),
            ),
            decode(pipe, way.latents[:shown]),
            () if reference else [f"error {e:.2g}" for e in way.errors[:shown]],
            marked,
        )

    speedup = found.fine.seconds / found.redi.seconds
    sheet = draw(
        f"redi: {found.redi.nfe} model calls instead of {found.fine.nfe}, {speedup:.1f}× faster",
        f"{len(kb)} remembered trajectories; prompts that neither they nor the model's training have seen",
        prompts[:shown],
        (
            row("Fine solve", found.fine, reference=True),
            row(f"Best plain: {best.name}", best),
            row("redi", found.redi, marked=True),
        ),
        f"Distances to the fine solve of {len(prompts)} held-out prompts, Fréchet in {found.directions} principal "
        f"directions of the latents. The same starting noise everywhere.",
    )
    with path.with_suffix(".tmp").open("wb") as file:
        sheet.save(file, format="PNG", optimize=True)
    os.replace(path.with_suffix(".tmp"), path)


def summary(kb: KnowledgeBase, found: Race, given: argparse.Namespace, seconds: dict[str, float]) -> dict[str, Any]:
    """`report.json`."""
    import torch

    best = found.plain[0]
    return {
        "model": kb.fingerprint.model,
        "plan": kb.config.plans[0],
        "rows": len(kb),
        "prompts": len(found.redi.latents),
        "nfe_full": found.fine.nfe,
        "nfe_redi": found.redi.nfe,
        "nfe_plain": best.nfe,
        "seconds_full": found.fine.seconds,
        "seconds_redi": found.redi.seconds,
        "seconds_plain": best.seconds,
        "speedup": found.fine.seconds / found.redi.seconds,
        "frechet_redi": found.redi.frechet,
        "frechet_plain": best.frechet,
        "latent_error_redi": found.redi.latent_error,
        "latent_error_plain": best.latent_error,
        "plain_solver": best.name,
        "plain_solvers": [c.to_json() for c in found.plain],
        "seconds_are": f"denoising loop of one batch of {found.batch_size}, median of {found.batches} batches",
        "frechet_is": f"to the fine solve, in {found.directions} principal directions of its latents",
        "frechet_directions": found.directions,
        "batch_size": found.batch_size,
        "batches": found.batches,
        "seconds": seconds,
        "seconds_of_redi_by_stage": dict(found.stages),
        "guidance": kb.fingerprint.guidance,
        "seed": given.seed,
        "machine": {"threads": torch.get_num_threads(), "cpus": os.cpu_count(), **kb.config.created_with},
    }


def _tell(console: Console, found: Race, result: dict[str, Any], out: Path) -> None:
    lines = [("", "calls", "ms a picture", "Fréchet", "latent error")]
    lines += [
        (
            label,
            str(c.nfe),
            f"{1000 * c.seconds / found.batch_size:.1f}",
            f"{c.frechet:.3g}" if c is not found.fine else "–",
            f"{c.latent_error:.3g}" if c is not found.fine else "–",
        )
        for label, c in (("fine solve", found.fine), *((c.name, c) for c in found.plain), ("redi", found.redi))
    ]
    console.say()
    for line in table(lines):
        console.say(line)
    console.say()
    nearer = result["frechet_plain"] / result["frechet_redi"]
    how = f"{nearer:.1f}× nearer" if nearer > 1 else f"not nearer ({nearer:.2f}×)"
    console.say(
        f"redi: {result['speedup']:.1f}× faster than the fine solve, and {how} to it in Fréchet distance "
        f"than the best plain solver, {result['plain_solver']}"
    )
    console.say(f"{out / 'comparison.png'}, {out / 'report.json'}; {result['seconds']['total']:.0f} s in all")
