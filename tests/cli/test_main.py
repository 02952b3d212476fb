"""Help without weight, exit codes, and one clear line for whatever is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from redi.cli import main
from redi.cli.console import size, to_json, write_json
from tests.cli.conftest import Redi

COMMANDS = ("demo", "build", "generate", "eval", "index", "merge", "bench", "info", "verify")
ROOT = Path(__file__).parents[2]


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "redi", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_parser_imports_nothing_heavy() -> None:
    code = (
        "import sys; from redi.cli import parser; parser(); "
        "print([m for m in ('torch', 'numpy', 'diffusers', 'transformers', 'tqdm', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: redi {command}" in shown
    assert "--json FILE" in shown


def test_no_command_shows_help_and_version_is_ours(redi: Redi) -> None:
    import redi as package

    assert all(command in redi().out for command in COMMANDS)
    assert redi("--version").out.strip() == package.__version__


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("fly",), "invalid choice: 'fly'"),
        (("build", "emoji"), "prompts, kb"),
        (("build", "emoji", "a.txt", "kb", "--noises", "many"), "--noises"),
        (("build", "emoji", "a.txt", "kb", "--storage", "int8"), "--storage"),
        (("build", "emoji", "a.txt", "kb", "--noises", "0"), "--noises must be at least 1"),
        (("build", "emoji", "missing.txt", "kb"), "no file missing.txt"),
        (("build", "emoji", "-", "kb", "--plan", "coarse:9"), "cannot read plan 'coarse:9'"),
        (("build", "./nowhere", "-", "kb"), "no folder ./nowhere"),
        (("build", "emoji", "-", "kb", "--json", "/no/such/folder/x.json"), "no folder /no/such/folder"),
        (("build", "emoji", "-", "kb", "--device", "abacus"), "--device abacus"),
        (("build", "emoji", "-", "kb", "--threads", "0"), "--threads must be at least 1"),
        (("info", "nowhere"), "nowhere is not a folder"),
        (("verify", "nowhere"), "nowhere is not a"),
        (("generate", "nowhere", "cat", "--out", "x"), "nowhere is not a folder"),
        (("generate", "nowhere", "cat"), "--out"),
        (("generate", "nowhere", " ", "--out", "x"), "empty"),
        (("generate", "nowhere", "cat", "--out", "x", "--combiner", "mean"), "no combiner 'mean'"),
        (("generate", "nowhere", "cat", "--out", "x", "--neighbors", "0"), "--neighbors must be at least 1"),
        (("demo", "--rows", "0"), "--rows must be at least 1"),
        (("demo", "--prompts", "17"), "multiple of --batch-size"),
        (("demo", "--steps", "9", "--fine", "8"), "coarse plan"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    redi: Redi, arguments: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = redi(*arguments, stdin=b"cat\n")
    assert done.code == 2
    assert done.out == ""
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith("redi")
    assert says in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_process_ends_with_2_and_no_traceback() -> None:
    done = process("info", "/no/such/kb")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "redi", "build", "emoji", "-", str(tmp_path / "kb")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdin is not None
        assert running.stderr is not None
        # more than a pipe holds: when this returns, the command is reading its prompts, and waits for more
        running.stdin.write("a red apple\n" * 100_000)
        running.stdin.flush()
        while running.poll() is None:  # a signal that arrives just before a read is seen after it
            running.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert running.returncode == 130
        assert (
            running.stderr.read().strip() == "redi build: interrupted; finished rows are kept, the same command resumes"
        )


def test_json_is_replaced_whole_and_finite(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": float("inf"), "b": (1, 2)})
    assert json.loads(path.read_text()) == {"a": None, "b": [1, 2]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": None, "b": [1, 2]}
    assert os.listdir(tmp_path) == ["x.json"]
    assert to_json("ä") == '"ä"\n'


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (10**13, "10 TB")])
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text
