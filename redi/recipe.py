"""How rows of a knowledge base are made: the recipe, checked once, and the fine solver that follows it."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, final

import torch

from redi.embedding import Embeddings
from redi.errors import InvalidInputError, PlanError
from redi.guidance import NOT_DOUBLED, require_halves
from redi.interception import unheard
from redi.knowledge_base import Config, Fingerprint
from redi.look import doubles, look
from redi.negatives import negative_prompts, negative_texts
from redi.noise import NoiseBank
from redi.pipelines import check_size, fingerprint, settings_of, unsettled
from redi.plan import Plan, Route
from redi.recorder import Recorder, listening
from redi.schedules import PLAIN
from redi.solvers import DiffusersSolver
from redi.solvers.grids import spec_of
from redi.transports import needs
from redi.types import Record, Rows

_CALLS: Final = 8
_FINE: Final = 40  # steps of the schedule that they are made of
# pipelines that are tested to guide by one doubled batch, and whose solver may walk Karras noise levels
_DOUBLING: Final = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "PixArtSigmaPipeline")
Item = tuple[str, int]
"""What a row is made from: a prompt and the id of the noise it starts from."""


@final
@dataclass(frozen=True)
class Recipe:
    """How the rows of a knowledge base are made, whatever their prompts.

    Args:
        solver: the fine solver.
        config: what it writes into `config.json`: the model and its settings, what is recorded, the noise bank.
    """

    solver: DiffusersSolver
    config: Config

    @classmethod
    def of(
        cls,
        pipe: Any,
        *,
        plans: Sequence[Plan] | None = None,
        solver: DiffusersSolver | None = None,
        noises: int = 1,
        seed: int = 0,
        diversity: float = 0.0,
        guidance: float = 7.5,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | None = None,
        settings: Mapping[str, Any] | None = None,
        storage: str = "float16",
        model: str | None = None,
    ) -> Recipe:
        """Check settings against a pipeline.

        Args:
            pipe: a diffusers pipeline.
            plans: what the knowledge base shall serve; all of the same fine steps. Rows keep what any of them needs.
                None is eight calls of 40 steps: on Karras noise levels where they were found to be best made
                (`Plan.placed`), by half calls where those were found nearer and the pipeline has them.
            solver: the fine solver; None is the pipeline's own scheduler.
            noises: M, starting noises in the bank.
            seed: of the bank.
            diversity: η, how far from its bank noise a query may start.
            guidance: classifier-free guidance scale.
            height: in pixels; None is the pipeline's default.
            width: likewise.
            negative_prompt: for every row; None is none, not the empty text where a pipeline takes zeros for none
                (Stable Diffusion XL).
            settings: further arguments of the pipeline's call, for every row (`{"num_frames": 16}`).
            storage: dtype on disk.
            model: a name for the model.

        Raises:
            InvalidInputError: settings that cannot work, or a pipeline that does not start from noise.
            UnsupportedSolverError: a scheduler that does not replay.
            PlanError: half calls of a pipeline that has none.
        """
        if plans is not None and len({p.fine for p in plans}) != 1:
            said = ", ".join(map(str, plans)) or "none"
            raise InvalidInputError(f"a build needs plans, which share their fine steps, given {said}")
        check_size(pipe, height, width)
        if lost := unsettled(settings or {}):
            raise InvalidInputError(
                f"settings cannot hold {', '.join(lost)}: a setting is a value that JSON can keep, the same for every "
                "row, and no argument of this function; record what belongs to single pictures with redi.record"
            )
        if solver is None:
            spec_of(pipe.scheduler)
        steps = plans[0].fine if plans else _FINE
        (negative,) = negative_prompts(pipe, {"negative_prompt": negative_prompt})
        arguments = {
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "height": height,
            "width": width,
            "negative_prompt": negative_texts(negative, 1),
            **(settings or {}),
        }
        # it says what it refuses before there is a folder, and what only it knows
        called = _call(pipe, [""], arguments)
        seen = look(pipe, copy.deepcopy(pipe.scheduler) if solver is None else solver.scheduler(), called)
        timetable = seen.timetable or PLAIN
        solver = DiffusersSolver.of(pipe.scheduler, timetable) if solver is None else solver.on(timetable)
        schedule = solver.schedule(steps)
        rescale = (settings or {}).get("guidance_rescale", 0.0)
        checked = functools.partial(
            _checked, pipe, solver, called, scale=guidance, rescale=rescale, diversity=diversity
        )
        plans = [_best(pipe, solver, guidance, checked)] if plans is None else [checked(plan) for plan in plans]
        record = Record()
        for plan in plans:
            record |= needs(Route.lay(plan, schedule), solver)
        bank = NoiseBank(seed=seed, size=noises, shape=seen.shape, diversity=diversity)
        mark = fingerprint(
            pipe,
            solver,
            steps=steps,
            guidance=guidance,
            sample_shape=seen.shape,
            height=seen.height,
            width=seen.width,
            negative_prompt=negative,
            guidance_rescale=rescale,
            settings=settings_of(pipe, settings or {}),
            model=model,
        )
        return cls(solver, Config(mark, record, bank.to_json(), tuple(map(str, plans)), storage))

    @property
    def bank(self) -> NoiseBank:
        """The starting noises."""
        return NoiseBank.from_json(self.config.noise)

    def items(self, prompts: Iterable[str]) -> list[Item]:
        """The whole work: every prompt, once, from every noise; those of one prompt together.

        Raises:
            InvalidInputError: there is no prompt, or one that no tokenizer takes and no file holds.
        """
        if isinstance(prompts, str):
            raise InvalidInputError(f"expected a list of prompts, given one text; for a single row: [{prompts!r}]")
        texts = list(dict.fromkeys(prompts))
        for i, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError as e:
                raise InvalidInputError(
                    f"prompt {i + 1} of {len(texts)} is no valid Unicode ({e.reason}); correct it or leave it out: "
                    f"{text[:80]!r}"
                ) from None
        items = [(p, n) for p in texts for n in range(self.bank.size)]
        if not items:
            raise InvalidInputError("a knowledge base needs at least one prompt, given none")
        return items


@final
class FineSolver:
    """Makes rows of items with a pipeline, which it leaves as it was.

    A row depends on the bank's seed and its noise id alone, not on its batch (but for the float noise of batching).

    Args:
        pipe: the pipeline that `recipe` was checked against.
        recipe: how.

    Attributes:
        most: how many items fit into the memory at once, as far as is known; None while all that were tried did.
    """

    def __init__(self, pipe: Any, recipe: Recipe) -> None:
        self.pipe, self.recipe = pipe, recipe
        self.most: int | None = None
        self._bank = recipe.bank
        self._embeddings = Embeddings()
        mark = recipe.config.fingerprint
        self._recorder = Recorder(recipe.solver, mark.steps, recipe.config.record, mark.guidance)

    def __call__(self, items: Sequence[Item]) -> list[Rows]:
        """Solve, in one piece if the memory suffices: running out of it halves this batch and those that follow."""
        made: list[Rows] = []
        done = 0
        while done < len(items):
            part = items[done : done + (self.most or len(items))]
            try:
                rows = self._solve(part)
            except (RuntimeError, MemoryError) as e:
                if len(part) == 1 or not _out_of_memory(e):
                    raise
                rows = None
            if rows is None:  # out here nothing holds the failed call's tensors any more
                self.most = len(part) // 2
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            made.append(rows)
            done += len(part)
        return made

    def _solve(self, items: Sequence[Item]) -> Rows:
        mark = self.recipe.config.fingerprint
        prompts, ids = [p for p, _ in items], torch.tensor([n for _, n in items])
        self._recorder.start = self._bank.noise(ids)
        # the embeddings stand inside: what the recorder hears is what the denoiser gets
        with self._embeddings.active(self.pipe), listening(self.pipe, self._recorder), quiet(self.pipe):
            self.pipe(**run_of(self.pipe, mark, prompts, mark.steps))
        return self._recorder.rows(ids, prompts)


def _checked(pipe: Any, solver: DiffusersSolver, called: dict[str, Any], plan: Plan, **settings: float) -> Plan:
    """The plan, unless it has half calls that these settings, or this pipeline, do not have."""
    require_halves(plan, **settings, begin=0)
    if plan.halved:
        with quiet(pipe):
            if not doubles(pipe, solver.scheduler(), called):
                raise PlanError(NOT_DOUBLED)
    return plan


def _best(pipe: Any, solver: DiffusersSolver, guidance: float, checked: Callable[[Plan], Plan]) -> Plan:
    """What is served where nobody says; by half calls only where nothing can come in their way."""
    if not solver.suits_coarse:
        raise PlanError(
            f"{solver} cannot be corrected step by step, as a build does that is given no plan; give it jumps, for "
            "instance jump:10:30/40, or another solver"
        )
    if not solver.on_karras:
        return Plan.coarse(_CALLS, _FINE)
    whole, best = (Plan.placed(_CALLS, _FINE, guidance=guidance, halved=halved) for halved in (False, None))
    if type(pipe).__name__ not in _DOUBLING or unheard(pipe):
        return whole
    try:
        return checked(best)
    except PlanError:
        return whole


def run_of(pipe: Any, mark: Fingerprint, prompts: list[str], steps: int) -> dict[str, Any]:
    """Arguments of a pipeline's call with the settings of a knowledge base, that ends with latents."""
    arguments = {
        "num_inference_steps": steps,
        "guidance_scale": mark.guidance,
        "guidance_rescale": mark.guidance_rescale,
        "height": mark.height,
        "width": mark.width,
        "negative_prompt": negative_texts(mark.negative_prompt, len(prompts)),
        **mark.settings,
    }
    return _call(pipe, prompts, arguments)


def _call(pipe: Any, prompts: list[str], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a fine run, those that the pipeline has: its size and guidance need not be called so."""
    known = inspect.signature(type(pipe).__call__).parameters
    # what it draws is replaced; a generator of its own leaves the global one alone
    ours = {"prompt": prompts, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return ours | {name: value for name, value in arguments.items() if name in known and value is not None}


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in text or "allocate memory" in text
    )


@contextmanager
def quiet(pipe: Any) -> Generator[None]:
    """One bar for the whole work, not one for every batch: the pipeline shows none."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**before | {"disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
