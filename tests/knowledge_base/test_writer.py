"""What is written and what is refused, one writer at a time, and what a crash leaves behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redi.errors import FingerprintMismatchError, InvalidInputError, KnowledgeBaseError
from redi.knowledge_base import KnowledgeBase, Writer, files, verify
from redi.types import Rows
from tests.knowledge_base.samples import config, leaves, make, rows, same

ROOT = Path(__file__).parents[2]
PARTS = ["safetensors", "prompts.json", "finished.json"]  # of a shard, in the order they are put in place


def keys(given: Rows) -> set[tuple[str, int]]:
    return set(zip(given.prompts, given.noise_ids.tolist(), strict=True))


@given(
    st.dictionaries(
        st.integers(0, 9),
        st.tuples(
            st.sampled_from(sorted(set(leaves(rows(config(), 0, 1))) - {"noise"})),
            st.sampled_from([float("nan"), float("inf"), -float("inf"), 65_520.0, -1e30]),
        ),
        max_size=4,
    )
)
def test_rows_that_are_not_finite_are_never_written(
    tmp_path_factory: pytest.TempPathFactory, spoiled: dict[int, tuple[str, float]]
) -> None:
    of, path = config(), tmp_path_factory.mktemp("kb")
    batch = rows(of, 0, 10)
    for i, (name, value) in spoiled.items():
        leaves(batch)[name][i].view(-1)[-1] = value
    with Writer.open(path, of, shard_rows=4) as writer:
        refused = writer.append(batch)
    assert refused == writer.refused
    assert {(r.prompt, r.noise_id) for r in refused} == {(batch.prompts[i], int(batch.noise_ids[i])) for i in spoiled}
    for refusal in refused:
        i = batch.prompts.index(refusal.prompt) + refusal.noise_id  # three noises per prompt, in order
        value = spoiled[i][1]
        said = "beyond torch.float16" if abs(value) < float("inf") else "not finite"
        assert said in refusal.reason
    kept = [i for i in range(10) if i not in spoiled]
    kb = KnowledgeBase.open(path)
    assert [kb.prompts[j] for j in range(len(kb))] == [batch.prompts[i] for i in kept]
    assert kb.verify().ok
    for j, i in enumerate(kept):
        assert same(kb.gather(torch.tensor([j])), rows(of, i, i + 1), of.dtype)


def test_overflow_depends_on_the_storage(tmp_path: Path) -> None:
    for storage, count in (("float16", 1), ("float32", 2), ("bfloat16", 2)):
        of = config(storage=storage)
        batch = rows(of, 0, 2)
        batch.samples[40][1, 0, 0] = 70_000.0
        with Writer.open(tmp_path / storage, of) as writer:
            refused = writer.append(batch)
        assert len(writer.done) == count
        assert [r.reason for r in refused] == (
            [] if count == 2 else ["sample.00040 reaches 7e+04, beyond torch.float16; store it as float32 or bfloat16"]
        )


def test_a_prompt_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    of = config()
    with Writer.open(tmp_path, of) as writer:
        (refusal,) = writer.append(replace(rows(of, 0, 2), prompts=["fine", "\ud800"]))
    assert "Unicode" in refusal.reason
    assert KnowledgeBase.open(tmp_path).prompts == ("fine",)


def test_duplicates_are_skipped_and_counted(tmp_path: Path) -> None:
    of = config()
    with Writer.open(tmp_path, of, shard_rows=4) as writer:
        writer.append(rows(of, 0, 6))
        assert len(writer.done) == 4  # a shard is finished, two rows wait
        writer.append(rows(of, 3, 9))
        assert writer.skipped == 3
    with Writer.open(tmp_path, of) as writer:
        assert writer.done == keys(rows(of, 0, 9))
        writer.append(rows(of, 0, 10))
        assert writer.skipped == 9
    kb = KnowledgeBase.open(tmp_path)
    assert same(kb.gather(torch.arange(10)), rows(of, 0, 10), of.dtype)


def test_buffers_may_be_reused_by_the_caller(tmp_path: Path) -> None:
    of = config(storage="float32")
    with Writer.open(tmp_path, of) as writer:
        batch = rows(of, 0, 4)
        writer.append(batch)
        for tensor in leaves(batch).values():
            tensor.zero_()
    assert same(KnowledgeBase.open(tmp_path).gather(torch.arange(4)), rows(of, 0, 4), of.dtype)


def test_rows_unlike_the_configuration_are_refused_whole(tmp_path: Path) -> None:
    of = config()
    good = rows(of, 0, 3)
    bad: list[tuple[Rows, str]] = [
        (replace(good, samples={0: good.samples[0], 5: good.samples[5]}), "sample.00040 is missing"),
        (replace(good, samples={**good.samples, 7: good.samples[0]}), "sample.00007 is not recorded"),
        (replace(good, denoised={}), "denoised.00000 is missing; denoised.00005 is missing"),
        (replace(good, history={}), "history is at entries []"),
        (replace(good, history={6: good.history[5]}), "is not recorded"),
        (replace(good, history={5: {"../x": good.samples[0]}}), "history.00005.../x is not recorded"),
        (replace(good, history={5: {"a": good.samples[0][..., :2]}}), "a row of history.00005.a has shape (2, 2)"),
        (replace(good, samples={**good.samples, 0: good.samples[0][:2]}), "sample.00000 has first dimension (2,)"),
        (replace(good, samples={**good.samples, 0: good.samples[0].int()}), "sample.00000 must be floating"),
        (replace(good, embeddings=good.embeddings[:, :, None]), "a row of embedding has shape (4, 1)"),
        (replace(good, noise_ids=torch.tensor([0, 1, 3])), "noise ids run from 0 to 3"),
        (replace(good, noise_ids=torch.tensor([-1, 1, 2])), "noise ids run from -1"),
    ]
    with Writer.open(tmp_path, of) as writer:
        writer.append(good)
        for given_rows, said in bad:
            with pytest.raises(InvalidInputError, match=re.escape(said)):
                writer.append(given_rows)
        with pytest.raises(InvalidInputError, match="differ from the rows before"):
            writer.append(rows(of, 3, 5, width=5))
        with pytest.raises(InvalidInputError, match="differ from the rows before"):
            writer.append(replace(rows(of, 3, 6), history={5: {"ets.0": good.samples[0]}}))
    assert len(KnowledgeBase.open(tmp_path)) == 3


def test_other_settings_do_not_continue(tmp_path: Path) -> None:
    make(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(FingerprintMismatchError) as caught:
        Writer.open(tmp_path, config(storage="float32", guidance=4.0))
    assert caught.value.differences == {"guidance": (3.0, 4.0), "storage": ("float16", "float32")}
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    Writer.open(tmp_path, config()).close()


def test_a_larger_bank_extends_what_is_there(tmp_path: Path) -> None:
    small, large = config(noises=2), config(noises=3)
    first, more = rows(small, 0, 4), rows(large, 0, 9)
    with Writer.open(tmp_path, small) as writer:
        writer.append(first)
    with Writer.open(tmp_path, large) as writer:
        assert writer.config.noise["size"] == 3
        assert writer.done == keys(first)
        writer.append(more)
        assert writer.skipped == 4
    with Writer.open(tmp_path, small) as writer:  # asked for fewer, it stays as large as it is
        assert writer.config.noise["size"] == 3
        assert len(writer.done) == 9
    kb = KnowledgeBase.open(tmp_path)
    assert (kb.config.noise["size"], kb.verify().ok) == (3, True)
    assert set(zip(kb.prompts, kb.noise_ids.tolist(), strict=True)) == keys(more)
    assert not list(tmp_path.glob("config.previous*"))
    with pytest.raises(FingerprintMismatchError) as caught:
        Writer.open(tmp_path, config(noises=4, guidance=4.0))
    assert caught.value.differences == {"guidance": (3.0, 4.0)}


@pytest.mark.parametrize("crash", range(4))
def test_a_bank_that_grows_is_seen_before_or_after_but_never_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: int
) -> None:
    """A crash before each of the files that growing puts in place or removes; and readers all along."""
    small, large, steps = config(noises=2), config(noises=3), 0
    with Writer.open(tmp_path, small) as writer:
        writer.append(rows(small, 0, 4))

    def dying(function: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*arguments: Path) -> None:
            nonlocal steps
            assert KnowledgeBase.open(tmp_path).config.noise["size"] in (2, 3)
            assert verify(tmp_path).ok
            if any(p.name.startswith(("config", "manifest")) for p in arguments):
                if steps == crash:
                    raise KeyboardInterrupt
                steps += 1
            function(*arguments)

        return wrapped

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", dying(os.replace))
        patched.setattr(Path, "unlink", dying(Path.unlink))
        with pytest.raises(KeyboardInterrupt):
            Writer.open(tmp_path, large)
    assert steps == crash
    kb = KnowledgeBase.open(tmp_path)
    assert (len(kb), kb.verify().ok) == (4, True)
    assert kb.config.noise["size"] == (3 if crash == 3 else 2)
    for of, size in ((small, 3 if crash == 3 else 2), (large, 3)):
        with Writer.open(tmp_path, of) as writer:
            assert writer.config.noise["size"] == size
            assert len(writer.done) == 4
        kb = KnowledgeBase.open(tmp_path)
        assert (kb.config.noise["size"], len(kb), kb.verify().ok) == (size, 4, True)
        assert not list(tmp_path.glob("config.previous*"))


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(KnowledgeBaseError, match="not a knowledge base; choose a new folder"):
        Writer.open(tmp_path, config())
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(KnowledgeBaseError, match="cannot be made a folder"):
        Writer.open(tmp_path / "thesis.tex", config())


def test_a_lost_manifest_is_not_begun_anew_over_the_shards(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(KnowledgeBaseError, match="missing, though there are shards"):
        Writer.open(tmp_path, config())
    with pytest.raises(KnowledgeBaseError, match=r"manifest\.json: missing"):
        KnowledgeBase.open(tmp_path)


def test_a_second_writer_is_refused_and_told_whom_to_wait_for(tmp_path: Path) -> None:
    of = config()
    with Writer.open(tmp_path, of) as writer:
        with pytest.raises(KnowledgeBaseError, match=f"is being written by process {os.getpid()}"):
            Writer.open(tmp_path, of)
        writer.append(rows(of, 0, 2))
    Writer.open(tmp_path, of).close()
    with pytest.raises(KnowledgeBaseError, match="closed"):
        writer.append(rows(of, 2, 3))
    writer.close()
    assert len(KnowledgeBase.open(tmp_path)) == 2


def test_rows_before_an_exception_are_kept(tmp_path: Path) -> None:
    of = config()
    with pytest.raises(RuntimeError, match="the model broke"), Writer.open(tmp_path, of) as writer:  # noqa: PT012
        writer.append(rows(of, 0, 3))
        raise RuntimeError("the model broke")
    assert len(KnowledgeBase.open(tmp_path)) == 3
    Writer.open(tmp_path, of).close()


def test_a_full_disk_is_reported_and_costs_nothing_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = config()
    make(tmp_path, of)
    writer = Writer.open(tmp_path, of)
    writer.append(rows(of, 20, 22))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(KnowledgeBaseError, match="No space left on device"):
            writer.flush()
        assert len(KnowledgeBase.open(tmp_path)) == 20
        assert not list(tmp_path.rglob("*.tmp"))
    writer.close()  # the rows still wait, and now there is space
    assert len(KnowledgeBase.open(tmp_path)) == 22


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the names of descriptors")
def test_content_is_on_the_disk_before_its_name_and_shards_before_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut at any moment would leave, by the order of what the disk is told."""
    safe: set[str] = set()  # content that was synced, by name at that time
    placed: list[str] = []
    replace_file = os.replace

    def fsync(descriptor: int) -> None:
        safe.add(os.readlink(f"/proc/self/fd/{descriptor}"))

    def put(source: Path, target: Path) -> None:
        if target.name != "README.md":
            assert str(source) in safe
        if target.name == "manifest.json" and placed[2:]:
            assert str(tmp_path / "shards") in safe  # the names of the shard's two files and of their note
            assert [Path(p).name.partition(".")[2] for p in placed[-3:]] == PARTS
        safe.clear()
        placed.append(str(target))
        replace_file(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        patched.setattr(os, "replace", put)
        kb = make(tmp_path, shard_rows=10)
        assert [Path(p).name for p in placed if "README" not in p] == [
            "config.json",
            "manifest.json",
            *(*(f"00000.{part}" for part in PARTS), "manifest.json"),
            *(*(f"00001.{part}" for part in PARTS), "manifest.json"),
        ]
    assert kb.verify().ok


_DIES = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from redi.knowledge_base import Writer
from tests.knowledge_base.samples import config, rows

folder, deaths = Path(sys.argv[1]), int(sys.argv[2])
for death in range(deaths):
    child = os.fork()
    if child == 0:
        calls = 0
        def dying(function):
            def wrapped(*arguments):
                global calls
                calls += 1
                if calls > death:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments)
            return wrapped
        os.replace = dying(os.replace)
        of = config()
        with Writer.open(folder / str(death), of, shard_rows=3) as writer:
            for first in range(0, 8, 2):
                writer.append(rows(of, first, first + 2))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(death, os.WIFSIGNALED(status), flush=True)
"""


def test_killed_at_every_step_a_writer_leaves_a_whole_knowledge_base(tmp_path: Path) -> None:
    """A child is killed before it puts its first, second, … file in place."""
    deaths = 20  # three shards of five files each, and three files to begin with, and two who live
    done = subprocess.run(
        [sys.executable, "-c", _DIES, str(tmp_path), str(deaths)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    killed = {int(line.split()[0]): line.endswith("True") for line in done.stdout.splitlines()}
    assert len(killed) == deaths
    assert [killed[death] for death in range(deaths)] == [True] * 18 + [False] * 2
    of, seen = config(), set[int]()
    for death in range(deaths):
        path = tmp_path / str(death)
        finished = 0
        noted = len(list(path.glob("shards/*.finished.json")))  # finished, and in the manifest or not yet
        if (path / "manifest.json").exists():  # else it died before there was anything to lose
            kb = KnowledgeBase.open(path)
            finished = len(kb)
            seen.add(finished)
            assert kb.verify().ok
            if finished:
                assert same(kb.gather(torch.arange(finished)), rows(of, 0, finished), of.dtype)
        with Writer.open(path, of, shard_rows=3) as writer:
            assert finished <= len(writer.done) <= finished + 3 * noted
            assert noted == 0 or len(writer.done) in (3, 6, 8)
            writer.append(rows(of, 0, 8))
        kb = KnowledgeBase.open(path)
        assert same(kb.gather(torch.arange(8)), rows(of, 0, 8), of.dtype)
        report = kb.verify()
        assert report.ok
        assert not report.ignored
    assert seen == {0, 3, 6, 8}


_ENDLESS = """
import sys
from pathlib import Path
from redi.knowledge_base import Writer
from tests.knowledge_base.samples import config, rows

of, first = config(), 0
with Writer.open(Path(sys.argv[1]), of, shard_rows=5) as writer:
    while True:
        writer.append(rows(of, first, first + 2))
        first += 2
"""


def test_another_process_is_refused_then_killed_then_continued(tmp_path: Path) -> None:
    of = config()
    with subprocess.Popen([sys.executable, "-c", _ENDLESS, str(tmp_path)], cwd=ROOT) as child:
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "shards" / "00003.prompts.json").exists():
                assert child.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            with pytest.raises(KnowledgeBaseError, match=f"is being written by process {child.pid} on "):
                Writer.open(tmp_path, of)
            assert KnowledgeBase.open(tmp_path).verify().ok  # a reader may look at any time
        finally:
            child.send_signal(signal.SIGKILL)
    count = len(KnowledgeBase.open(tmp_path))
    assert count % 5 == 0
    with Writer.open(tmp_path, of) as writer:
        assert len(writer.done) in (count, count + 5)  # one shard may have been finished and not listed
        count = len(writer.done)
        assert writer.done == keys(rows(of, 0, count))
        writer.append(rows(of, 0, count + 1))
        assert writer.skipped == count
    kb = KnowledgeBase.open(tmp_path)
    assert kb.verify().ok
    assert same(kb.gather(torch.arange(count + 1)), rows(of, 0, count + 1), of.dtype)


def test_a_file_that_all_ranks_write_is_whole_whoever_wins(tmp_path: Path) -> None:
    path = tmp_path / "about.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: files.write(path, bytes([i]) * 4096, durable=False, shared=True), range(200)))
    assert len(path.read_bytes()) == 4096
    assert len(set(path.read_bytes())) == 1
    assert list(tmp_path.iterdir()) == [path]
