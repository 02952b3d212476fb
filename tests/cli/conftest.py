"""Running commands in this process, and one knowledge base for all tests that only read."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from redi.cli import main
from tests.tiny import saved

PROMPTS = ("red apple, noto style", "green heart", "blue face", "red star, noto style", "cat", "dog", "a star")


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Redi = Callable[..., Done]


@pytest.fixture
def redi(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Redi:
    def run(*arguments: object, stdin: bytes = b"") -> Done:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def model() -> Path:
    return saved()


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def kb(tmp_path_factory: pytest.TempPathFactory, model: Path, prompts: Path) -> Path:
    folder = tmp_path_factory.mktemp("kb") / "kb"
    code = main(["build", str(model), str(prompts), str(folder), "--plan", "coarse:3/8,coarse:4/8", "--noises", "2"])
    assert code == 0
    return folder


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C works in here and in what is started from here, also where pytest itself was started to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
