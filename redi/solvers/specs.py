"""What redi knows about each diffusers scheduler, as data: history fields, arrays, noise law, legal settings.

Nothing here runs a scheduler or imports diffusers; `redi.solvers.diffusers` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, final

from redi.errors import UnsupportedSolverError

Empty = Literal["none", "zero", "list", "slots"]
Law = Literal["cumprod", "variance_preserving", "sigma", "flow", "ipndm"]
Layout = Literal["each", "plms", "heun", "singlestep"]


@final
@dataclass(frozen=True, slots=True)
class HistoryField:
    """One attribute in which a scheduler remembers earlier steps.

    Args:
        name: the attribute.
        empty: its value with no memory; `slots` is a list of `solver_order` Nones.
        newest: how many of a list's newest elements the next step can still read; older ones are not kept.
        stale: how many of a slot list's oldest elements the next step overwrites unread.
    """

    name: str
    empty: Empty
    newest: int = 0
    stale: int = 0


@final
@dataclass(frozen=True, slots=True)
class Requirement:
    """A setting that must have one of the `allowed` values, and why."""

    key: str
    allowed: tuple[Any, ...]
    why: str


@final
@dataclass(frozen=True, slots=True)
class SolverSpec:
    """One supported scheduler class.

    Args:
        name: class name in diffusers.
        law: where a(t), s(t) come from: `alphas_cumprod` by timestep, `sigmas` read as variance-preserving, `sigmas`
            themselves, `sigmas` of a flow, or IPNDM's `alphas` and `betas`.
        history: what it remembers between steps.
        arrays: per-entry arrays it reads by step index, each at least one longer than `timesteps`.
        layout: how solver steps map to entries of `timesteps`.
        coarse: whether a step consumes the sample it is given and works on any subset of its schedule.
        scratch: slot lists that a step writes in place but never reads.
        requirements: settings without which it does not replay.
        prediction: what the model predicts, where the configuration does not say.
    """

    name: str
    law: Law
    history: tuple[HistoryField, ...] = ()
    arrays: tuple[str, ...] = ("sigmas",)
    layout: Layout = "each"
    coarse: bool = True
    scratch: tuple[str, ...] = ()
    requirements: tuple[Requirement, ...] = ()
    prediction: Literal["flow_prediction", "v_prediction"] | None = None

    @property
    def has_index(self) -> bool:
        """Whether the scheduler counts its steps itself; DDIM and PNDM go by timestep."""
        return self.law != "cumprod"


_DYNAMIC: Final = Requirement(
    "use_dynamic_shifting",
    (False,),
    "its schedule depends on the picture's size through `mu`, which the pipeline says; make it the pipeline's "
    "scheduler and give no solver, or set use_dynamic_shifting=False and a fixed shift",
)
_LEARNED: Final = Requirement("variance_type", (None,), "the model's variance channels would take part in distances")
_SDE: Final = Requirement(
    "algorithm_type", ("dpmsolver++", "dpmsolver"), "the sde variants draw noise in every step; use 'dpmsolver++'"
)
_EPSILON_V: Final = Requirement("prediction_type", ("epsilon", "v_prediction"), "its step accepts no other")
_EPSILON_V_SAMPLE: Final = Requirement(
    "prediction_type", ("epsilon", "v_prediction", "sample"), "its step accepts no other"
)
_ANY_PREDICTION: Final = Requirement(
    "prediction_type", ("epsilon", "v_prediction", "sample", "flow_prediction"), "its step accepts no other"
)
_MULTISTEP: Final = (HistoryField("model_outputs", "slots", stale=1), HistoryField("lower_order_nums", "zero"))
_HEUN: Final = (HistoryField("prev_derivative", "none"), HistoryField("dt", "none"), HistoryField("sample", "none"))

SPECS: Final[Mapping[str, SolverSpec]] = {
    spec.name: spec
    for spec in (
        SolverSpec("DDIMScheduler", "cumprod", arrays=(), requirements=(_EPSILON_V_SAMPLE,)),
        SolverSpec(
            "PNDMScheduler",
            "cumprod",
            # At counter 1 the step starts again from cur_sample, so x[1] itself is not what it continues from.
            history=(
                HistoryField("ets", "list", newest=3),
                HistoryField("counter", "zero"),
                HistoryField("cur_sample", "none"),
            ),
            arrays=(),
            layout="plms",
            coarse=False,
            requirements=(
                Requirement(
                    "skip_prk_steps",
                    (True,),
                    "the Runge–Kutta start calls the model four times in each of its steps; set skip_prk_steps=True",
                ),
                _EPSILON_V,
            ),
        ),
        SolverSpec(
            "DPMSolverMultistepScheduler",
            "variance_preserving",
            history=_MULTISTEP,
            requirements=(_SDE, _LEARNED, _DYNAMIC, _ANY_PREDICTION),
        ),
        SolverSpec(
            "DPMSolverSinglestepScheduler",
            "variance_preserving",
            history=(HistoryField("model_outputs", "slots", stale=1), HistoryField("sample", "none")),
            layout="singlestep",
            coarse=False,
            requirements=(_SDE, _LEARNED, _DYNAMIC, _ANY_PREDICTION),
        ),
        SolverSpec(
            "DEISMultistepScheduler",
            "variance_preserving",
            history=_MULTISTEP,
            requirements=(_DYNAMIC, _ANY_PREDICTION),
        ),
        SolverSpec(
            "UniPCMultistepScheduler",
            "variance_preserving",
            # Its corrector reads every slot before the step shifts them, so none is stale.
            history=(
                HistoryField("model_outputs", "slots"),
                HistoryField("lower_order_nums", "zero"),
                HistoryField("this_order", "zero"),
                HistoryField("last_sample", "none"),
            ),
            scratch=("timestep_list",),
            requirements=(
                Requirement("solver_p", (None,), "a second scheduler as predictor keeps a history of its own"),
                _DYNAMIC,
                _ANY_PREDICTION,
            ),
        ),
        SolverSpec(
            "IPNDMScheduler",
            "ipndm",
            history=(HistoryField("ets", "list", newest=3),),
            arrays=("betas", "alphas"),
            requirements=(Requirement("trained_betas", (None,), "their number would have to equal the steps'"),),
            prediction="v_prediction",
        ),
        SolverSpec(
            "LMSDiscreteScheduler",
            "sigma",
            history=(HistoryField("derivatives", "list", newest=3),),
            requirements=(_EPSILON_V_SAMPLE,),
        ),
        SolverSpec("EulerDiscreteScheduler", "sigma", requirements=(_EPSILON_V_SAMPLE,)),
        SolverSpec(
            "HeunDiscreteScheduler",
            "sigma",
            history=_HEUN,
            layout="heun",
            coarse=False,
            requirements=(_EPSILON_V_SAMPLE,),
        ),
        SolverSpec(
            "FlowMatchEulerDiscreteScheduler",
            "flow",
            requirements=(
                Requirement("stochastic_sampling", (False,), "it draws noise in every step"),
                Requirement("invert_sigmas", (False,), "its σ counts signal, not noise"),
                _DYNAMIC,
            ),
            prediction="flow_prediction",
        ),
        SolverSpec(
            "FlowMatchHeunDiscreteScheduler",
            "flow",
            history=_HEUN,
            layout="heun",
            coarse=False,
            prediction="flow_prediction",
        ),
    )
}

_INSTEAD: Final[Mapping[str, str]] = {
    "EulerAncestralDiscreteScheduler": "it draws noise in every step; use EulerDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler": "it draws noise in every step; use HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler": "redi has not been taught it; use HeunDiscreteScheduler or DPMSolverSinglestepScheduler",
    "DDPMScheduler": "it draws noise in every step; use DDIMScheduler or DPMSolverMultistepScheduler",
    "DDPMParallelScheduler": "it draws noise in every step; use DDIMScheduler",
    "DDIMParallelScheduler": "use DDIMScheduler, which takes the same steps",
    "SASolverScheduler": "it draws noise in every step; use UniPCMultistepScheduler",
    "DPMSolverSDEScheduler": "it draws noise in every step; use DPMSolverMultistepScheduler",
    "CosineDPMSolverMultistepScheduler": "it draws noise in every step; use DPMSolverMultistepScheduler",
    "EDMEulerScheduler": "redi has not been taught it; use EulerDiscreteScheduler with use_karras_sigmas=True",
    "EDMDPMSolverMultistepScheduler": "redi has not been taught it; use DPMSolverMultistepScheduler",
    "LCMScheduler": "a consistency model draws noise between its steps and solves no trajectory; use its few steps",
    "TCDScheduler": "a consistency model draws noise between its steps and solves no trajectory; use its few steps",
    "CMStochasticIterativeScheduler": "it draws noise in every step; use HeunDiscreteScheduler",
    "DDIMInverseScheduler": "it walks from picture to noise; use DDIMScheduler",
    "DPMSolverMultistepInverseScheduler": "it walks from picture to noise; use DPMSolverMultistepScheduler",
}


def find_spec(class_name: str) -> SolverSpec:
    """The spec of a scheduler class.

    Raises:
        UnsupportedSolverError: redi cannot replay this scheduler; the message says what to use instead.
    """
    if class_name in SPECS:
        return SPECS[class_name]
    why = _INSTEAD.get(class_name, "redi has not been taught it")
    raise UnsupportedSolverError(f"{class_name} is not supported: {why}. Supported: {', '.join(sorted(SPECS))}")


def check_settings(spec: SolverSpec, config: Mapping[str, Any]) -> None:
    """Refuse settings under which the scheduler draws noise, or steps otherwise than redi can follow.

    Raises:
        UnsupportedSolverError: names the setting, its value, and what is allowed.
    """
    for need in spec.requirements:
        if need.key in config and not any(config[need.key] is v or config[need.key] == v for v in need.allowed):
            raise UnsupportedSolverError(
                f"{spec.name} with {need.key}={config[need.key]!r} is not supported: {need.why}. "
                f"Allowed: {', '.join(map(repr, need.allowed))}"
            )
    flow, prediction = bool(config.get("use_flow_sigmas", False)), config.get("prediction_type")
    if (prediction == "flow_prediction" and not flow) or (prediction == "v_prediction" and flow):
        raise UnsupportedSolverError(
            f"{spec.name} with prediction_type={prediction!r} and use_flow_sigmas={flow} is not supported: "
            "flow_prediction and use_flow_sigmas=True belong together, v_prediction is for the other schedules"
        )
