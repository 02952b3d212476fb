"""Real launchers: Lightning's own, torchrun, fabric run; and launches that do not fit together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from redi.knowledge_base import KnowledgeBase
from tests.cli.conftest import Redi, redi  # noqa: F401
from tests.tiny import saved

SCRIPTS = Path(sys.executable).parent
REDI = (sys.executable, str(SCRIPTS / "redi"))
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
FABRIC = (str(SCRIPTS / "fabric"), "run", "--accelerator", "cpu", "--devices", "2", "--main-port")
PATIENCE = 280


@pytest.fixture(scope="module")
def model() -> Path:
    return saved()


@pytest.fixture
def environment() -> Mapping[str, str]:
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "LT_", "TORCHELASTIC"))}
    return mine | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.fixture
def command(model: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "p.txt").write_text("".join(f"prompt {i}\n" for i in range(400)), encoding="utf-8")
    options = [
        "--plan",
        "coarse:2/3",
        "--guidance",
        "2",
        "--batch-size",
        "2",
        "--shard-rows",
        "4",
        "--json",
        "out.json",
    ]
    return ["build", str(model), "p.txt", "kb", *options]


def free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def small(command: list[str]) -> list[str]:
    return [*command, "--limit", "9"]


def require(folder: Path, rows: int) -> None:
    kb = KnowledgeBase.open(folder / "kb")
    assert sorted(kb.prompts) == sorted(f"prompt {i}" for i in range(rows))
    assert kb.verify().ok
    assert not kb.verify().ignored


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param((*REDI, "own"), id="lightning"),
        pytest.param((*TORCHRUN, str(SCRIPTS / "redi")), id="torchrun"),
        pytest.param((*TORCHRUN, "-m", "redi"), id="torchrun -m", marks=pytest.mark.slow),
        pytest.param((*FABRIC, "port", str(SCRIPTS / "redi")), id="fabric run", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_by_every_launcher(
    launcher: tuple[str, ...], command: list[str], tmp_path: Path, environment: Mapping[str, str]
) -> None:
    own = launcher[-1] == "own"
    started = [free_port() if word == "port" else word for word in launcher if word != "own"]
    asked = ["--devices", "2", "--accelerator", "cpu"] if own else []  # the others say how many they started
    done = subprocess.run(
        [*started, *small(command), *asked],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    require(tmp_path, 9)
    assert done.stdout.count("9 rows (9 new)") == 1  # one rank speaks
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == 9
    names = [s.name for s in KnowledgeBase.open(tmp_path / "kb").manifest.shards]
    assert {int(name) % 2 for name in names} == {0, 1}  # both wrote


@pytest.mark.slow
def test_tasks_that_slurm_started(command: list[str], tmp_path: Path, environment: Mapping[str, str]) -> None:
    """Not SLURM itself, but what `srun --ntasks-per-node=2` tells its tasks."""
    said = {"NTASKS": 2, "NTASKS_PER_NODE": 2, "STEP_NUM_TASKS": 2, "NODEID": 0, "JOB_ID": 4711, "JOB_NUM_NODES": 1}
    env = {**environment, **{f"SLURM_{k}": str(v) for k, v in said.items()}}
    env |= {"SLURM_NODELIST": "localhost", "SLURM_JOB_NAME": "build"}
    tasks = [
        subprocess.Popen(
            [*REDI, *small(command), "--devices", "2", "--accelerator", "cpu"],
            cwd=tmp_path,
            env=env | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]
    assert [task.wait(PATIENCE) for task in tasks] == [0, 0]
    require(tmp_path, 9)


_NOTEBOOK = """
from redi import Plan, lightning
from redi.recipe import Recipe
from tests.tiny import tiny_pipeline

pipe = tiny_pipeline()
recipe = Recipe.of(pipe, plans=[Plan.coarse(2, 3)], guidance=2.0)
for count in (6, 9):  # in one process, one after the other
    data = lightning.PromptData([f"prompt {i}" for i in range(count)], 2)
    kb = lightning.build(
        pipe, recipe, data, "kb", devices=2, accelerator="cpu", strategy="ddp_notebook", shard_rows=2
    )
    assert len(kb) == count
"""


def test_from_a_notebook_ranks_are_forked(tmp_path: Path, environment: Mapping[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _NOTEBOOK],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    require(tmp_path, 9)


@pytest.fixture
def running(command: list[str], tmp_path: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A build by Lightning's own launcher, under way."""
    with subprocess.Popen(
        [*REDI, *command, "--devices", "2", "--accelerator", "cpu"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        deadline = time.monotonic() + PATIENCE
        while len(list(tmp_path.glob("kb/shards/*.prompts.json"))) < 4:
            assert process.poll() is None, process.stdout and process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process
        process.kill()


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["first", "second"])
def test_a_lost_rank_makes_the_run_fail_and_the_same_command_resumes(
    running: subprocess.Popen[str], victim: str, command: list[str], tmp_path: Path, environment: Mapping[str, str]
) -> None:
    (other,) = children(running.pid)
    os.kill(running.pid if victim == "first" else other, signal.SIGKILL)
    assert running.wait(PATIENCE) != 0
    deadline = time.monotonic() + 60
    while Path(f"/proc/{other}/cwd").exists() and time.monotonic() < deadline:
        time.sleep(0.1)  # left alone, it notices and ends
    assert not Path(f"/proc/{other}/cwd").exists()
    rows = len(KnowledgeBase.open(tmp_path / "kb"))
    limit = str(rows + 12)
    again = [*REDI, *command, "--limit", limit]
    done = subprocess.run(again, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert KnowledgeBase.open(tmp_path / "kb").verify().ok
    assert {f"prompt {i}" for i in range(int(limit))} <= set(KnowledgeBase.open(tmp_path / "kb").prompts)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_to_the_first_process_ends_all_of_them_well(
    running: subprocess.Popen[str], number: signal.Signals, code: int, tmp_path: Path
) -> None:
    running.send_signal(number)
    out, _ = running.communicate(timeout=PATIENCE)
    assert running.returncode == code, out
    kb = KnowledgeBase.open(tmp_path / "kb")
    assert 0 < len(kb) < 400
    assert (kb.verify().ok, kb.verify().ignored) == (True, ())
    assert ("stopped by SIGTERM" if code == 0 else "interrupted; finished rows are kept") in out


@pytest.mark.parametrize(
    ("said", "options", "complaint"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, (), "one of 2 launched processes"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "2"}, ("--devices", "1"), None),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, ("--devices", "2", "--num-nodes", "1"), "make 2"),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, (), "one of 8 launched processes"),
        ({}, ("--devices", "2", "--device", "cpu"), "is one device"),
        ({}, ("--devices", "0"), "--devices must be at least 1"),
    ],
)
def test_launches_that_do_not_fit_are_refused_before_any_work(
    redi: Redi,  # noqa: F811
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: Mapping[str, str],
    options: tuple[str, ...],
    complaint: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    if complaint is None:  # one device, but two nodes: the processes fit
        options, complaint = (*options, "--num-nodes", "1"), "make 1"
    done = redi(*small(command), *options)
    assert done.code == 2
    assert complaint in done.err
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "kb").exists()


def test_ranks_do_not_share_standard_input(redi: Redi, model: Path, tmp_path: Path) -> None:  # noqa: F811
    done = redi("build", model, "-", tmp_path / "kb", "--devices", "2", stdin=b"a prompt\n")
    assert (done.code, "standard input" in done.err) == (2, True)


def test_a_build_on_one_device_imports_no_lightning(
    command: list[str], tmp_path: Path, environment: Mapping[str, str]
) -> None:
    code = (
        "import sys; from redi.cli import main; code = main(sys.argv[1:]); "
        "print([m for m in sys.modules if m.partition('.')[0] in ('lightning', 'torchmetrics')]); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--limit", "2"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
