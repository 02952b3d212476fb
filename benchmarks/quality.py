"""NFE against quality on the bundled model: plain solvers and redi at several budgets, measured against the fine solve.

    python benchmarks/quality.py --out bench

One knowledge base serves all budgets. Leaves quality.json and quality.png; run again, it goes on with the same rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from redi import Plan, build, zoo
from redi.cli import names
from redi.demo import Race, race

PLAIN = ("dpmsolver++", "unipc", "deis", "ddim")
FINE, GUIDANCE = 40, 3.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--budgets", type=int, nargs="+", default=[4, 5, 6, 8, 10])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)

    pipe = zoo.load("emoji")
    solver = names.solver("dpmsolver++", pipe.scheduler)
    plans = [Plan.coarse(budget, FINE) for budget in given.budgets]
    with tqdm(desc="building", unit="row") as bar:
        kb = build(
            pipe,
            zoo.prompts("emoji", "train")[: given.rows],
            given.out / f"kb-{given.rows}",
            plans=plans,
            solver=solver,
            seed=given.seed,
            guidance=GUIDANCE,
            batch_size=given.batch_size,
            model="emoji",
            progress=lambda now: bar.update(now.done - bar.n),
        )
    heldout = zoo.prompts("emoji", "heldout")[: given.prompts]
    results: list[dict[str, Any]] = []
    for budget in tqdm(given.budgets, desc="comparing", unit="budget"):
        plain = {name: names.solver(name, pipe.scheduler).scheduler() for name in PLAIN}
        found = race(
            pipe,
            kb,
            heldout,
            plain,
            fine=solver.scheduler(),
            steps=budget,
            batch_size=min(given.batch_size, len(heldout)),
        )
        results.append(as_json(found))
    document = {
        "command": " ".join(["python", *sys.argv]) if argv is None else list(argv),
        "rows": len(kb),
        "prompts": len(heldout),
        "fine_steps": FINE,
        "guidance": GUIDANCE,
        "seed": given.seed,
        "threads": torch.get_num_threads(),
        "versions": dict(kb.config.created_with),
        "seconds_are": f"denoising loop of one batch of {given.batch_size}, median over batches",
        "budgets": results,
    }
    (given.out / "quality.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    plot(results, given.out / "quality.png")
    return 0


def as_json(found: Race) -> dict[str, Any]:
    return {
        "nfe": found.redi.nfe,
        "fine": found.fine.to_json(),
        "plain": [c.to_json() for c in found.plain],
        "redi": found.redi.to_json(),
        "frechet_directions": found.directions,
    }


def plot(results: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    calls = [r["nfe"] for r in results]
    measures = {"frechet": "Fréchet distance to the fine solve", "latent_error": "latent error against the fine solve"}
    for axes, (measure, label) in zip(figure.subplots(1, 2), measures.items(), strict=True):
        for name in PLAIN:
            points = [next(c for c in r["plain"] if c["solver"] == name)[measure] for r in results]
            axes.plot(calls, points, "o--", label=name, alpha=0.7)
        axes.plot(calls, [r["redi"][measure] for r in results], "o-k", label="redi", linewidth=2)
        axes.set(xlabel="model calls per picture", ylabel=label, yscale="log", xticks=calls)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
