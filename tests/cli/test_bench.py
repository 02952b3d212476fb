"""`redi bench` hands over to a script of the checkout, or says where that is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from redi.cli import bench
from tests.cli.conftest import Redi


def test_it_hands_over_what_follows_the_name(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "redi", "bench", "retrievers", *arguments]
        environment = os.environ | {"PYTHONPATH": str(Path(bench.__file__).parents[2])}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    helped, wrong = run("--help"), run("--rows", "many")
    assert helped.returncode == 0
    assert "usage: python -m benchmarks.retrievers" in helped.stdout
    assert "--quick" in helped.stdout
    assert wrong.returncode == 2
    assert "--rows" in wrong.stderr


def test_outside_a_checkout_it_says_where_the_script_is(
    redi: Redi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site-packages" / "redi" / "cli" / "bench.py"))
    done = redi("bench", "retrievers")
    assert done.code == 2
    assert "clone the repository and run python -m benchmarks.retrievers" in done.err


def test_its_file_is_what_it_goes_on_from(redi: Redi) -> None:
    done = redi("bench", "--json", "-", "retrievers")
    assert done.code == 2
    assert "name one" in done.err
