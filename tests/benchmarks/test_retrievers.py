"""The benchmark of retrievers runs whole in its quick form, judges by itself, and survives what it measures."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.retrievers.__main__ import apart
from benchmarks.retrievers.fit import fit
from benchmarks.retrievers.grid import build_of
from benchmarks.retrievers.keys import Data
from benchmarks.retrievers.truth import nearest, score
from benchmarks.retrievers.world import HELD_OUT, World
from redi.testing.retriever import brute_force

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(600)  # half a minute on idle cores


def quick(folder: Path) -> Any:
    file = folder / "quick.json"
    command = [sys.executable, "-m", "benchmarks.retrievers", "--quick", "--json", str(file)]
    subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, timeout=500
    )
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("retrievers")


@pytest.fixture(scope="module")
def document(folder: Path) -> Any:
    return quick(folder)


def test_every_backend_is_measured_or_says_what_it_lacks(document: Any) -> None:
    tried = {row["retriever"].partition(":")[0] for row in document["rows"]}
    assert tried == {"exact", "faiss", "hnsw", "scann"}
    assert {row["data"] for row in document["rows"]} == {"denoised@0", "sample@2", "4x64x64"}
    for row in document["rows"]:
        if row["status"] != "ok":
            assert "is not installed" in row["status"] or "pip install" in row["status"], row
            continue
        assert 0 < row["batch 1"]["p50_ms"] <= row["batch 1"]["p95_ms"] <= row["batch 1"]["p99_ms"]
        assert row["index_bytes"] > 0
        assert row["peak_rss_bytes"] > row["resident_bytes"]
        assert row["gather"]["p50_ms"] > 0
        assert {"batch 1", "batch 8"} <= row.keys()


def test_exact_search_finds_everything(document: Any) -> None:
    exact = [row for row in document["rows"] if row["retriever"] == "exact"]
    assert len(exact) == 3
    for row in exact:
        assert row["recall"]["recall@2"] == row["recall"]["recall@16"] == row["recall"]["distance ratio@16"] == 1
    wrong = document["ratios"]["1000"]["clustered"]["wrong_nearest_of"]
    assert wrong["Exact"] == {"8": 0, "32": 0, "64": 0}


def test_real_keys_are_judged_by_the_picture_too(document: Any) -> None:
    row = next(r for r in document["rows"] if r["data"] == "denoised@0" and r["retriever"] == "exact")
    assert row["leap"]["latent_error"] == row["leap"]["exact"] > 0
    assert row["leap"]["no_neighbours"] != row["leap"]["exact"]
    assert all("leap" not in r for r in document["rows"] if r["synthetic"])


@pytest.mark.slow
def test_it_leaves_a_table_and_plots_and_goes_on_from_what_is_there(document: Any, folder: Path) -> None:
    with (folder / "quick.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(document["rows"])
    assert {"quick-pareto.png", "quick-crossover.png"} <= {p.name for p in folder.glob("*.png")}
    kept = [r for r in document["rows"] if r["status"] == "ok"]
    (folder / "quick.json").write_text(json.dumps(document | {"rows": kept[:-1]}))
    again = quick(folder)["rows"]
    assert [r for r in again if r in kept] == kept[:-1]
    assert len(again) == len(document["rows"])


def given(**more: Any) -> Namespace:
    return Namespace(**{"threads": 1, "timeout": 60.0} | more)


@pytest.fixture
def data(tmp_path: Path) -> Data:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "k.npy", rng.normal(size=(30, 8)).astype(np.float16))
    np.save(tmp_path / "q.npy", rng.normal(size=(4, 8)).astype(np.float32))
    return Data("small", False, tmp_path / "k.npy", tmp_path / "q.npy", 30, 8)


JOB = {"rows": 30, "k": 3, "batches": [1], "seconds": 0.01, "index": None}


def test_a_crash_is_a_status(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nkill -SEGV $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert apart("measure", JOB | {"retriever": "exact"}, data, given())[0] == "killed by signal 11"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    assert "given up" in apart("measure", JOB | {"retriever": "exact"}, data, given(timeout=0.2))[0]


def test_an_error_is_a_status(data: Data) -> None:
    assert "there is no retriever 'exakt'" in apart("measure", JOB | {"retriever": "exakt"}, data, given())[0]


@pytest.mark.parametrize(
    ("setting", "build"),
    [
        ("exact", "exact"),
        ("hnsw:rerank=32", "hnsw"),
        ("hnsw:M=16,ef_search=32,rerank=32", "hnsw:M=16"),
        ("faiss:IVF8,SQfp16:nprobe=2,rerank=32", "faiss:IVF8,SQfp16"),
        ("scann:leaves=8,rerank=3,reorder=4", "scann:leaves=8,reorder=4"),
    ],
)
def test_one_index_serves_every_way_of_searching_it(setting: str, build: str) -> None:
    assert build_of(setting) == build


def test_a_shared_index_answers_like_its_own(data: Data, tmp_path: Path) -> None:
    pytest.importorskip("hnswlib")
    job = JOB | {"index": str(tmp_path / "index-hnsw")}
    first = apart("measure", job | {"retriever": "hnsw:rerank=8"}, data, given())
    again = apart("measure", job | {"retriever": "hnsw:ef_search=30,rerank=30"}, data, given())
    assert first[0] == again[0] == "ok"
    assert first[1]["build_seconds"] == again[1]["build_seconds"]
    np.testing.assert_array_equal(first[2]["1"], again[2]["1"])


@pytest.fixture(scope="module")
def world() -> World:
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(4, 1, 1, 1))[rng.integers(4, size=200)]
    latents = centres + rng.normal(size=(200, 4, 8, 8)) * np.linspace(2, 0.1, 64).reshape(8, 8)
    return fit(latents, (4, 16, 16), clusters=4).of(300)


def test_a_row_of_the_world_is_the_same_however_it_is_asked_for(world: World) -> None:
    whole = np.concatenate(list(world.chunks()))
    assert whole.shape == world.shape == (300, 1024)
    np.testing.assert_allclose(world[np.array([7, 3, 299])], whole[[7, 3, 299]], rtol=2e-3, atol=1e-5)
    # a product of fewer rows may round otherwise, by a unit of float16
    np.testing.assert_allclose(np.concatenate(list(world.of(10).chunks())), whole[:10], rtol=2e-3, atol=1e-5)
    queries = world.queries(5)
    assert np.square(queries[:, None] - whole.astype(np.float32)).sum(-1).min() > 1
    np.testing.assert_array_equal(queries, world[np.arange(HELD_OUT, HELD_OUT + 5)].astype(np.float32))


def test_the_world_has_the_variance_it_was_fitted_to() -> None:
    rng = np.random.default_rng(2)
    latents = 3 + rng.choice([-1.0, 1.0], size=(400, 1, 1, 1)) + 0.5 * rng.normal(size=(400, 4, 8, 8))
    made = np.concatenate(list(fit(latents, (4, 32, 32)).of(400).chunks())).astype(np.float64)
    np.testing.assert_allclose(made.var(axis=0).mean(), latents.var(axis=0).mean(), rtol=0.1)


def test_a_world_is_saved_whole(world: World, tmp_path: Path) -> None:
    world.save(tmp_path / "w.npz")
    np.testing.assert_array_equal(World.load(tmp_path / "w.npz")[np.arange(5)], world[np.arange(5)])


def test_the_truth_is_what_brute_force_says() -> None:
    rng = np.random.default_rng(3)
    keys = (1000 + rng.normal(size=(500, 40))).astype(np.float32)
    queries = (1000 + rng.normal(size=(6, 40))).astype(np.float32)
    seen: list[int] = []
    truth = nearest(np.array_split(keys, 7), keys.__getitem__, queries, 5, seen.append)
    expected = brute_force(keys, queries, 5)
    assert sum(seen) == 500
    np.testing.assert_array_equal(truth.ids, expected.ids)
    np.testing.assert_allclose(np.square(truth.distances), expected.distances, rtol=1e-6)


def test_scores_are_of_the_ids_alone() -> None:
    keys = np.array([[0.0], [1.0], [2.0], [2.0 + 1e-5], [50.0]])
    queries = np.array([[-1.0]])
    truth = nearest([keys], keys.__getitem__, queries, 3, lambda _: None)
    assert truth.ids.tolist() == [[0, 1, 2]]
    right = score(truth, truth.ids, keys.__getitem__, queries)
    assert right["recall@3"] == right["distance ratio@3"] == 1
    near = score(truth, np.array([[0, 1, 3]]), keys.__getitem__, queries)
    assert near["recall@3"] == pytest.approx(2 / 3)
    assert near["recall@3 within 0.0001"] == 1
    far = score(truth, np.array([[0, 1, 4]]), keys.__getitem__, queries)
    assert far["recall@3 within 0.01"] == pytest.approx(2 / 3)
    assert far["distance ratio@3"] == pytest.approx((1 + 1 + 51 / 3) / 3)
