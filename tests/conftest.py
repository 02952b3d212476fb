"""Shape checking of redi.* while tests run, hypothesis profiles, and one thread budget for all tests."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

install_import_hook("redi", "beartype.beartype")

torch.set_num_threads(1)
settings.register_profile(
    "default", max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.register_profile("thorough", max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
