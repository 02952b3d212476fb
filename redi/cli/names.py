"""What solvers, combiners, retrievers and the rest are called on the command line. Nowhere else is a string a class."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from redi.errors import InvalidInputError, PlanError, ReDiError, UnsupportedSolverError

if TYPE_CHECKING:
    from redi.backends import Retriever
    from redi.combiners import Combiner
    from redi.plan import Plan
    from redi.solvers import DiffusersSolver
    from redi.transports import Transport

SOLVERS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmsolver++3": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "dpmsolver-singlestep": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "ipndm": ("IPNDMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow-heun": ("FlowMatchHeunDiscreteScheduler", {}),
}
COMBINERS: Final = ("nearest", "least-squares", "nnls", "affine", "kriging")
TRANSPORTS: Final = ("value", "residual", "defect")
KEYS: Final = ("denoised", "sample", "prompt")
RETRIEVERS: Final[Mapping[str, str]] = {"exact": "Exact", "faiss": "Faiss", "hnsw": "Hnsw", "scann": "Scann"}

_KARRAS: Final = "-karras"
_FEW: Final = re.compile(r"few:(\d+)(h?)/(\d+)")
# these walk a flow's schedule when they are told to; the others of a diffusion model cannot
_CAN_FLOW: Final = ("dpmsolver++", "dpmsolver++3", "deis", "unipc")


def solver(name: str, trained: Any) -> DiffusersSolver:
    """The solver of this name for a model whose pipeline came with the scheduler `trained`.

    Args:
        name: one of `SOLVERS`; with `-karras` after it, on the noise levels of Karras et al. (2022).
        trained: a diffusers scheduler.

    Raises:
        InvalidInputError: there is no such solver.
        UnsupportedSolverError: the model was trained for another kind.
    """
    name, karras = name.removesuffix(_KARRAS), name.endswith(_KARRAS)
    if name not in SOLVERS:
        raise InvalidInputError(
            f"there is no solver {name!r}; there is: {', '.join(SOLVERS)}; most also with {_KARRAS} after the name"
        )
    import diffusers

    from redi.schedules import PLAIN, Timetable
    from redi.solvers import DiffusersSolver

    class_name, settings = SOLVERS[name]
    theirs, flow = type(trained).__name__, _flows(trained)
    if name == "ipndm" and theirs != class_name:
        raise UnsupportedSolverError(
            f"ipndm walks a noise schedule of its own, which this model (it came with {theirs}) was not trained on; "
            "use lms or deis, which are of the same family"
        )
    if name.startswith("flow-") and not flow:
        raise UnsupportedSolverError(
            f"{name} is for models trained by flow matching; this one came with {theirs}; use dpmsolver++ or euler"
        )
    if flow and not name.startswith("flow-"):
        if name not in _CAN_FLOW:
            raise UnsupportedSolverError(
                f"this model was trained by flow matching (it came with {theirs}), which {name} cannot walk; "
                f"use flow-euler, flow-heun, {', '.join(_CAN_FLOW)}"
            )
        shift = trained.config.get("shift", trained.config.get("flow_shift", 1.0))
        settings = {**settings, "use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    kind = getattr(diffusers, class_name)
    if karras:
        if flow or "use_karras_sigmas" not in inspect.signature(kind).parameters:
            raise UnsupportedSolverError(
                f"{name} cannot walk Karras noise levels with this model; leave {_KARRAS} away"
            )
        settings = {**settings, "use_karras_sigmas": True}
    # a shift that goes by the picture's size is the pipeline's to say when it is called
    told = Timetable(mu=0.0) if flow and trained.config.get("use_dynamic_shifting") else PLAIN
    return DiffusersSolver.of(kind.from_config(trained.config, **settings), told)


def label(chosen: DiffusersSolver, trained: Any) -> str:
    """What a solver of such a model is called here; its class where it has no name.

    Args:
        chosen: the solver.
        trained: the scheduler that the model's pipeline came with.
    """
    for name in (n + end for n in SOLVERS for end in ("", _KARRAS)):
        try:
            if solver(name, trained).identity() == chosen.identity():
                return name
        except ReDiError:
            continue
    return str(chosen).removesuffix("Scheduler")


def fine_solver(trained: Any, name: str | None = None) -> DiffusersSolver:
    """The solver of the rows: the one of this name, else DPM-Solver++ 2M, for a diffusion on Karras noise levels.

    On these the same number of steps comes nearer to the solution: `python -m benchmarks.quality choices`.

    Raises:
        ReDiError: as `solver`.
    """
    return solver(name or ("dpmsolver++" if _flows(trained) else f"dpmsolver++{_KARRAS}"), trained)


def _flows(trained: Any) -> bool:
    return type(trained).__name__.startswith("FlowMatch") or trained.config.get("prediction_type") == "flow_prediction"


def combiner(text: str) -> Combiner:
    """The combiner of this name; `affine:0.5` gives its ridge, `kriging:0.2` its nugget.

    Raises:
        InvalidInputError: there is no such combiner, or what follows is no number.
    """
    from redi.combiners import NNLS, Affine, Kriging, LeastSquares, Nearest

    name, _, amount = text.partition(":")
    plain: dict[str, type[Combiner]] = {"nearest": Nearest, "least-squares": LeastSquares, "nnls": NNLS}
    smooth: dict[str, type[Affine] | type[Kriging]] = {"affine": Affine, "kriging": Kriging}
    if name in plain and not amount:
        return plain[name]()
    if name in smooth:
        try:
            return smooth[name](float(amount)) if amount else smooth[name]()
        except ValueError as e:
            raise InvalidInputError(f"--combiner {text}: expected {name}:NUMBER, given {amount!r} as the number") from e
    raise InvalidInputError(
        f"there is no combiner {text!r}; there is: {', '.join(COMBINERS)}, affine:RIDGE, kriging:NUGGET"
    )


def transport(name: str) -> Transport:
    """The transport of this name.

    Raises:
        InvalidInputError: there is none.
    """
    from redi.transports import Defect, Residual, Value

    kinds: dict[str, type[Transport]] = {"value": Value, "residual": Residual, "defect": Defect}
    if name not in kinds:
        raise InvalidInputError(f"there is no transport {name!r}; there is: {', '.join(TRANSPORTS)}")
    return kinds[name]()


def plans(text: str, few: Callable[[int, int, bool], Plan] | None = None) -> Sequence[Plan]:
    """One or several plans with commas between them.

    Args:
        text: as `Plan.parse` reads each; or `few:CALLS/FINE`, `few:CALLSh/FINE`, where calls may be placed.
        few: places so many calls in a schedule of so many steps, the first two by halves or not.

    Raises:
        PlanError: one cannot be read.
    """
    from redi.plan import Plan

    def read(part: str) -> Plan:
        if not part.startswith("few:"):
            return Plan.parse(part)
        if few is None:
            raise PlanError(f"{part} is placed when a knowledge base is built; name the plan as redi info KB shows it")
        if not (m := _FEW.fullmatch(part)):
            raise PlanError(f"cannot read plan {part!r}; write it as 'few:CALLS/FINE', e.g. few:8/40, few:8h/40")
        return few(int(m[1]), int(m[3]), bool(m[2]))

    # an `at:` plan has commas of its own, before digits
    return list(dict.fromkeys(read(part) for part in re.split(r",\s*(?=[a-z])", text.strip())))


def evenly(calls: int, fine: int, halved: bool) -> Plan:
    """So many calls evenly spread, the first two of a step more by halves or not."""
    from redi.plan import Plan

    return Plan.coarse(calls + 1, fine).halving() if halved else Plan.coarse(calls, fine)


def placing(solver: DiffusersSolver, guidance: float) -> Callable[[int, int, bool], Plan]:
    """Where few calls of this solver are made: placed for the guidance on Karras noise levels, else evenly spread."""
    from redi.plan import Plan

    def place(calls: int, fine: int, halved: bool) -> Plan:
        return Plan.placed(calls, fine, guidance=guidance, halved=halved)

    return place if solver.on_karras else evenly


def retriever(text: str) -> Retriever:
    """The retriever of this name: `exact`, `hnsw:M=32,rerank=100`, `faiss:IVF256,SQfp16:nprobe=16,rerank=100`.

    Raises:
        InvalidInputError: there is no such retriever, or it has no such setting.
        MissingExtraError: its package is not installed.
    """
    from redi import backends

    name, *parts = text.split(":")
    if name not in RETRIEVERS:
        raise InvalidInputError(f"there is no retriever {name!r}; there is: {', '.join(RETRIEVERS)}")
    kind = getattr(backends, RETRIEVERS[name])
    known = {f.name: type(f.default) for f in dataclasses.fields(kind)}
    first, settings = next(iter(known)), dict[str, Any]()
    for part in parts:
        # faiss's own names of indexes have commas, but no equals sign
        for item in part.split(",") if "=" in part else [f"{first}={part}"]:
            setting, _, value = item.partition("=")
            if setting not in known:
                raise InvalidInputError(f"--retriever {text}: {name} has no {setting!r}; it has {', '.join(known)}")
            try:
                settings[setting] = known[setting](value)
            except ValueError as e:
                wanted = known[setting].__name__
                raise InvalidInputError(f"--retriever {text}: {setting} must be {wanted}, given {value!r}") from e
    return kind(**settings)
