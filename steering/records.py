"""Records of a `.txt`, `.csv`, `.json` or `.jsonl` file, each with its place in the file.

Not covered: what the records mean; see `steering.datasets`.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# UTF-32 first: its little-endian mark begins with the one of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
_PACKED = {
    b"\x1f\x8b": "a gzip file",
    b"PK\x03\x04": "a zip file (or a spreadsheet: save it as csv)",
    b"PAR1": "a Parquet file",
}
_NOT_LEGACY_TEXT = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\ufffd]")

# A quoted cell, or a bare one, in which quotes are ordinary characters. Possessive, so that a huge
# cell with a missing quote costs one pass.
_CELL = re.compile(r'"((?:[^"]++|"")*+)"|([^,\n]*+)')


@dataclass(frozen=True)
class Source:
    """The text of a file, with every line end as a line feed."""

    path: Path
    text: str

    @property
    def tabular(self) -> bool:
        return self.path.suffix.lower() == ".csv"

    def error(self, offset: int, message: str) -> ValueError:
        """An error to raise: file, line, column (both from 1) of a character, and the message."""
        return ValueError(f"{self.path}:{_place(self.text[:offset])}: {message}")


@dataclass(frozen=True)
class Record:
    """A string, an object or anything else that the file lists.

    Args:
        value: a str, a dict by column or key, or whatever else a JSON file holds.
        number: of this record among the file's, from 1.
        offset: of its first character in the text.
    """

    source: Source
    value: object
    number: int
    offset: int

    def error(self, message: str, column: str | None = None) -> ValueError:
        """An error to raise. `column` names the csv column or JSON key that is at fault."""
        if not self.source.tabular:
            key = f"key {column} " if column else ""
            return self.source.error(self.offset, f"prompt {self.number}: {key}{message}")
        # Not the character's number: the column's name says where to look.
        line = _place(self.source.text[: self.offset]).partition(":")[0]
        named = f"column {column} " if column else ""
        return ValueError(f"{self.source.path}:{line}: {named}{message}")


@dataclass(frozen=True)
class Records:
    """What a file holds.

    Args:
        columns: of a csv file's header, or the keys of the first JSON object; empty for strings.
    """

    source: Source
    columns: tuple[str, ...]
    records: tuple[Record, ...]


def read_records(path: Path | str) -> Records:
    """Read a file by its suffix: `.txt` one a line, `.csv` with a header, `.json` a list, `.jsonl`.

    UTF-8 and UTF-16 with or without a byte-order mark; what is neither is read as Windows-1252
    (Latin-1 with quotes) if it can be. Blank lines and rows are skipped. Raises ValueError naming
    the file, and the line and column of what is malformed.
    """
    path = Path(path)
    readers: dict[str, Callable[[Source], Records]] = {
        ".txt": _read_lines,
        ".csv": _read_csv,
        ".json": _read_json,
        ".jsonl": _read_jsonl,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: expected one of {', '.join(readers)}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    return reader(_decode(path, data))


def _place(before: str) -> str:
    """`line:column`, both from 1, of the character after `before`."""
    return f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"


def _decode(path: Path, data: bytes) -> Source:
    for magic, kind in _PACKED.items():
        if data.startswith(magic):
            raise ValueError(f"{path} is {kind}, not text: unpack it first")
    encoding = _encoding(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        place = _place(data[: error.start].decode(encoding, "replace"))
        raise ValueError(
            f"{path}:{place}: not {encoding.upper()} text: {error.reason} "
            "(files are read as UTF-8, UTF-16 or Windows-1252)"
        ) from error
    # As Python reads text: the same file has the same prompts after a checkout on Windows.
    source = Source(path, text.replace("\r\n", "\n").replace("\r", "\n"))
    if "\0" in source.text:
        raise source.error(source.text.index("\0"), "a NUL character: this is not a text file")
    return source


def _encoding(data: bytes) -> str:
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name
    # Western text in UTF-16 without a mark: every other byte is zero.
    even, odd = data[:2000:2].count(0), data[1:2000:2].count(0)
    if max(even, odd) > 4 * min(even, odd) and 4 * max(even, odd) > min(len(data), 2000):
        return "utf-16-le" if odd > even else "utf-16-be"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        # With characters that are well-formed UTF-8 in it, this is UTF-8 with a broken place.
        well_formed = data.decode("utf-8", "ignore")
        legacy = data.decode("cp1252", "replace")
        if well_formed.isascii() and not _NOT_LEGACY_TEXT.search(legacy):
            return "cp1252"
    return "utf-8"


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Offset and text of each line that is not blank; only a line feed ends a line."""
    offset = 0
    # Not splitlines(): JSON strings may hold U+2028 and other things that it takes for line ends.
    for line in text.split("\n"):
        if line.strip():
            yield offset, line
        offset += len(line) + 1


def _read_lines(source: Source) -> Records:
    lines = enumerate(_lines(source.text), 1)
    return Records(source, (), tuple(Record(source, s.strip(), i, at) for i, (at, s) in lines))


def _read_csv(source: Source) -> Records:
    rows = _rows(source)
    header: list[tuple[int, str]] = next(rows, (0, []))[1]
    columns = [name.strip() for _, name in header]
    for i, column in enumerate(columns):
        # Nameless columns are what spreadsheets leave behind.
        if column and column in columns[:i]:
            raise source.error(header[i][0], f"column {column} appears twice in the header")
    records: list[Record] = []
    for start, cells in rows:
        if len(cells) > len(columns) and any(text.strip() for _, text in cells[len(columns) :]):
            raise source.error(
                cells[len(columns)][0], f"{len(cells)} cells, but the header has {len(columns)}"
            )
        # Spreadsheets drop the empty cells at a row's end.
        texts = [text for _, text in cells] + [""] * (len(columns) - len(cells))
        value = {name: text for name, text in zip(columns, texts, strict=False) if name}
        records.append(Record(source, value, len(records) + 1, start))
    return Records(source, tuple(filter(None, columns)), tuple(records))


def _rows(source: Source) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """Offset and cells (offset, text) of each row in which some cell is not blank.

    Python's csv module does not say where in a row it stopped and refuses cells over 128 KiB.
    """
    text, offset = source.text, 0
    while offset < len(text):
        cells: list[tuple[int, str]] = []
        start, more = offset, True
        while more:
            match = _CELL.match(text, offset)
            assert match, "a bare cell may be empty"
            quoted, bare = match.groups()
            if quoted is None and bare.startswith('"'):
                raise source.error(offset, "this quoted cell is never closed")
            cells.append((offset, bare if quoted is None else quoted.replace('""', '"')))
            offset = match.end()
            if text[offset : offset + 1] not in ("", ",", "\n"):
                raise source.error(offset, "expected a comma or a line end after the closing quote")
            more = text.startswith(",", offset)
            offset += 1
        if any(cell.strip() for _, cell in cells):
            yield start, cells


def _read_json(source: Source) -> Records:
    text = source.text
    if not text.strip():
        return Records(source, (), ())
    offset = _skip_space(text, 0)
    if text[offset] != "[":
        raise source.error(offset, "expected a list of prompts (one object a line is a .jsonl)")
    records: list[Record] = []
    offset = _skip_space(text, offset + 1)
    closed = text.startswith("]", offset)
    while not closed:
        value, end = _json_value(source, text, offset, 0)
        records.append(Record(source, value, len(records) + 1, offset))
        offset = _skip_space(text, end)
        closed = text.startswith("]", offset)
        if not closed:
            if not text.startswith(",", offset):
                raise source.error(offset, "expected a comma or ]")
            offset = _skip_space(text, offset + 1)
    if text[offset + 1 :].strip():
        raise source.error(_skip_space(text, offset + 1), "text after the end of the list")
    return Records(source, _keys(records), tuple(records))


def _read_jsonl(source: Source) -> Records:
    records: list[Record] = []
    for at, line in _lines(source.text):
        indent = _skip_space(line, 0)
        value, end = _json_value(source, line, indent, at)
        if line[end:].strip():
            raise source.error(at + _skip_space(line, end), "text after the end of the object")
        records.append(Record(source, value, len(records) + 1, at + indent))
    return Records(source, _keys(records), tuple(records))


def _keys(records: list[Record]) -> tuple[str, ...]:
    first = records[0].value if records else None
    return tuple(first) if isinstance(first, dict) else ()


def _skip_space(text: str, offset: int) -> int:
    while text[offset : offset + 1].isspace():
        offset += 1
    return offset


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)} appears twice")
    return value


_JSON = json.JSONDecoder(object_pairs_hook=_unique)


def _json_value(source: Source, text: str, start: int, base: int) -> tuple[object, int]:
    """The JSON value at `start` of `text`, which is the source from `base` on, and its end."""
    try:
        value, end = _JSON.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise source.error(base + error.pos, error.msg) from error
    except (RecursionError, ValueError) as error:
        raise source.error(base + start, str(error)) from error
    return value, end
