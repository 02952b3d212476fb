"""The parts in a Trainer of one's own: what it may be told, what it must not, and what loggers hear."""

from __future__ import annotations

import csv
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger

from redi.builder import Progress
from redi.errors import InvalidInputError, KnowledgeBaseError
from redi.knowledge_base import KnowledgeBase, Writer
from redi.lightning import KnowledgeBaseBuilder, PromptData, ShardWriter, build
from redi.plan import Plan
from redi.recipe import Recipe
from tests.tiny import tiny_pipeline

PROMPTS = [f"prompt {i}" for i in range(5)]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What Lightning says of itself to those who make their own Trainer."""
    with warnings.catch_warnings():
        for said in (".*does not have many workers.*", ".*Total length of.*", ".*LeafSpec.*", ".*litlogger.*"):
            warnings.filterwarnings("ignore", said)
        yield


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def recipe(pipe: Any) -> Recipe:
    return Recipe.of(pipe, plans=[Plan.coarse(2, 3)], guidance=2.0, noises=2)


def keys(folder: Path) -> Counter[tuple[str, int]]:
    kb = KnowledgeBase.open(folder)
    return Counter(zip(kb.prompts, kb.noise_ids.tolist(), strict=True))


def own(*callbacks: Callback, **more: Any) -> Trainer:
    given = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False} | more
    return Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), enable_model_summary=False, **given)


def test_a_trainer_of_ones_own(pipe: Any, recipe: Recipe, tmp_path: Path) -> None:
    seen: list[Progress] = []
    writer = ShardWriter(tmp_path / "kb", shard_rows=4, progress=seen.append)
    logger = CSVLogger(tmp_path / "logs", flush_logs_every_n_steps=1)
    monitor = ThroughputMonitor(batch_size_fn=len, window_size=2)
    runs = own(writer, monitor, logger=logger, log_every_n_steps=1)  # use_distributed_sampler as Lightning chooses
    runs.predict(KnowledgeBaseBuilder(pipe, recipe), datamodule=PromptData(PROMPTS, 3), return_predictions=False)
    assert keys(tmp_path / "kb") == Counter((p, n) for p in PROMPTS for n in range(2))
    assert (writer.complete, writer.refused) == (True, ())
    assert [p.done for p in seen] == [0, 3, 6, 9, 10, 10]
    with open(Path(logger.log_dir) / "metrics.csv", encoding="utf-8") as file:
        logged = list(csv.DictReader(file))
    ours = [row for row in logged if row["rows"]]
    assert [int(row["rows"]) for row in ours] == [0, 3, 6, 9, 10, 10]
    assert all(float(row["rows_per_second"]) > 0 for row in ours[1:])
    theirs = [float(rate) for row in logged if (rate := row["predict/device/samples_per_sec"])]
    assert theirs
    assert min(theirs) > 0
    Writer.open(tmp_path / "kb", recipe.config).close()  # nobody holds it


def test_a_part_of_the_work_is_no_error_where_it_was_asked_for(pipe: Any, recipe: Recipe, tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "kb")
    runs = own(writer, limit_predict_batches=2)
    runs.predict(KnowledgeBaseBuilder(pipe, recipe), datamodule=PromptData(PROMPTS, 2), return_predictions=False)
    assert sum(keys(tmp_path / "kb").values()) == 4
    assert not writer.complete
    kb = build(pipe, recipe, PromptData(PROMPTS, 4), tmp_path / "kb", accelerator="cpu")
    assert len(kb) == 10


def test_prompts_of_a_file_with_a_suffix(pipe: Any, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text("id\twhat\n1\tcat\n2\tdog\n3\tcat\n")
    notes: list[str] = []
    data = PromptData(tmp_path / "p.tsv", column="what", suffix=", noto style", note=notes.append)
    build(pipe, recipe, data, tmp_path / "kb", accelerator="cpu")
    assert set(keys(tmp_path / "kb")) == {(f"{p}, noto style", n) for p in ("cat", "dog") for n in range(2)}
    assert len(notes) == 1
    with pytest.raises(InvalidInputError, match="there is no file"):
        build(pipe, recipe, PromptData(tmp_path / "none.txt"), tmp_path / "kb", accelerator="cpu")
    Writer.open(tmp_path / "kb", recipe.config).close()  # an error lets go of the folder


def test_what_is_done_before_an_error_is_kept(pipe: Any, recipe: Recipe, tmp_path: Path) -> None:
    class Breaks(Callback):
        def on_predict_batch_start(self, trainer: Any, module: Any, batch: Any, index: int, loader: int = 0) -> None:
            if index == 2:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build(pipe, recipe, PromptData(PROMPTS, 3), tmp_path / "kb", accelerator="cpu", callbacks=[Breaks()])
    assert sum(keys(tmp_path / "kb").values()) == 6
    Writer.open(tmp_path / "kb", recipe.config).close()


def test_an_interrupt_stays_one(pipe: Any, recipe: Recipe, tmp_path: Path) -> None:
    class Presses(Callback):
        def on_predict_batch_start(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(pipe, recipe, PromptData(PROMPTS), tmp_path / "kb", accelerator="cpu", callbacks=[Presses()])
    Writer.open(tmp_path / "kb", recipe.config).close()


def test_what_a_trainer_must_not_be(pipe: Any, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(LightningModule):
        def predict_step(self, batch: Any) -> Any:
            return batch

    builder, data = KnowledgeBaseBuilder(pipe, recipe), PromptData(PROMPTS)
    with pytest.raises(InvalidInputError, match="ShardWriter"):
        own().predict(builder, datamodule=data, return_predictions=False)
    with pytest.raises(InvalidInputError, match="leave the Trainer's precision alone"):
        own(ShardWriter(tmp_path / "a"), precision="bf16-mixed").predict(
            builder, datamodule=data, return_predictions=False
        )
    with pytest.raises(InvalidInputError, match="expected a KnowledgeBaseBuilder"):
        own(ShardWriter(tmp_path / "b")).predict(Other(), datamodule=data, return_predictions=False)
    with pytest.raises(InvalidInputError, match="batch_size"):
        PromptData(PROMPTS, 0)
    with Writer.open(tmp_path / "c", recipe.config), pytest.raises(KnowledgeBaseError, match="is being written"):
        build(pipe, recipe, data, tmp_path / "c", accelerator="cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")  # a process group that this Trainer does not see
    with pytest.raises(InvalidInputError, match="2 processes were launched, and this Trainer knows of 1"):
        own(ShardWriter(tmp_path / "d")).predict(builder, datamodule=data, return_predictions=False)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
