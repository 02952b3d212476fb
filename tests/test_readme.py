"""Every block of the README and the documentation is run as it stands, at a small size.

The first words of a fence say how: `python` runs, `python no-run` only compiles, `python test` is a test module for
pytest, `console` lines beginning with `$ ` are commands.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import redi
from redi import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
MAKE_TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
SMALL = "6"  # rows of a build on the command line


@dataclass(frozen=True)
class Block:
    page: Path
    info: str
    body: str
    line: int

    def code(self) -> Any:
        """Compiled so that tracebacks name the page and its line."""
        return compile("\n" * self.line + self.body, str(self.page), "exec", dont_inherit=True)


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(page, m["info"].strip(), m["body"], text.count("\n", 0, m.start()) + 1) for m in FENCE.finditer(text)]


ABOUT_ANOTHER = ("knowledge-base.md", "choosing-a-retriever.md")
EVERY = [block for page in PAGES for block in blocks(page)]


def of(info: str) -> list[Block]:
    return [block for block in EVERY if block.info == info]


def commands(page: Path) -> list[list[str]]:
    """What a reader would type, split as a shell does; `a && b` is two commands."""
    lines = [line for b in blocks(page) if b.info == "console" for line in b.body.splitlines()]
    typed = [line[2:] for line in lines if line.startswith("$ ")]
    return [shlex.split(part, comments=True) for line in typed for part in line.split("&&")]


def test_every_block_says_how_it_is_tested() -> None:
    known = {"python", "python no-run", "python test", "console", "text"}
    assert {b.info for b in EVERY} <= known, {b.info: b.line for b in EVERY if b.info not in known}
    assert of("python")
    assert of("console")
    assert all(line.startswith("$ ") for b in of("console") for line in b.body.splitlines())


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.info == "python" for b in blocks(p))], ids=lambda p: p.name)
def test_python_blocks_of_a_page_run_in_order(page: Path, in_a_folder: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__page__"}
    for block in blocks(page):
        if block.info == "python":
            exec(block.code(), namespace)


@pytest.mark.parametrize("block", of("python no-run"), ids=lambda b: f"{b.page.name}:{b.line}")
def test_blocks_that_need_a_hub_compile(block: Block) -> None:
    block.code()


def test_parts_of_ones_own_pass_their_contract_suites(in_a_folder: Path) -> None:
    tests = of("python test")
    assert tests
    few = (
        "import hypothesis as h\nh.settings.register_profile('few', max_examples=10)\nh.settings.load_profile('few')\n"
    )
    (in_a_folder / "conftest.py").write_text(few, encoding="utf-8")
    for i, block in enumerate(tests):
        (in_a_folder / f"test_{i}.py").write_text(block.body, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "."],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    collected = re.search(r"(\d+) passed", done.stdout)
    assert collected
    assert int(collected[1]) >= 5 * len(tests), "the suites were not inherited"


@pytest.mark.parametrize("block", of("python test"), ids=lambda b: f"{b.page.name}:{b.line}")
def test_a_part_of_ones_own_takes_under_thirty_lines(block: Block) -> None:
    body = block.body.partition("\n\n\n")[2]  # without imports
    part = body.partition("class Test")[0]
    assert 0 < sum(bool(line.strip()) for line in part.splitlines()) < 30


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda p: p.name)
def test_commands_run_in_order(page: Path, in_a_folder: Path) -> None:
    for command in commands(page):
        match command:
            case ["git", "clone", *_] | ["cd", _]:
                pass
            case ["make", *targets]:
                assert set(targets) <= MAKE_TARGETS, command
            case ["redi", *arguments]:
                given = cli.parser().parse_args(arguments)
                if page.name in ABOUT_ANOTHER and not Path(given.kb).exists():
                    continue  # a page about what other pages build
                assert cli.main(small(arguments)) == 0, command
            case _:
                pytest.fail(f"{page.name}: a command nobody checks: {command}")


def small(arguments: list[str]) -> list[str]:
    """The same command on fewer rows."""
    if "--limit" in arguments:
        at = arguments.index("--limit") + 1
        return [*arguments[:at], SMALL, *arguments[at + 1 :]]
    return arguments


def test_numbers_have_the_command_beside_them() -> None:
    """A measured figure (seconds, times faster, Fréchet distance) may stand only in a section that names a command."""
    figure = re.compile(r"\b\d+(\.\d+)?(\s?(s|ms|seconds|minutes|times faster)\b|×(?!\s?\d))")
    for page in PAGES:
        for section in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            prose = FENCE.sub("", section)
            if figure.search(prose):
                assert re.search(r"`make \w+|`redi \w+|\$ (make|redi) |python (-m )?benchmarks", section), (
                    f"{page.name}: {figure.search(prose)}"
                )


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")
@pytest.mark.parametrize(
    ("name", "kind"),
    [("stable-diffusion-v1-5", "StableDiffusion"), ("xl-base", "StableDiffusionXL"), ("FLUX.1-dev", "Flux")],
)
def test_the_line_for_each_model_runs_on_a_tiny_one(name: str, kind: str, in_a_folder: Path) -> None:
    """The README's own lines, with a folder for the Hub's name, a CPU, and three prompts."""
    from tests.pipelines.models import make

    make(kind).save_pretrained(in_a_folder / name)
    (in_a_folder / "prompts.txt").write_text("a red fox\na blue car\nan old house\n", encoding="utf-8")
    (block,) = [b for b in of("python no-run") if b.page.name == "README.md"]
    code, given = re.subn(r'^name = ".*"$', f"name = {name!r}", block.body, flags=re.MULTILINE)
    code, moved = re.subn(
        r'\.to\("cuda"\)$', '.to("cpu")\npipe.set_progress_bar_config(disable=True)', code, flags=re.M
    )
    assert (given, moved) == (1, 1)
    if kind == "Flux":  # its pictures have the size of the real model's unless it is told otherwise
        code = code.replace("\nprompts =", "\npipe.default_sample_size = 8\nprompts =")
    namespace: dict[str, Any] = {"__name__": "__page__"}
    exec(compile(code, str(block.page), "exec", dont_inherit=True), namespace)
    report = redi.report(namespace["pipe"])
    assert (report.nfe, report.nfe_full, report.leapt) == (8, 40, (True,))
    assert namespace["image"].size[0] > 1
