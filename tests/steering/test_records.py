"""Files as people have them: encodings, line ends, quotes, and what is broken in them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from pathlib import Path

import pytest

from steering.prompts import load_prompts


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_any_text_survives_csv_and_json(tmp_path: Path) -> None:
    rng = random.Random(0)
    pieces = [
        '"',
        '""',
        ",",
        "\n",
        "\n\n",
        "'",
        "\\",
        "a",
        " ",
        "\t",
        ";",
        "é",
        "\u2028",
        "🦜",
        "#",
    ]
    texts = ["x" + "".join(rng.choices(pieces, k=rng.randrange(12))) + "y" for _ in range(500)]
    files = {
        "c.json": json.dumps([{"goal": t, "target": ""} for t in texts]),
        "d.jsonl": "\n".join(
            json.dumps({"goal": t, "target": ""}, ensure_ascii=False) for t in texts
        ),
    }
    for name, line_end in (("a.csv", "\n"), ("b.csv", "\r\n")):
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator=line_end)
        writer.writerows([("goal", "target"), *((text, text) for text in texts)])
        files[name] = stream.getvalue()
    for name, content in files.items():
        loaded = load_prompts(write(tmp_path / name, content.encode()))
        assert [p.text for p in loaded.prompts] == texts, name


def test_a_huge_cell_is_read_and_its_missing_quote_is_found(tmp_path: Path) -> None:
    huge = 'a ""b""\n' * 250_000
    path = write(tmp_path / "a.csv", f'goal,target\n"{huge}x",\n'.encode())
    (prompt,) = load_prompts(path).prompts
    assert len(prompt.text) == 6 * 250_000 + 1
    with pytest.raises(ValueError, match=r"a\.csv:2:1: this quoted cell is never closed"):
        load_prompts(write(path, f'goal,target\n"{huge}x,\n'.encode()))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "holds no prompts"),
        ("a.csv", b"goal,target\n,\n", "holds no prompts"),
        ("a.json", b" \n", "holds no prompts"),
        ("a.json", b"[]", "holds no prompts"),
        ("a.jsonl", b"\xef\xbb\xbf\n", "holds no prompts"),
        ("a.csv", b"goal,target,goal\nx,y,z\n", r"1:13: column goal appears twice in the header"),
        ("a.json", b'[{"goal": "x",\n"goal": "y"}]', r"1:2: key goal appears twice"),
        ("a.csv", b"goal,target\nx,y\nx,y,,z\n", r"3:5: 4 cells, but the header has 2"),
        ("a.csv", b'goal,target\nx,"y" z\n', r"2:6: expected a comma or a line end"),
        ("a.json", b'[1]\n"x"', r"2:1: text after the end of the list"),
        ("a.json", b'["x"\n "y"]', r"2:2: expected a comma or \]"),
        ("a.json", b'{"prompt": "x"}\n{"prompt": "y"}', r"1:1: expected a list .*jsonl"),
        ("a.jsonl", b'"x"\n  "y" "z"\n', r"2:7: text after the end of the object"),
        ("a.json", b"[" * 100_000, r"1:2: "),
        ("a.json", b"[" + b"1" * 5000 + b"]", r"1:2: Exceeds the limit"),
        ("a.txt", b"one\ntw\0o\nthree, four and five\n", r"2:3: a NUL character"),
        ("a.txt", "né\nd".encode() + b"\xe9 x\n", r"2:2: not UTF-8 text"),
        ("a.txt", b"one\n\x01\x80\xff\n", r"2:2: not UTF-8 text"),
        # Without a time of day: every process that collects this test must give it one name.
        (
            "a.csv",
            gzip.compress(b"goal,target\nx,y\n", mtime=0),
            r"a\.csv is a gzip file, .*unpack it",
        ),
        ("a.csv", b"PK\x03\x04rest", r"a\.csv is a zip file \(or a spreadsheet"),
        ("a.jsonl", b'\n[{"goal": "x"}]\n', r"2:1: prompt 1: is a list; .* is a \.json$"),
        ("missing.txt", None, r"missing\.txt: cannot be read"),
    ],
)
def test_a_malformed_file_is_named_with_line_and_column(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        load_prompts(tmp_path / name, harmful=True)


def test_western_text_of_before_unicode_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "goal,target\nÜber das Café “reden”,ja\n".encode("cp1252"))
    assert [p.text for p in load_prompts(path).prompts] == ["Über das Café “reden”"]


def test_what_spreadsheets_leave_behind_is_no_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"goal,target,,\nx,y,,\n\n,,,\nz\n")
    assert [p.text for p in load_prompts(path).prompts] == ["x", "z"]
