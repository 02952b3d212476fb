"""Workers of a DataLoader search, build and add after their parent has searched on several threads: nobody hangs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Its own process: this one computes on one thread, where nothing can hang.
SCRIPT = """
import importlib.util
import sys

if sys.argv[1] == "faiss first" and importlib.util.find_spec("faiss"):
    import faiss  # brings an OpenMP of its own where torch's is not there yet
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from redi.backends import Exact, Faiss, Hnsw, Scann

torch.set_num_threads(2)
recipes = [Exact()]
if importlib.util.find_spec("faiss"):
    import faiss
    faiss.omp_set_num_threads(2)
    recipes += [Faiss(), Faiss("IVF8,SQ8", rerank=20), Faiss("HNSW16"), Faiss("PQ8x4")]
if importlib.util.find_spec("hnswlib"):
    recipes += [Hnsw()]
if importlib.util.find_spec("scann"):
    recipes += [Scann(rerank=20)]
keys = np.random.default_rng(0).normal(size=(2000, 128)).astype(np.float32)


class Searches(Dataset):
    def __init__(self, recipe, index):
        self.recipe, self.index = recipe, index

    def __len__(self):
        return 4

    def __getitem__(self, i):
        if torch.utils.data.get_worker_info() is not None:
            torch.set_num_threads(2)  # a worker begins with one, which is what makes it safe
            self.recipe.build(keys[:200]).search(keys[:64], 3)
            if not isinstance(self.recipe, Scann):
                self.index.add(keys[:2])
        found = self.index.search(keys[i * 64 : i * 64 + 64] + 0.1, 5)
        assert torch.get_num_threads() == 2
        return found.ids


for recipe in recipes:
    index = recipe.build(keys)
    here = Searches(recipe, index)
    expected = [here[i] for i in range(4)]
    loader = DataLoader(here, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    for a, b in zip(loader, expected, strict=True):
        np.testing.assert_array_equal(a, b)
print(len(recipes))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("order", ["torch first", "faiss first"])
def test_workers_search_after_their_parent(order: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, order],
        capture_output=True, text=True, timeout=200, env=environment, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr[-3000:]
    assert int(said.stdout) >= 1
