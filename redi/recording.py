"""Rows from calls that a user makes anyway: the only way in for pipelines that are given pictures."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, final

from torch import Tensor

from redi.errors import FingerprintMismatchError, InvalidInputError, PlanError
from redi.interception import Interception, Listener, Start, starts_from_picture
from redi.knowledge_base import Config, Fingerprint, KnowledgeBase, Refusal, Writer
from redi.knowledge_base.manifest import CONFIG
from redi.look import told
from redi.negatives import negative_prompts
from redi.noise import NoiseBank
from redi.pictures import row_names
from redi.pipelines import changeable, fingerprint, settings_of
from redi.plan import Plan, Route
from redi.recorder import Recorder
from redi.schedules import Timetable
from redi.settings import REFUSED
from redi.solvers import DiffusersSolver
from redi.starts import places_of, prompts_of, start_from
from redi.transports import needs
from redi.types import Record, Rows

# what goes by the number of a step, which is another number in a run that leaps
_BY_STEP: Final = (
    *("control_guidance_start", "control_guidance_end", "guess_mode", "cfg_trunc_ratio"),
    *("skip_guidance_layers", "skip_layer_guidance_start", "skip_layer_guidance_stop"),
)


@final
@dataclass
class _Call:
    """What is known of the call under way."""

    arguments: Mapping[str, Any]
    steps: int = 0
    timetable: Timetable | None = None
    shape: tuple[int, ...] = ()
    size: tuple[int | None, int | None] = (None, None)
    first: float | None = None  # the timestep at which noise was put on a picture
    bank: NoiseBank | None = None
    noise_ids: Tensor | None = None
    embeddings: list[Tensor] = field(default_factory=list[Tensor])
    recorder: Recorder | None = None


@final
@dataclass
class Recording(Listener):
    """Listens to fine runs that a user makes, and writes their rows; `record` makes one.

    Attributes:
        strangers: pictures that began from latents which are not the bank's noise, and so gave no row.
    """

    pipe: Any
    solver: DiffusersSolver
    folder: Path
    plans: Sequence[Plan]
    bank: Mapping[str, Any]  # size, seed and diversity
    storage: str
    model: str | None
    strangers: int = 0
    _taken: int = 0
    _writer: Writer | None = None
    _mark: Fingerprint | None = None  # of the first call: hashing weights takes time
    _call: _Call | None = None

    @property
    def rows(self) -> int:
        """Rows recorded since the block began."""
        return 0 if self._writer is None else self._taken - len(self._writer.refused) - self._writer.skipped

    @property
    def refused(self) -> tuple[Refusal, ...]:
        """Rows that were not written, with reasons."""
        return () if self._writer is None else self._writer.refused

    def call(self, pipe: Any, proceed: Callable[..., Any], arguments: dict[str, Any], given: frozenset[str]) -> Any:
        """Let the user's call run, and keep what it leaves.

        Raises:
            InvalidInputError: its arguments make runs that could not be served.
            PlanError: a plan does not fit the steps it walks.
            FingerprintMismatchError: its settings are not those of the knowledge base.
        """
        if self._call is not None:
            raise InvalidInputError(
                "this pipeline is in the middle of a call already (another thread's, or the one whose callback this "
                "is); record from one call at a time"
            )
        _refuse(pipe, arguments)
        self._call = call = _Call(arguments)
        try:
            out = proceed(**arguments)
        finally:
            self._call = None
        if call.recorder is not None:
            self.keep(call, call.recorder)
        return out

    def set_timesteps(self, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learn the schedule."""
        proceed(*args, **kwargs)
        if self._call is not None:
            self._call.steps, self._call.timetable = told(proceed, args, kwargs)
            self.begin(self._call)

    def noise(self, drawn: Tensor, start: Start) -> Tensor:
        """Start from the bank, and learn at which timestep."""
        call = self._call
        if call is None:
            return drawn
        call.bank = NoiseBank(shape=tuple(drawn.shape[1:]), **self.bank)
        call.noise_ids, used = start_from(call.bank, drawn, start, prompts_of(call.arguments, len(drawn)), 0)
        given = {**call.arguments, **start.arguments}
        call.size = (given.get("height"), given.get("width"))
        timestep = start.arguments.get("timestep")
        call.first = None if timestep is None else float(timestep.flatten()[0])
        return used

    def prepared(self, sample: Tensor) -> None:
        """Learn the sample's shape."""
        if self._call is not None:
            self._call.shape = tuple(sample.shape[1:])
            self.begin(self._call)

    def embedded(self, embeddings: Tensor) -> None:
        """Keep the prompts' embeddings."""
        if self._call is not None:
            self._call.embeddings.append(embeddings)

    def step(
        self, proceed: Callable[..., Any], model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any
    ) -> Any:
        """Keep what rows need."""
        if self._call is None or self._call.recorder is None:
            return proceed(model_output, timestep, sample, **kwargs)
        return self._call.recorder.step(proceed, model_output, timestep, sample, **kwargs)

    def begin(self, call: _Call) -> None:
        """Once schedule and noise are known, and before the model is called: check the call, open the folder."""
        if call.timetable is None or call.bank is None or not call.shape:
            return
        scheduler = self.pipe.scheduler
        times: list[float] = scheduler.timesteps.tolist()
        begin = 0 if call.first is None else times.index(call.first)
        solver = self.solver.on(replace(call.timetable, begin=begin))
        steps = call.steps - begin
        if misfits := [str(p) for p in self.plans if p.fine != steps]:
            raise PlanError(
                f"this call walks {steps} of its {call.steps} steps, and {', '.join(misfits)} is for others; "
                f"record with a plan whose fine steps are {steps}"
            )
        record, schedule = Record(), solver.schedule(steps)
        for plan in self.plans:
            if starts_from_picture(self.pipe) and not plan.own_grid:
                raise PlanError(
                    f"{type(self.pipe).__name__} counts its steps from a picture on, so it cannot jump ({plan}); "
                    "record a coarse plan"
                )
            if plan.halved:
                raise PlanError(
                    f"plan {plan} leaves half of its first calls to the rows, whose calls must then differ in their "
                    "prompts alone; such rows are made by redi.build"
                )
            record |= needs(Route.lay(plan, schedule), solver)
        mark = self.mark(call, solver, steps)
        config = Config(mark, record, call.bank.to_json(), tuple(map(str, self.plans)), self.storage)
        if self._writer is None:
            self._writer = Writer.open(self.folder, config)
        self._writer.config.require(config, "make calls of one knowledge base with one set of settings")
        call.recorder = Recorder(solver, steps, record, whole=True)
        call.recorder.begin(scheduler)

    def mark(self, call: _Call, solver: DiffusersSolver, steps: int) -> Fingerprint:
        """The fingerprint of a call."""
        given = call.arguments
        (negative,) = negative_prompts(self.pipe, given)
        guidance, rescale = given.get("guidance_scale"), given.get("guidance_rescale")
        if self._mark is None:
            self._mark = fingerprint(
                self.pipe, solver, steps=steps, guidance=1.0, sample_shape=call.shape, model=self.model
            )
        return replace(
            self._mark,
            scheduler=solver.name,
            scheduler_config=dict(solver.config),
            steps=steps,
            guidance=1.0 if guidance is None else float(guidance),
            guidance_rescale=float(rescale or 0.0),
            negative_prompt=negative,
            height=call.size[0],
            width=call.size[1],
            sample_shape=call.shape,
            settings=settings_of(self.pipe, given),
            **changeable(self.pipe),
        )

    def keep(self, call: _Call, recorder: Recorder) -> None:
        """Write the rows of a call that has ended."""
        assert self._writer is not None
        assert call.noise_ids is not None
        if recorder.entry < recorder.record.last:
            return  # interrupted
        if call.embeddings:
            recorder.embedded(call.embeddings[0])
        rows = recorder.rows(call.noise_ids, row_names(call.arguments, places_of(call.arguments, len(call.noise_ids))))
        known = (call.noise_ids >= 0).nonzero().flatten()
        self.strangers += len(rows) - len(known)
        self._taken += len(known)
        self._writer.append(rows if len(known) == len(rows) else _some(rows, known))

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


@contextmanager
def record(
    pipe: Any,
    kb: KnowledgeBase | str | Path,
    *,
    plans: Sequence[Plan | str] | None = None,
    noises: int = 1,
    seed: int = 0,
    diversity: float = 0.0,
    storage: str = "float16",
    model: str | None = None,
) -> Generator[Recording]:
    """Remember the fine runs that are made in a block, as rows of a knowledge base.

    The pipeline runs as it always does, with its own scheduler; only its starting noise comes from the knowledge
    base's bank, picked by the generator's seed as when it is served. All calls of a knowledge base have one set of
    settings, the first one's. What is different from picture to picture (prompts, pictures, embeddings) may differ.

    Args:
        pipe: a diffusers pipeline. One that starts from a picture (image-to-image, inpainting) may record coarse
            plans, whose fine steps are those that its `strength` leaves.
        kb: a knowledge base to go on with, or the folder of a new one.
        plans: what a new one shall serve.
        noises: M, starting noises in its bank.
        seed: of its bank.
        diversity: η, how far from its bank noise a run may start.
        storage: dtype on disk.
        model: a name for the model.

    Yields:
        What was recorded so far. The rows are all on the disk when the block ends.

    Raises:
        InvalidInputError: a new knowledge base without plans, or a pipeline that has no place for us.
        UnsupportedSolverError: a scheduler that does not replay.
    """
    folder = kb.path if isinstance(kb, KnowledgeBase) else Path(kb)
    if (folder / CONFIG).exists():
        config, _ = Config.read(folder / CONFIG)
        bank = {name: value for name, value in config.noise.items() if name != "shape"}
        wanted, storage, model = config.plans, config.storage, model or config.fingerprint.model
        if plans is not None and tuple(map(str, plans)) != tuple(wanted):
            raise FingerprintMismatchError(
                {"plans": (list(wanted), list(map(str, plans)))}, "leave the plans out, or choose another folder"
            )
    elif not plans:
        raise InvalidInputError(f"{folder} is a new knowledge base; say what it shall serve: plans=['coarse:8/40']")
    else:
        bank, wanted = {"size": noises, "seed": seed, "diversity": diversity}, plans
    solver = DiffusersSolver.of(pipe.scheduler, Timetable(mu=0.0))  # `mu` is the pipeline's to say; the rest is checked
    parsed = [Plan.parse(p) if isinstance(p, str) else p for p in wanted]
    recording = Recording(pipe, solver, folder, parsed, bank, storage, model)
    interception = Interception(pipe, solver.scheduler(), recording)
    interception.install()
    try:
        yield recording
    finally:
        interception.remove()
        recording.close()


def _refuse(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments whose runs could not be served.

    Raises:
        InvalidInputError: names them.
    """
    wrong = [name for name in REFUSED if arguments.get(name)]
    wrong += [name for name in settings_of(pipe, arguments) if name in _BY_STEP]
    if len(negative_prompts(pipe, arguments)) > 1:
        wrong.append("several negative prompts")
    if starts_from_picture(pipe) and arguments.get("latents") is not None:
        wrong.append("latents")
    if wrong:
        raise InvalidInputError(f"a run with {', '.join(wrong)} cannot be remembered; make this call outside the block")


def _some(rows: Rows, which: Tensor) -> Rows:
    """Some of the rows."""
    return Rows(
        {e: x[which] for e, x in rows.samples.items()},
        {e: x[which] for e, x in rows.denoised.items()},
        {e: {name: leaf[which] for name, leaf in leaves.items()} for e, leaves in rows.history.items()},
        rows.noise_ids[which],
        rows.embeddings[which],
        [rows.prompts[int(i)] for i in which.tolist()],
        {e: x[which] for e, x in rows.unconditional.items()},
    )
