"""The schedulers and settings that every solver test runs over."""

from __future__ import annotations

from typing import Any

import pytest

_SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_VP = {"num_train_timesteps": 1000, **_SD}


def _all() -> list[tuple[str, str, dict[str, Any]]]:
    ddim, pndm, multi = "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"
    single, deis, unipc = "DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"
    lms, euler, heun = "LMSDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"
    flow, flow_heun = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"
    v, x0 = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
    karras, leading, trailing = (
        {"use_karras_sigmas": True},
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"timestep_spacing": "trailing"},
    )
    sigma_min = {"final_sigmas_type": "sigma_min"}
    plms = {"skip_prk_steps": True}
    flowing = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    return [
        ("ddim", ddim, _VP | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
        ("ddim-v-trailing", ddim, _VP | v | trailing | {"clip_sample": False, "rescale_betas_zero_snr": True}),
        ("ddim-x0-linspace-clip", ddim, _VP | x0 | {"timestep_spacing": "linspace"}),
        ("ddim-threshold", ddim, _VP | {"thresholding": True, "sample_max_value": 2.0}),
        ("pndm", pndm, _VP | plms | {"steps_offset": 1}),
        ("pndm-v-trailing", pndm, _VP | plms | v | trailing | {"set_alpha_to_one": True}),
        ("pndm-linspace", pndm, _VP | plms | {"timestep_spacing": "linspace"}),
        ("dpm++1", multi, _VP | {"solver_order": 1}),
        ("dpm++2", multi, _VP),
        ("dpm++2-karras", multi, _VP | karras),
        ("dpm++2-heun-leading-min", multi, _VP | leading | sigma_min | {"solver_type": "heun"}),
        ("dpm++2-exponential-euler-final", multi, _VP | {"use_exponential_sigmas": True, "euler_at_final": True}),
        ("dpm++2-beta", multi, _VP | {"use_beta_sigmas": True}),
        ("dpm++2-lu", multi, _VP | {"use_lu_lambdas": True}),
        ("dpm++2-v-threshold", multi, _VP | v | trailing | {"thresholding": True}),
        ("dpm++2-flow", multi, flowing),
        ("dpm++3", multi, _VP | {"solver_order": 3}),
        ("dpm++3-x0-karras", multi, _VP | x0 | karras | {"solver_order": 3, "lower_order_final": False}),
        ("dpm2-old", multi, _VP | sigma_min | {"algorithm_type": "dpmsolver"}),
        ("dpm3-old-v", multi, _VP | sigma_min | v | {"algorithm_type": "dpmsolver", "solver_order": 3}),
        ("single1", single, _VP | {"solver_order": 1}),
        ("single2", single, _VP),
        ("single2-karras-min", single, _VP | karras | sigma_min),
        ("single3-v", single, _VP | v | {"solver_order": 3, "lower_order_final": True}),
        ("single3-old", single, _VP | sigma_min | {"solver_order": 3, "algorithm_type": "dpmsolver"}),
        ("deis2", deis, _VP),
        ("deis3-karras-v", deis, _VP | karras | v | {"solver_order": 3}),
        ("deis1-leading", deis, _VP | leading | {"solver_order": 1}),
        ("unipc2", unipc, _VP),
        ("unipc3-karras", unipc, _VP | karras | {"solver_order": 3}),
        # bh1 arrives at σ = 0 as ∞·0, so it needs another end
        ("unipc2-bh1-v-min", unipc, _VP | v | trailing | sigma_min | {"solver_type": "bh1"}),
        ("unipc2-noise-min", unipc, _VP | sigma_min | {"predict_x0": False}),
        ("unipc2-flow", unipc, flowing),
        ("unipc2-no-corrector", unipc, _VP | {"disable_corrector": [0, 1, 2]}),
        ("ipndm", "IPNDMScheduler", {}),
        ("lms", lms, _VP),
        ("lms-karras-v-leading", lms, _VP | karras | v | leading),
        ("lms-x0-trailing", lms, _VP | x0 | trailing),
        ("euler", euler, _VP),
        ("euler-leading", euler, _VP | leading),
        ("euler-karras-v-trailing", euler, _VP | karras | v | trailing),
        ("euler-x0-min", euler, _VP | x0 | sigma_min),
        ("euler-log-linear", euler, _VP | {"interpolation_type": "log_linear"}),
        ("euler-continuous", euler, _VP | v | {"timestep_type": "continuous"}),
        ("heun", heun, _VP),
        ("heun-karras-v", heun, _VP | karras | v),
        ("heun-x0-clip-trailing", heun, _VP | x0 | trailing | {"clip_sample": True}),
        ("flow-euler", flow, {}),
        ("flow-euler-shift", flow, {"shift": 3.0}),
        ("flow-euler-karras", flow, {"use_karras_sigmas": True, "shift_terminal": 0.1}),
        ("flow-heun", flow_heun, {"shift": 3.0}),
    ]


CONFIGURATIONS = {label: (name, settings) for label, name, settings in _all()}
"""Label → (class name, settings)."""

DISTINCT = (
    *(
        "ddim",
        "ddim-threshold",
        "pndm",
        "dpm++1",
        "dpm++2",
        "dpm++2-karras",
        "dpm++2-v-threshold",
        "dpm++3",
        "dpm2-old",
    ),
    *("single2", "single3-v", "deis2", "deis3-karras-v", "unipc2", "unipc3-karras", "unipc2-noise-min", "ipndm", "lms"),
    *("euler", "heun", "flow-euler", "flow-heun"),
)
"""Those that remember or step differently; the others differ in their schedule alone."""

every_configuration = pytest.mark.parametrize("label", CONFIGURATIONS)
