"""The package from outside: what importing it costs, what it exports, what ships, and what its files must not hold."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

import redi

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "redi"
HEAVY = {"torch", "numpy", "diffusers", "transformers", "jaxtyping", "scipy", "safetensors", "PIL", "lightning"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def loaded_by(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after running `code`."""
    tell = "import json, sys; print('\\n' + json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{tell}"], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_redi_imports_nothing_heavy() -> None:
    assert not HEAVY & loaded_by("import redi")


def test_help_imports_nothing_heavy() -> None:
    showing = "import contextlib, redi.cli\nwith contextlib.suppress(SystemExit): redi.cli.main({})"
    for arguments in (["--help"], ["build", "--help"], ["generate", "--help"], ["--version"]):
        assert not HEAVY & loaded_by(showing.format(arguments)), arguments


def test_the_check_sees_a_heavy_import() -> None:
    assert "numpy" in loaded_by("import numpy")


@pytest.mark.parametrize("name", redi.__all__)
def test_every_public_name_resolves_to_something_documented(name: str) -> None:
    found = getattr(redi, name)
    assert found.__name__.removeprefix("redi.") == name
    assert (found.__doc__ or "").strip()


def test_every_public_name_is_listed_everywhere() -> None:
    assert set(redi.__all__) == {*redi._HOME, *redi._MODULES}
    assert len(redi.__all__) == len(set(redi.__all__))
    assert set(redi.__all__) <= set(dir(redi))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = redi.no_such_name


def test_one_version(project: dict[str, Any]) -> None:
    version = project["project"]["version"]
    assert redi.__version__ == version
    assert distribution("redi").version == version
    assert f"## [{version}] - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_licence_and_typing_marker_are_there(project: dict[str, Any]) -> None:
    for name in project["project"]["license-files"]:
        assert (ROOT / name).is_file()
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    assert (PACKAGE / "py.typed").exists()


def test_extras(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    assert {"faiss", "scann", "hnsw", "eval", "dev", "docs", "all"} <= set(extras)
    text = json.dumps(extras)
    for malicious in ("2.6.2", "2.6.3"):
        assert f"!={malicious}" in text


def test_every_direct_dependency_is_pinned_exactly(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin) for pin in pins)
    names = [pin.partition("==")[0] for pin in pins]
    assert len(names) == len(set(names))
    extras = project["project"]["optional-dependencies"].values()
    wanted = [*project["project"]["dependencies"], *(need for extra in extras for need in extra)]
    direct = {re.split(r"[^A-Za-z0-9_-]", need)[0].lower().replace("_", "-") for need in wanted} - {"redi"}
    assert direct <= set(names)


def test_whatever_is_installed_is_what_is_pinned() -> None:
    """A run with other versions than the pinned ones would say little about the pinned ones."""
    if not (ROOT / ".venv").samefile(sys.prefix):
        pytest.skip("not running in the environment that `make setup` made")
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    for name in ("torch", "diffusers", "transformers", "numpy", "safetensors", "scipy"):
        assert distribution(name).version.partition("+")[0] == pins[name]


def test_everything_that_ships_is_tracked_and_small() -> None:
    """What git ignores the wheel leaves out; what is bundled shall not make installing slow."""
    bundled = {path for path in (PACKAGE / "assets").rglob("*") if path.is_file()}
    assert bundled <= set(tracked())
    assert sum(path.stat().st_size for path in bundled) <= 20e6
    assert all(path.suffix in {".json", ".md", ".png", ".safetensors", ".txt"} for path in bundled)


# What unpickles, or may be told to. Nothing in redi/ may call it: a knowledge base comes from strangers.
UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}


def unsafe(source: str) -> list[str]:
    """Every place in a module that could run code out of a data file."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [name.name for name in names if name.name.partition(".")[0] in UNPICKLERS]
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in UNPICKLERS:
                found.append(module)
            case ast.ImportFrom(module="torch", names=names):
                found += [f"torch.{name.name}" for name in names if name.name == "load"]
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                found.append("torch.load")
            case ast.Call(func=ast.Name(id="eval" | "exec" | "compile" as name)):
                found.append(name)
            case ast.keyword(arg="allow_pickle", value=value):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    found.append("allow_pickle")
            case _:
                pass
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nothing_is_unpickled(path: Path) -> None:
    assert unsafe(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "np.load('x', allow_pickle=flag)",
        "eval('1')",
    ],
)
def test_the_scan_sees_unpickling(source: str) -> None:
    assert unsafe(source)


def test_the_scan_lets_safe_reading_pass() -> None:
    assert not unsafe("import numpy as np\nimport re\nnp.load('x', allow_pickle=False)\nre.compile('x')\nmodel.eval()")


def tracked() -> list[Path]:
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not in a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name]


def test_no_file_names_the_machine_it_was_written_on() -> None:
    # put together here, so that this file does not hold them
    words = ["/" + word for word in ("work/", "root/", "home/")] + [word + ".md" for word in ("DESIGN", "STYLE")]
    for path in tracked():
        if not path.is_file():
            continue
        content = path.read_bytes()
        if b"\0" in content:
            continue
        for word in words:
            assert word.encode() not in content, f"{path.relative_to(ROOT)} holds {word}"


def test_every_test_folder_is_a_package() -> None:
    """Without it two test files of one name in two folders cannot both be collected."""
    for folder in {path.parent for path in (ROOT / "tests").rglob("test_*.py")}:
        assert (folder / "__init__.py").exists(), folder
