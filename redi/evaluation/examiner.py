"""Runs a batch of prompts through every way in turn, in the pipeline's own loop, and sees what comes of it.

The clock runs from the first model call to the last step of the solver: what is around is the same for all.
"""

from __future__ import annotations

import copy
import functools
import inspect
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor

from redi.embedding import Embeddings
from redi.errors import InvalidInputError
from redi.evaluation.contest import Batch, Contest
from redi.evaluation.seen import MEASURES, STAGES, Seen
from redi.evaluation.ways import Way
from redi.interception import active
from redi.metrics import agreement, latent_errors
from redi.negatives import negative_texts
from redi.scheduler import enable, report
from redi.serving import Server

_NETWORKS: Final = ("unet", "transformer", "transformer_2")
_SSIM_SIDE: Final = 11  # pixels: its window


@final
@dataclass
class _Watch:
    """What happens in one call of a pipeline.

    Args:
        entries: where the sample is kept: after so many entries of the fine solve.
    """

    entries: Sequence[int] = ()
    calls: int = 0
    steps: int = 0
    began: float = 0.0
    ended: float = 0.0
    model: float = 0.0
    solver: float = 0.0
    sample: Tensor | None = None
    kept: dict[int, Tensor] = field(default_factory=dict[int, Tensor])


@final
@dataclass(frozen=True)
class _Made:
    """What a way made of a batch."""

    pictures: Float[Tensor, "b 3 h w"]
    latents: Float[Tensor, "b *s"]
    at_value: Mapping[int, Tensor]
    calls: int | float
    leapt: Sequence[bool]
    seconds: Mapping[str, float]


@final
class Examiner:
    """Solves batches in every way of a contest.

    Args:
        pipe: the pipeline that the knowledge base was built with, on its device; it is left as it was.
        contest: the ways, and what is measured.

    Raises:
        ReDiError: as `redi.enable` for a way of redi.
    """

    def __init__(self, pipe: Any, contest: Contest) -> None:
        self.pipe, self.contest = pipe, contest
        self._networks = [m for n in _NETWORKS if isinstance(m := getattr(pipe, n, None), torch.nn.Module)]
        self._embeddings, self._remembering = Embeddings(), ExitStack()
        self._known = inspect.signature(type(pipe).__call__).parameters
        # entries of the fine solve that a jump arrives at
        self._entries = sorted({e for way in contest.ways for e in way.values})
        self._watch = _Watch()
        self._lanes = [self._lane(way) for way in contest.ways]

    def __call__(self, batch: Batch) -> list[Seen]:
        """What is seen of each way's pictures, in the order of the ways."""
        prompts = [p for p, _ in batch.items]
        ids = torch.tensor([n for _, n in batch.items])
        first = self._networks[0]
        noise = self.contest.kb.bank.noise(ids).to(first.device, first.dtype)  # type: ignore
        seen: list[Seen] = []
        fine: _Made | None = None
        with self._timed():
            for way, lane in zip(self.contest.ways, self._lanes, strict=True):
                made = self._solve(way, lane, prompts, noise)
                fine = fine or made
                seen.append(self._see(way, made, fine, prompts))
        return seen

    def _lane(self, way: Way) -> Any:
        """The pipeline as this way runs it: the same networks, a scheduler of its own."""
        lane = copy.copy(self.pipe)
        lane.set_progress_bar_config(disable=True)
        if getattr(lane, "safety_checker", None) is not None:
            lane.safety_checker = None  # it would paint pictures black, and all ways alike
        # before redi, whose listener shall hear of prompts that are remembered too
        self._remembering.enter_context(self._embeddings.active(lane))
        if (e := way.engine) is None:
            lane.scheduler = way.solver.scheduler()
        else:
            chosen = {f.name: getattr(e, f.name) for f in fields(e) if f.name not in ("knowledge_base", "notes")}
            enable(lane, e.knowledge_base, **chosen)
        step = lane.scheduler.step
        lane.scheduler.step = functools.wraps(step)(functools.partial(self._step, lane, step))
        return lane

    def _solve(self, way: Way, lane: Any, prompts: list[str], noise: Tensor) -> _Made:
        mark = self.contest.kb.fingerprint
        arguments: dict[str, Any] = {
            "num_inference_steps": way.steps,
            "guidance_scale": mark.guidance,
            "guidance_rescale": mark.guidance_rescale,
            "height": mark.height,
            "width": mark.width,
            "negative_prompt": negative_texts(mark.negative_prompt, len(prompts)),
            **mark.settings,
        }
        told = {n: v for n, v in arguments.items() if v is not None and n in self._known}
        self._watch = watch = _Watch(self._entries if way.kind == "fine" else way.values)
        with torch.no_grad():
            out = lane(prompt=prompts, latents=noise, output_type="pt", **told)
        pictures: Any = out.images if hasattr(out, "images") else out[0]
        if not isinstance(pictures, Tensor) or pictures.ndim != 4 or pictures.shape[1] != 3 or watch.sample is None:
            raise InvalidInputError(
                f"{type(self.pipe).__name__} hands over no pictures of three colours, and nothing else is evaluated"
            )
        stages = {"total": watch.ended - watch.began, "model": watch.model, "solver": watch.solver}
        leapt: Sequence[bool] = [False] * len(prompts)
        calls: int | float = watch.calls
        if way.engine is not None:
            said = report(lane)
            calls = said.nfe if way.engine.plan.halved else calls  # the clock hears of half calls as of whole ones
            leapt = said.leapt or leapt
            stages |= {s: said.seconds.get(s, 0.0) for s in ("solver", "retrieval", "gather", "combine")}
        return _Made(pictures.float(), watch.sample.float().cpu(), watch.kept, calls, leapt, stages)

    def _see(self, way: Way, made: _Made, fine: _Made, prompts: list[str]) -> Seen:
        contest = self.contest
        none, error = torch.full((len(prompts),), torch.nan), latent_errors(made.latents, fine.latents)
        at_value = error if way.kind == "redi" else none  # a coarse plan's last leap arrives at the end
        if way.values:
            last = way.values[-1]
            at_value = latent_errors(made.at_value[last], fine.at_value[last])
        similar = min(made.pictures.shape[-2:]) >= _SSIM_SIDE
        a, b = made.pictures.cpu(), fine.pictures.cpu()
        columns: dict[str, Tensor | Sequence[float]] = {
            "nfe": [made.calls] * len(prompts),
            "leapt": [float(x) for x in made.leapt],
            "latent_error": error,
            "at_value": at_value,
            "l2": (a.double() - b.double()).square().flatten(1).mean(1).sqrt(),
            "ssim": [agreement(x[None], y[None]).ssim for x, y in zip(a, b, strict=True)] if similar else none,
            "lpips": none if contest.lpips is None else contest.lpips(made.pictures, fine.pictures),
            "score": contest.score(made.pictures, prompts),
        }
        per_picture = [made.seconds.get(stage, 0.0) / len(prompts) for stage in STAGES]
        return Seen(
            torch.stack([torch.as_tensor(columns[name], dtype=torch.float64) for name in MEASURES], 1),
            contest.features(made.pictures, made.latents),
            torch.tensor([per_picture], dtype=torch.float64),
        )

    def _step(self, lane: Any, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        watch, began = self._watch, self._now()
        out = proceed(*args, **kwargs)
        watch.ended = self._now()
        watch.solver += watch.ended - began
        watch.steps += 1
        watch.sample = out[0]
        listener = None if (found := active(lane)) is None else found.listener
        run = listener.run if isinstance(listener, Server) else None
        entry = watch.steps if run is None else getattr(run, "position", 0)
        if entry in watch.entries:
            watch.kept[entry] = out[0].float().cpu()
        return out

    @contextmanager
    def _timed(self) -> Generator[None]:
        """Count and time the networks' calls during the block."""
        starts: list[float] = []

        def before(*_: Any) -> None:
            starts.append(self._now())
            if not self._watch.calls:
                self._watch.began = starts[-1]

        def after(*_: Any) -> None:
            self._watch.calls += 1
            self._watch.model += self._now() - starts.pop()

        handles = [n.register_forward_pre_hook(before) for n in self._networks]
        handles += [n.register_forward_hook(after) for n in self._networks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _now(self) -> float:
        if self._networks[0].device.type == "cuda":  # type: ignore
            torch.cuda.synchronize()  # a GPU works on while Python is ahead
        return time.perf_counter()
