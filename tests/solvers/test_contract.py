"""The public contract suite, over every supported scheduler and its settings."""

from __future__ import annotations

import pytest

from redi.solvers import DiffusersSolver
from redi.testing.solver import SolverContract
from tests.solvers.configurations import CONFIGURATIONS, DISTINCT


@pytest.mark.filterwarnings("ignore:`algorithm_type:FutureWarning")
class TestDiffusersSolver(SolverContract):
    @pytest.fixture(params=DISTINCT)
    def solver(self, request: pytest.FixtureRequest) -> DiffusersSolver:
        return DiffusersSolver.from_config(*CONFIGURATIONS[request.param])
