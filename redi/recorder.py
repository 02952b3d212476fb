"""Runs a pipeline finely and keeps what rows need, stopping after the last entry that is needed.

The pipeline's own loop does the sampling, so whatever it does (guidance, extra conditioning) is in the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from redi.errors import InvalidInputError, PlanError
from redi.guidance import unconditional_half
from redi.interception import EnoughError, Interception, Listener, Start, heard
from redi.solvers import DiffusersSolver, SolverAdapter, snapshot
from redi.types import Record, Rows


@final
@dataclass
class Recorder(Listener):
    """Listens to one fine run of a pipeline and keeps the entries of `record`.

    Args:
        solver: whose run it is.
        steps: its steps.
        record: what to keep.
        guidance: classifier-free guidance scale of the run; only unconditional outputs need it.
        whole: whether the run goes to its end, or stops after the last entry that is wanted.
        start: unit noise to start from; None leaves what the pipeline drew.
    """

    solver: DiffusersSolver
    steps: int
    record: Record
    guidance: float = 1.0
    whole: bool = False
    start: Tensor | None = None
    samples: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    denoised: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    history: dict[int, dict[str, Tensor]] = field(default_factory=dict[int, dict[str, Tensor]])
    unconditional: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    embeddings: Tensor | None = None
    entry: int = 0
    question: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # the network's last arguments
    answer: Any = None  # and what it said
    scheduler: Any = None

    def __post_init__(self) -> None:
        self.grid = self.solver.schedule(self.steps)

    def call(self, pipe: Any, proceed: Callable[..., Any], arguments: dict[str, Any], given: frozenset[str]) -> Any:
        """Begin a new recording and let the pipeline run."""
        self.begin(pipe.scheduler)
        try:
            with heard(pipe, self) if self.record.unconditional else nullcontext():
                return proceed(**arguments)
        except EnoughError:
            return None

    def begin(self, scheduler: Any) -> None:
        """Forget the last run; this one's steps are the scheduler's."""
        self.scheduler = scheduler
        self.samples, self.denoised, self.history, self.unconditional = {}, {}, {}, {}
        self.entry, self.embeddings, self.question, self.answer = 0, None, None, None

    def asked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hear what the network is asked."""
        self.question = args, kwargs

    def answered(self, output: Any) -> Any:
        """Hear what it says, before that is guided."""
        self.answer = output
        return output

    def noise(self, drawn: Tensor, start: Start) -> Tensor:
        """Start from the noise that was given."""
        return drawn if self.start is None else (self.start * start.scale).to(drawn)

    def embedded(self, embeddings: Tensor) -> None:
        """Keep the mean over tokens of what the pipeline encoded first, its prompts."""
        if self.embeddings is None:
            self.embeddings = embeddings.detach().float().mean(1).cpu()

    def set_timesteps(self, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See to it that the pipeline walks the schedule that is recorded.

        Raises:
            PlanError: it walks another.
        """
        proceed(*args, **kwargs)
        walked = self.scheduler.timesteps[self.grid.timetable.begin :].cpu()
        if not torch.equal(walked, self.grid.timesteps.cpu()):
            raise PlanError(
                f"the pipeline walks {len(walked)} timesteps from {float(walked[0]) if len(walked) else 0:g} to "
                f"{float(walked[-1]) if len(walked) else 0:g}, not the {len(self.grid)} of {self.solver}; leave its "
                "timesteps and sigmas to the pipeline, or give no solver and take the pipeline's own"
            )

    def step(
        self, proceed: Callable[..., Any], model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any
    ) -> Any:
        """Keep x, x̂0 and the history before this call; leave when nothing more is wanted."""
        e = self.entry
        self.keep_sample(e, sample)
        if e in self.record.denoised:
            self.denoised[e] = self.grid.denoised(model_output, sample, e).detach().cpu()
        if e in self.record.unconditional:
            self.unconditional[e] = unconditional_half(self.question, self.answer, model_output, self.guidance).cpu()
        out = proceed(model_output, timestep, sample, **kwargs)
        self.entry = e + 1
        if self.entry in self.record.history:
            leaves = snapshot(self.scheduler, self.grid, self.entry).leaves()
            self.history[self.entry] = {name: leaf.detach().cpu() for name, leaf in leaves.items()}
        if self.entry == self.record.last:
            self.keep_sample(self.entry, out[0])
            if not self.whole:
                raise EnoughError
        return out

    def keep_sample(self, entry: int, sample: Tensor) -> None:
        """Keep x[entry] if it is wanted."""
        if entry in self.record.samples:
            self.samples[entry] = sample.detach().cpu()

    def rows(self, noise_ids: Tensor, prompts: Sequence[str]) -> Rows:
        """What the last run left, one row for each of its samples."""
        embeddings = self.embeddings
        if embeddings is None or len(embeddings) != len(prompts):  # some pipelines encode other things with the prompts
            embeddings = torch.zeros(len(prompts), 0)
        return Rows(self.samples, self.denoised, self.history, noise_ids, embeddings, prompts, self.unconditional)


@contextmanager
def listening(pipe: Any, recorder: Recorder) -> Generator[Recorder]:
    """Install a recorder for the block."""
    interception = Interception(pipe, recorder.solver.scheduler(), recorder)
    interception.install()
    try:
        yield recorder
    finally:
        interception.remove()


@torch.no_grad()
def trajectory(
    denoise: Callable[..., Tensor],
    noise: Float[Tensor, "b *s"],
    solver: SolverAdapter,
    steps: int,
    record: Record,
    *,
    noise_ids: Int64[Tensor, " b"],
    prompts: Sequence[str],
    condition: Any = None,
    unconditional: Callable[..., Tensor] | None = None,
) -> tuple[Float[Tensor, "b *s"], Rows]:
    """A fine run of any denoiser in our own loop: x at the last entry needed, and the rows to store.

    Args:
        denoise: as for `ReDiEngine.sample`.
        noise: unit-variance starting noise.
        solver: the fine solver.
        steps: its steps.
        record: what to keep; the run stops after the last entry of it.
        noise_ids: which bank noise each sample starts from.
        prompts: names of the rows.
        condition: handed to `denoise`.
        unconditional: the model without the prompt, called as `denoise`; a record of its outputs needs it.

    Raises:
        InvalidInputError: such a record without it.
    """
    if record.unconditional and unconditional is None:
        raise InvalidInputError("a record of unconditional outputs needs the model that makes them: unconditional=")
    grid = solver.schedule(steps)
    x, state = noise * grid.initial_scale, solver.init(grid)
    samples: dict[int, Tensor] = {}
    denoised: dict[int, Tensor] = {}
    history: dict[int, dict[str, Tensor]] = {}
    without: dict[int, Tensor] = {}
    for entry in range(record.last + 1):
        if entry in record.samples:
            samples[entry] = x.cpu()
        if entry in record.history:
            history[entry] = {name: leaf.cpu() for name, leaf in state.leaves().items()}
        if entry == record.last:
            break
        shown, t = grid.scale_input(x, entry), grid.timesteps[entry].to(x.device)
        asked = (shown, t) if condition is None else (shown, t, condition)
        m = denoise(*asked)
        if entry in record.denoised:
            denoised[entry] = grid.denoised(m, x, entry).cpu()
        if unconditional is not None and entry in record.unconditional:
            without[entry] = unconditional(*asked).cpu()
        x, state = solver.step(m, x, state)
    return x, Rows(samples, denoised, history, noise_ids, torch.zeros(len(prompts), 0), prompts, without)
