"""Documents out of files: a .txt or .md is one; a .jsonl has one a line, a .parquet one a row, in one of its fields."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mics_models.data.extras import extra


@dataclass(frozen=True)
class Document:
    """A text, which UTF-8 can encode."""

    text: str
    position: int  # bytes of the file that were read when it ended; an estimate in a .parquet


@dataclass(frozen=True)
class Bad:
    """What should have been a document."""

    place: str  # file:line, or the file's row
    reason: str


def find(paths: Sequence[Path]) -> list[Path]:
    """The files to read, as absolute paths: those that are named, and in named folders all that can be read.

    Files of other kinds are refused where they are named, and passed over in folders.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = sorted(entry for entry in path.rglob("*") if entry.suffix in READERS and entry.is_file())
            if not below:
                raise ValueError(f"data: the folder {path} has no {KINDS} file, expected some: name another")
            found += below
        elif path.suffix not in READERS:
            raise ValueError(f"data: {path} is no {KINDS} file, expected one of these: convert it")
        elif not path.is_file():
            raise FileNotFoundError(f"data: {path} does not exist, expected a file or a folder: correct the name")
        else:
            found.append(path)
    names: dict[Path, Path] = {}
    for path in found:
        if (real := path.resolve()) in names:
            raise ValueError(f"data: {names[real]} and {path} are one file, expected each once: name it once")
        names[real] = path
    return list(names)


def read(path: Path, field: str) -> Iterator[Document | Bad]:
    """What is in a file, in order; after something bad, what follows it. A document is in memory as a whole."""
    return READERS[path.suffix](path, field)


def _read_txt(path: Path, field: str) -> Iterator[Document | Bad]:  # noqa: ARG001 - text has no fields
    content = path.read_bytes()
    try:
        yield Document(content.decode(), len(content))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield Bad(f"{path}:{line}", f"invalid UTF-8 ({error.reason})")


def _read_jsonl(path: Path, field: str) -> Iterator[Document | Bad]:
    position = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            position += len(line)
            item: Document | Bad
            try:
                item = Document(_text_of(line, field), position)
            except ValueError as error:
                item = Bad(f"{path}:{number}", str(error))
            yield item


def _text_of(line: bytes, field: str) -> str:
    """The text in a line of JSON, or a ValueError that says what is wrong with it."""
    try:
        content = json.loads(line.decode().rstrip())
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 ({error.reason} at byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON ({error.msg} at character {error.pos + 1})") from error
    except RecursionError as error:
        raise ValueError("invalid JSON (nested too deeply)") from error
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__} in place of an object")
    if field not in content:
        raise ValueError(f"no field {field!r} among {', '.join(map(repr, content)) or 'none'}")
    text = content[field]
    if not isinstance(text, str):
        raise ValueError(f"a {type(text).__name__} in the field {field!r} in place of a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair, which no UTF-8 has
        raise ValueError(f"half a surrogate pair in the field {field!r}") from error
    return text


def _read_parquet(path: Path, field: str) -> Iterator[Document | Bad]:
    arrow, parquet = extra("pyarrow"), extra("pyarrow.parquet")
    size = path.stat().st_size
    unreadable = (arrow.ArrowException, OSError)
    try:
        file = parquet.ParquetFile(path)
    except unreadable as error:
        yield Bad(str(path), f"invalid Parquet ({_line(error)})")
        return
    with file:
        names = file.schema_arrow.names
        if field not in names:
            yield Bad(str(path), f"no column {field!r} among {', '.join(map(repr, names))}")
            return
        rows, first = file.metadata.num_rows, 0
        for group in range(file.metadata.num_row_groups):
            row, after = first, first + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(ROWS, row_groups=[group], columns=[field]):
                    for value in batch.column(0):
                        row += 1
                        yield _cell(value, f"{path}:row {row}", field, size * row // rows)
            except unreadable as error:
                yield Bad(f"{path}:row {row + 1}", f"invalid Parquet from here to row {after} ({_line(error)})")
            first = after


def _cell(value: object, place: str, field: str, position: int) -> Document | Bad:
    """A row's document; `value` is a scalar of Arrow."""
    try:
        text = value.as_py()  # type: ignore[attr-defined]
    except UnicodeDecodeError as error:
        return Bad(place, f"invalid UTF-8 ({error.reason})")
    if not isinstance(text, str):
        return Bad(place, f"a {type(text).__name__} in the column {field!r} in place of a text")
    return Document(text, position)


def _line(error: Exception) -> str:
    """What an error of Arrow says, which may be several lines, in one."""
    return " ".join(str(error).split())


ROWS = 256
"""Rows of a .parquet that are in memory at once."""

READERS = {".txt": _read_txt, ".md": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
KINDS = ", ".join(READERS)
