"""What is refused, by name, and what the message says to do."""

from __future__ import annotations

import diffusers
import pytest
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from redi.errors import ReDiError, UnsupportedSolverError
from redi.solvers import DiffusersSolver
from redi.solvers.grids import schedule_of, spec_of
from redi.solvers.specs import SPECS, find_spec


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("EulerAncestralDiscreteScheduler", "use EulerDiscreteScheduler"),
        ("KDPM2AncestralDiscreteScheduler", "use HeunDiscreteScheduler"),
        ("DDPMScheduler", "use DDIMScheduler"),
        ("SASolverScheduler", "use UniPCMultistepScheduler"),
        ("LCMScheduler", "consistency model"),
        ("TCDScheduler", "consistency model"),
        ("DDIMInverseScheduler", "use DDIMScheduler"),
        ("KDPM2DiscreteScheduler", "use HeunDiscreteScheduler"),
        ("EDMEulerScheduler", "use EulerDiscreteScheduler"),
    ],
)
def test_stochastic_and_untaught_schedulers_are_refused_by_name(name, instead):
    with pytest.raises(UnsupportedSolverError, match=f"{name} is not supported.*{instead}"):
        DiffusersSolver.of(object.__new__(getattr(diffusers, name)))  # refused by class alone, before it is looked into
    with pytest.raises(UnsupportedSolverError, match=name):
        DiffusersSolver.from_config(name, {})


def test_every_scheduler_of_diffusers_is_known_or_refused():
    for name in dir(diffusers):
        kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
        if isinstance(kind, type) and issubclass(kind, SchedulerMixin) and name not in SPECS:
            with pytest.raises(UnsupportedSolverError, match=f"{name} is not supported"):
                find_spec(name)


def test_specs_name_classes_that_exist():
    for name, spec in SPECS.items():
        assert spec.name == name
        assert issubclass(getattr(diffusers, name), SchedulerMixin)


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("PNDMScheduler", {}, "skip_prk_steps=False.*set skip_prk_steps=True"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "noise in every step"),
        ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "noise in every step"),
        ("DPMSolverMultistepScheduler", {"variance_type": "learned"}, "variance"),
        ("DPMSolverMultistepScheduler", {"use_dynamic_shifting": True}, "mu"),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, "mu"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "noise in every step"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "signal"),
        ("UniPCMultistepScheduler", {"solver_p": diffusers.DDIMScheduler()}, "predictor"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "use_flow_sigmas"),
        (
            "DPMSolverMultistepScheduler",
            {"prediction_type": "v_prediction", "use_flow_sigmas": True},
            "belong together",
        ),
        ("IPNDMScheduler", {"trained_betas": [0.1, 0.2]}, "number"),
        ("DDIMScheduler", {"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
    ],
)
def test_settings_that_do_not_replay_are_refused(name, settings, why):
    with pytest.raises(UnsupportedSolverError, match=f"(?s){name} with.*{why}"):
        DiffusersSolver.of(getattr(diffusers, name)(**settings))
    with pytest.raises(ReDiError):
        schedule_of(getattr(diffusers, name)(**settings), 5)


def test_a_shift_set_afterwards_is_refused():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_shift(5.0)
    with pytest.raises(UnsupportedSolverError, match=r"make the scheduler with shift=5.0"):
        DiffusersSolver.of(scheduler)


def test_subclasses_and_look_alikes_are_refused():
    class Mine(diffusers.DDIMScheduler):
        pass

    with pytest.raises(UnsupportedSolverError, match="derives from DDIMScheduler"):
        spec_of(Mine())
    look_alike = type("DDIMScheduler", (diffusers.DDIMScheduler,), {})
    with pytest.raises(UnsupportedSolverError, match="not one of diffusers' own"):
        spec_of(look_alike())
    with pytest.raises(UnsupportedSolverError, match="unknown class"):
        spec_of(object())
