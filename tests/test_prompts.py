"""Prompt lists in every form, and what is said of those that cannot be read."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redi import prompts
from redi.errors import InvalidInputError, MissingExtraError


def read(path: Path | str, column: str | None = None, notes: list[str] | None = None) -> list[str]:
    said = [] if notes is None else notes
    return prompts.read(str(path), column=column, model="somewhere/else", note=said.append)


@pytest.mark.parametrize(
    ("name", "content", "column"),
    [
        ("a.txt", "red apple\n\n  green heart  \nred apple\n", None),
        ("a.txt", "red apple\r\ngreen heart", None),
        ("a.prompts", "\ufeffred apple\ngreen heart", None),
        ("a.csv", 'id,Caption\n1,red apple\n2,"green heart"\n3,\n', None),
        ("a.csv", "id,what\n1,red apple\n2,green heart\n", "what"),
        ("a.tsv", "Prompt\tNote\nred apple\tx\ngreen heart\ty\n", None),
        ("a.tsv", "only\nred apple\ngreen heart\n", None),
        ("a.json", '["red apple", "green heart", ""]', None),
        ("a.json", '[{"prompt": "red apple", "n": 1}, {"prompt": "green heart"}]', None),
        ("a.jsonl", '{"x": "red apple", "prompt": "no"}\n\n{"x": "green heart"}\n', "x"),
        ("a.jsonl", '"red apple"\n"green heart"\n', None),
        ("a.jsonl", '"red apple"\r\n"\u2028green heart"', None),
        ("a.txt", "red apple\x0c\rgreen heart\r\n", None),
    ],
)
def test_every_form(tmp_path: Path, name: str, content: str, column: str | None) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert read(tmp_path / name, column) == ["red apple", "green heart"]


TEXTS = st.lists(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1), min_size=1
)


@given(TEXTS.filter(lambda ts: any(t.strip() for t in ts)))
def test_what_was_written_is_read_in_order_once(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("x")
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("n", "prompt"), *enumerate(texts)])
    (folder / "a.csv").write_text(table.getvalue(), encoding="utf-8", newline="")
    (folder / "a.json").write_text(json.dumps(texts), encoding="utf-8")
    expected = []
    for text in (t.strip() for t in texts):
        if text and text not in expected:
            expected.append(text)
    assert read(folder / "a.json") == expected
    assert read(folder / "a.csv") == expected


def test_repetitions_are_counted_in_a_note(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\nb\na\n\na\n")
    notes: list[str] = []
    assert read(tmp_path / "a.txt", notes=notes) == ["a", "b"]
    assert len(notes) == 1
    assert notes[0].startswith("2 prompts")


@pytest.mark.parametrize(
    ("name", "content", "column", "says"),
    [
        ("a.txt", b"", None, "no prompt"),
        ("a.txt", b" \n\n\t\n", None, "no prompt"),
        ("a.txt", b"fine\nbad \xff\n", None, "byte 9, line 2"),
        ("a.csv", b"id,what\n1,x\n", None, "--column: id, what"),
        ("a.csv", b"id,what\n1,x\n", "nope", "no 'nope' among its columns: id, what"),
        ("a.json", b'{"a": 1}', None, "must be a list"),
        ("a.json", b"[1]", None, "element 0: expected a text, given 1"),
        ("a.json", b"[", None, "is not json"),
        ("a.jsonl", b'"a"\n{\n', None, "is not jsonl"),
        ("a.jsonl", b'{"prompt": "a"}\n{"b": "c", "d": "e"}\n', None, "element 1"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, column: str | None, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInputError, match=says.replace("(", "\\(")):
        read(tmp_path / name, column)


def test_captions_of_coco(tmp_path: Path) -> None:
    captions = [
        {"image_id": i, "id": i, "caption": c} for i, c in enumerate(["A red apple.\n", "A heart.", "A heart."])
    ]
    document = {"info": {}, "images": [{"id": 0, "file_name": "0.jpg"}], "annotations": captions}
    (tmp_path / "captions_val.json").write_text(json.dumps(document))
    assert read(tmp_path / "captions_val.json") == ["A red apple.", "A heart."]


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": [1, 2, 3], "TEXT": ["red apple", None, "green heart"], "NSFW": ["no", "no", "no"]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    assert read(tmp_path / "a.parquet") == ["red apple", "green heart"]
    assert read(tmp_path / "a.parquet", "NSFW") == ["no"]
    with pytest.raises(InvalidInputError, match="element 0: expected a text, given 1"):
        read(tmp_path / "a.parquet", "id")
    (tmp_path / "b.parquet").write_text("red apple")
    with pytest.raises(InvalidInputError, match="is not parquet"):
        read(tmp_path / "b.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"redi\[parquet\]"):
        read(tmp_path / "a.parquet")


def test_what_is_behind_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('"a"\n"b"\n"a"\n"c"\n' + "{" * 100_000)
    notes: list[str] = []
    found = prompts.read(str(tmp_path / "a.jsonl"), limit=3, suffix=", noto style", note=notes.append)
    assert found == ["a, noto style", "b, noto style", "c, noto style"]
    assert len(notes) == 1
    assert notes[0].startswith("1 prompts")
    (tmp_path / "b.txt").write_bytes(b"fine\n" * 100_000 + b"bad \xff\n")  # further than one read of a stream
    with pytest.raises(InvalidInputError, match="byte 500004, line 100001"):
        read(tmp_path / "b.txt")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="there is no file"):
        read(tmp_path / "none.txt")
    with pytest.raises(InvalidInputError, match="is a folder"):
        read(tmp_path)
