"""`redi build`: what it writes, that it goes on where it was, and what it refuses."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from redi.cli import models
from redi.knowledge_base import KnowledgeBase, Writer, verify
from redi.recipe import FineSolver, Item
from redi.types import Rows
from tests.cli.conftest import PROMPTS, Redi


def test_every_option_reaches_the_knowledge_base(redi: Redi, model: Path, prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kb"
    done = redi(
        *("build", model, prompts, folder, "--solver", "ddim", "--plan", "at:0,1,4/6,jump:2:4/6", "--noises", "2"),
        *("--seed", "7", "--diversity", "0.25", "--guidance", "2.5", "--height", "24", "--width", "16"),
        *("--negative-prompt", "blue", "--batch-size", "3", "--storage", "float32", "--limit", "3", "--json", "-"),
        *("--suffix", ", noto style", "--shard-rows", "4", "--preview", "5", "--dtype", "float32"),
        *("--accelerator", "cpu", "--devices", "1", "--num-nodes", "1"),
    )
    assert done.code == 0, done.err
    said, kb = done.json, KnowledgeBase.open(folder)
    mark = kb.fingerprint
    assert (said["rows"], said["rows_new"], len(kb)) == (6, 6, 6)
    assert sorted(set(kb.prompts)) == sorted(f"{p}, noto style" for p in PROMPTS[:3])
    assert [shard.rows for shard in kb.manifest.shards] == [4, 2]
    with Image.open(folder / "preview.png") as drawn:
        assert len(drawn.convert("RGB").getcolors(1 << 20) or ()) > 100
    assert (mark.scheduler, mark.steps, mark.guidance) == ("DDIMScheduler", 6, 2.5)
    assert (mark.height, mark.width, mark.sample_shape) == (24, 16, (4, 12, 8))
    assert (mark.negative_prompt, mark.model) == ("blue", str(model))
    assert (kb.bank.seed, kb.bank.size, kb.bank.diversity) == (7, 2, 0.25)
    assert (kb.config.storage, kb.config.plans) == ("float32", ("at:0,1,4/6", "jump:2:4/6"))
    assert verify(folder).ok
    assert "try it: redi generate" in done.err  # stdout is the machine's


def test_the_same_command_goes_on(redi: Redi, model: Path, kb: Path, prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kb"
    settings = ("--plan", "coarse:3/8,coarse:4/8", "--noises", "2", "--json", tmp_path / "x.json")
    assert redi("build", model, prompts, folder, "--limit", "2", *settings).code == 0
    before = {p: p.read_bytes() for p in (folder / "shards").iterdir()}
    done = redi("build", model, prompts, folder, *settings)
    assert done.code == 0, done.err
    said = json.loads((tmp_path / "x.json").read_text())
    assert (said["rows"], said["rows_new"]) == (14, 10)
    assert all(p.read_bytes() == content for p, content in before.items())
    again = redi("build", model, prompts, folder, *settings)
    assert again.code == 0
    assert json.loads((tmp_path / "x.json").read_text())["rows_new"] == 0
    assert sorted(KnowledgeBase.open(folder).prompts) == sorted(KnowledgeBase.open(kb).prompts)


def test_a_preview_draws_what_was_kept(redi: Redi, model: Path, prompts: Path, tmp_path: Path) -> None:
    for plan in ("jump:1:2/6", "coarse:2/3"):
        folder = tmp_path / plan.partition(":")[0]
        done = redi("build", model, prompts, folder, "--plan", plan, "--solver", "ddim", "--preview", "99")
        assert done.code == 0, done.err
        assert f"preview: {folder / 'preview.png'}" in done.out
        with Image.open(folder / "preview.png") as drawn:
            assert drawn.width > drawn.height
        assert not list(folder.glob("*.tmp"))
    assert redi("build", model, prompts, tmp_path / "none", "--plan", "coarse:2/3").code == 0
    assert not (tmp_path / "none" / "preview.png").exists()
    assert redi("build", model, prompts, tmp_path / "none", "--preview", "-1").code == 2


@pytest.mark.parametrize(
    ("option", "field"),
    [(("--guidance", "2"), "guidance"), (("--solver", "ddim"), "scheduler"), (("--seed", "1"), "seed")],
)
def test_other_settings_are_refused_by_name(
    redi: Redi, model: Path, prompts: Path, kb: Path, tmp_path: Path, option: tuple[str, str], field: str
) -> None:
    folder = tmp_path / "kb"
    shutil.copytree(kb, folder)
    done = redi("build", model, prompts, folder, "--plan", "coarse:3/8,coarse:4/8", "--noises", "2", *option)
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert field in done.err
    assert verify(folder).ok


def test_prompts_from_standard_input(redi: Redi, model: Path, tmp_path: Path) -> None:
    done = redi("build", model, "-", tmp_path / "kb", "--plan", "coarse:2/3", stdin=b"cat\n\ndog\ncat\n")
    assert done.code == 0, done.err
    assert "1 prompts in standard input occur more than once" in done.err
    assert KnowledgeBase.open(tmp_path / "kb").prompts == ("cat", "dog")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--plan", "coarse:2/8,coarse:2/9"), "share their fine steps"),
        (("--solver", "magic"), "there is no solver 'magic'"),
        (("--solver", "flow-euler"), "flow matching"),
        (("--solver", "heun", "--plan", "jump:1:99/8"), "1 ≤ key < value"),
        (("--diversity", "2"), "diversity"),
        (("--shard-rows", "0"), "--shard-rows must be at least 1"),
        (("--device", "cuda:99"), "--device cuda:99 cannot be used"),
    ],
)
def test_what_cannot_be_built(
    redi: Redi, model: Path, prompts: Path, tmp_path: Path, options: tuple[str, ...], says: str
) -> None:
    done = redi("build", model, prompts, tmp_path / "kb", *options)
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert says in done.err
    assert not (tmp_path / "kb").exists()


def test_models_that_are_none(redi: Redi, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    done = redi("build", tmp_path / "empty", prompts, tmp_path / "kb")
    assert (done.code, "model_index.json" in done.err) == (2, True)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{")
    done = redi("build", tmp_path / "broken", prompts, tmp_path / "kb")
    assert (done.code, "cannot be loaded" in done.err, len(done.err.splitlines())) == (2, True, 1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = redi("build", "nobody/nothing-of-this-name", prompts, tmp_path / "kb")
    assert (done.code, "Hub" in done.err, len(done.err.splitlines())) == (2, True, 1)
    assert not (tmp_path / "kb").exists()


def test_a_termination_ends_well_and_the_same_command_resumes(
    redi: Redi, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("\n".join(f"red apple {i}" for i in range(100_000)))
    arguments = ["build", str(model), "p.txt", "kb", "--plan", "coarse:2/3", "--batch-size", "2", "--shard-rows", "4"]

    def end() -> None:
        while not list(Path("kb").glob("shards/*.prompts.json")):
            time.sleep(0.01)
        signal.raise_signal(signal.SIGTERM)

    hand = threading.Thread(target=end)
    hand.start()
    done = redi(*arguments, "--json", "out.json")
    hand.join()
    assert done.code == 0, done.err
    assert "stopped by SIGTERM" in done.err
    said, kb = json.loads(Path("out.json").read_text()), KnowledgeBase.open("kb")
    assert (said["stopped"], said["rows"], said["rows_asked"]) == ("SIGTERM", len(kb), 100_000)
    assert 0 < len(kb) < 100_000
    assert verify("kb").ok
    assert redi(*arguments, "--limit", str(len(kb) + 3), "--json", "out.json").code == 0
    assert json.loads(Path("out.json").read_text())["rows_new"] == 3


def test_where_there_is_no_terminal_progress_is_a_line_a_minute(
    redi: Redi, model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minutes = (i * 25.0 for i in range(10_000))  # every look at the clock is 25 seconds later
    monkeypatch.setattr("redi.cli.console.monotonic", lambda: next(minutes))
    done = redi("build", model, prompts, tmp_path / "kb", "--plan", "coarse:2/3", "--batch-size", "1")
    assert done.code == 0
    lines = done.err.splitlines()
    assert 1 < len(lines) < 7
    assert all(re.fullmatch(r"building .*kb: \d of 7, [\d.e-]+ row/s, [\d:]+ left", line) for line in lines), lines


# python raises KeyboardInterrupt as soon as a call returns, thus also between `open` and the block that would close it
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_interrupted_in_the_middle_and_taken_up_again(
    redi: Redi, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = [f"red apple {i}" for i in range(100_000)]
    Path("p.txt").write_text("\n".join(texts))
    arguments = ["build", str(model), "p.txt", "kb", "--plan", "coarse:2/3", "--batch-size", "2", "--shard-rows", "16"]
    arguments += ["--json", "out.json"]

    def press() -> None:
        while not list(Path("kb").glob("shards/*.safetensors")):
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)  # python hands it to the main thread

    hand = threading.Thread(target=press)
    hand.start()
    done = redi(*arguments)
    hand.join()
    assert done.code == 130
    assert done.err.splitlines()[-1] == "redi build: interrupted; finished rows are kept, the same command resumes"
    assert not Path("out.json").exists()
    assert verify("kb").ok
    rows = len(KnowledgeBase.open("kb"))
    assert 0 < rows < len(texts)
    Path("p.txt").write_text("\n".join(texts[: rows + 4]))
    assert redi(*arguments).code == 0
    said = json.loads(Path("out.json").read_text())
    assert (said["rows"], said["rows_new"]) == (rows + 4, 4)


def test_rows_that_are_not_finite_are_named_and_left_out(
    redi: Redi, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch of a model that breaks down for one prompt and one noise."""
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("".join(f"apple {i}\n" for i in range(6)))
    solve = FineSolver._solve

    def broken(self: FineSolver, items: Sequence[Item]) -> Rows:
        rows = solve(self, items)
        for i, item in enumerate(items):
            if item == ("apple 3", 1):
                rows.denoised[0][i, 0, 0, 0] = torch.nan
        return rows

    build = ("build", model, "p.txt", "kb", "--plan", "coarse:2/3", "--noises", "2", "--json", "out.json")
    with monkeypatch.context() as patched:
        patched.setattr(FineSolver, "_solve", broken)
        done = redi(*build)
    assert done.code == 0
    assert "note: 1 rows were not written:\nnote:   'apple 3' from noise 1: denoised.00000 is not finite\n" in done.err
    said = json.loads(Path("out.json").read_text())
    assert (said["rows"], said["refused"]) == (11, 1)
    assert [(r["prompt"], r["noise_id"]) for r in said["refusals"]] == [("apple 3", 1)]
    assert verify("kb").ok
    assert redi(*build).code == 0  # a model that is well again
    assert json.loads(Path("out.json").read_text())["rows_new"] == 1


def test_a_build_that_is_logged_and_profiled(redi: Redi, model: Path, prompts: Path, tmp_path: Path) -> None:
    build = ("build", model, prompts, tmp_path / "kb", "--plan", "coarse:2/3", "--batch-size", "2")
    watched = ("--logger", "lightning.pytorch.loggers.CSVLogger", "--profile", "--log-dir", tmp_path / "logs")
    done = redi(*build, *watched, "--accelerator", "cpu")
    assert done.code == 0, done.err
    assert len(KnowledgeBase.open(tmp_path / "kb")) == 7
    (file,) = (tmp_path / "logs").rglob("metrics.csv")
    with file.open() as lines:
        logged = list(csv.DictReader(lines))
    assert [row["rows"] for row in logged if row["rows"]] == ["0", "2", "4", "6", "7", "7"]
    assert [row["predict/samples"] for row in logged if row["predict/samples"]] == ["2", "4", "6", "7"]
    report = (tmp_path / "logs" / "predict-profile.txt").read_text()
    assert "predict_step" in report


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--logger", "no.such"), "there is no logger no.such"),
        (("--logger", "os.path"), "there is no logger 'os.path'; there is: csv, tensorboard"),
        (("--logger", "csv", "--device", "cpu"), "say --accelerator"),
        (("--profile", "closely"), "invalid choice"),
    ],
)
def test_watching_that_cannot_be(
    redi: Redi, model: Path, prompts: Path, tmp_path: Path, options: tuple[str, ...], says: str
) -> None:
    done = redi("build", model, prompts, tmp_path / "kb", *options)
    assert (done.code, says in done.err, (tmp_path / "kb").exists()) == (2, True, False)


def test_a_termination_may_come_twice_and_at_any_time(
    redi: Redi, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("".join(f"apple {i}\n" for i in range(40)))
    build = ("build", model, "p.txt", "kb", "--plan", "coarse:2/3", "--batch-size", "2", "--json", "out.json")
    load = models.load

    def early(*given: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)  # while the model is loaded
        return load(*given)

    with monkeypatch.context() as patched:
        patched.setattr(models, "load", early)
        assert redi(*build).code == 0
    said = json.loads(Path("out.json").read_text())
    assert (said["rows"], said["stopped"]) == (0, "SIGTERM")
    flush = Writer.flush

    def late(self: Writer) -> None:
        signal.raise_signal(signal.SIGTERM)  # while what was done is written
        flush(self)

    solve = FineSolver._solve

    def middle(self: FineSolver, items: Sequence[Item]) -> Rows:
        if items[0][0] == "apple 6":
            signal.raise_signal(signal.SIGTERM)
        return solve(self, items)

    with monkeypatch.context() as patched:
        patched.setattr(Writer, "flush", late)
        patched.setattr(FineSolver, "_solve", middle)
        assert redi(*build).code == 0
    assert json.loads(Path("out.json").read_text())["rows"] == 8
    assert redi(*build).code == 0
    assert json.loads(Path("out.json").read_text())["rows_new"] == 32
    assert verify("kb").ok


def test_prompts_of_every_kind_become_rows_of_their_own(
    redi: Redi, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    long = "red apple " * 1000
    kinds = ["two\nlines", "a tab\there", '“quoted” "twice"', "🦊 über", long, long + "more", "NULL", "-", "{}"]
    Path("p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in [*kinds, kinds[0], "", "  "]))
    folder = "a folder – été"
    done = redi("build", model, "p.jsonl", folder, "--plan", "coarse:2/3", "--json", "out.json")
    assert done.code == 0, done.err
    kb = KnowledgeBase.open(folder)
    assert [p.strip() for p in kb.prompts] == [p.strip() for p in kinds]
    assert verify(folder).ok
    assert redi("build", model, "p.jsonl", folder, "--plan", "coarse:2/3", "--json", "out.json").code == 0
    assert json.loads(Path("out.json").read_text())["rows_new"] == 0
