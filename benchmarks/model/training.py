"""What every training script shares: a schedule in wall-clock time, checkpoints, an average, a log."""

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

SAVE_SECONDS = 120.0


def parser(description: str | None, minutes: float) -> argparse.ArgumentParser:
    """The options every training script takes."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--data", type=Path, required=True, help="folder that holds emoji32.npz")
    p.add_argument("--out", type=Path, required=True, help="folder for checkpoints and logs")
    p.add_argument("--minutes", type=float, default=minutes, help="length of the run")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    return p


@dataclass
class Clock:
    """Progress through a run of `minutes`, so that a schedule ends on time at any speed."""

    minutes: float
    before: float = 0.0  # seconds spent in earlier runs of the same training
    started: float = field(default_factory=time.perf_counter)

    def seconds(self) -> float:
        """Time trained so far, earlier runs counted in."""
        return self.before + time.perf_counter() - self.started

    def fraction(self) -> float:
        """Share of the run that has passed, from 0 to 1."""
        return min(1.0, self.seconds() / (60.0 * self.minutes))


def learning_rate(peak: float, step: int, fraction: float, warmup: int) -> float:
    """Linear warm-up in steps, then half a cosine down to 1 % of the peak in wall-clock time."""
    cosine = 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * fraction))
    return peak * min(1.0, (step + 1) / warmup) * cosine


class Average:
    """Exponential moving average of a module's weights, with a ramp so that it starts fresh."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the weights of `module`."""
        decay = min(self.decay, (1.0 + step) / (10.0 + step))
        mine, theirs = list(self.module.parameters()), list(module.parameters())
        torch._foreach_lerp_(mine, theirs, 1.0 - decay)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a reader finds the old one or the new one, never a half."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def restore(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


class Run:
    """One training: the step every script takes, and the checkpoint from which it goes on.

    Args:
        model: learns; `average` holds its averaged weights.
        optimizer: over the model's weights.
        generator: of all randomness of the batches.
        path: of the checkpoint; the log lies beside it.
        args: of `parser`.
        peak: highest learning rate.
        decay: of the average.
        warmup: steps until the peak.
        clip: largest norm of a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        path: Path,
        args: argparse.Namespace,
        *,
        peak: float,
        decay: float = 0.999,
        warmup: int = 100,
        clip: float = 1.0,
    ) -> None:
        self.model, self.optimizer, self.generator, self.path = model, optimizer, generator, path
        self.peak, self.warmup, self.clip = peak, warmup, clip
        path.parent.mkdir(parents=True, exist_ok=True)
        self.average = Average(model, decay)
        self.clock, self.step = Clock(args.minutes), 0
        if args.resume:
            state = restore(path)
            model.load_state_dict(state["model"])
            self.average.module.load_state_dict(state["average"])
            optimizer.load_state_dict(state["optimizer"])
            generator.set_state(state["generator"])
            self.step, self.clock.before = int(state["step"]), float(state["seconds"])
        self.first, self.saved, self.loss = self.step, self.clock.seconds(), math.nan

    def unfinished(self) -> bool:
        """Whether there is time left; writes a checkpoint when one is due and when there is none."""
        going = self.clock.fraction() < 1.0
        if not going or self.clock.seconds() - self.saved > SAVE_SECONDS:
            self.save()
            self.saved = self.clock.seconds()
        return going

    def learn(self, loss: Tensor) -> None:
        """One step of the optimizer down the gradient of `loss`."""
        rate = learning_rate(self.peak, self.step, self.clock.fraction(), self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.average.update(self.model, self.step)
        self.step += 1
        value = loss.item()
        self.loss = value if math.isnan(self.loss) else 0.99 * self.loss + 0.01 * value
        if self.step % 100 == 0:
            seconds = self.clock.seconds()
            speed = (self.step - self.first) / (seconds - self.clock.before)
            self.log(seconds=seconds, loss=self.loss, rate=rate, steps_per_second=speed)

    def log(self, **values: float) -> None:
        """Append one line of JSON to the log and show it."""
        line = json.dumps({"step": self.step} | {k: round(v, 6) for k, v in values.items()})
        with self.path.with_suffix(".jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def save(self) -> None:
        """Write the checkpoint."""
        save(
            self.path,
            {
                "model": self.model.state_dict(),
                "average": self.average.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "generator": self.generator.get_state(),
                "step": self.step,
                "seconds": self.clock.seconds(),
            },
        )


def safe_upsampling(model: nn.Module) -> nn.Module:
    """Let the model double its maps by copying instead of by `interpolate`; same values.

    Compiled for CPU in bfloat16, torch 2.13 gives `interpolate(mode="nearest")` a gradient near
    zero, and everything below it stops learning.
    """

    def double(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        b, c, h, w = x.shape
        copies = x[:, :, :, None, :, None].expand(b, c, h, 2, w, 2)
        return copies.reshape(b, c, 2 * h, 2 * w), *inputs[1:]

    for module in model.modules():
        if isinstance(module, Upsample2D):
            module.interpolate = False
            module.register_forward_pre_hook(double)
    return model


def compiled(loss: Callable[..., Tensor], model: nn.Module) -> Callable[..., Tensor]:
    """`loss(model, *batch)` compiled, in bfloat16, its gradient held to the eager one's once.

    Raises:
        RuntimeError: the compiler's gradient for the first batch is wrong.
    """
    fast = torch.compile(loss)
    checked = False

    def gradient(f: Callable[..., Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        weights = [w for w in model.parameters() if w.requires_grad]
        found = torch.autograd.grad(f(model, *batch), weights, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    def call(*batch: Tensor) -> Tensor:
        nonlocal checked
        with torch.autocast("cpu", torch.bfloat16):
            if not checked:
                cosine = torch.cosine_similarity(gradient(fast, batch), gradient(loss, batch), dim=0)
                if cosine < 0.98:  # bfloat16 alone leaves it above 0.99
                    raise RuntimeError(
                        f"the compiled gradient points elsewhere than the eager one (cosine "
                        f"{float(cosine):.3f}): train without torch.compile or change torch"
                    )
                checked = True
            return fast(model, *batch)

    return call
