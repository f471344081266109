import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from mics_models.data.inputs import Bad, Document, find, read
from text_files import TEXTS, jsonl, parquet


def bad_inputs(folder: Path) -> Iterator[tuple[Path, str, int]]:
    """Files with something bad, what is said about it, and how many documents are good."""
    lines = {
        b'{"text": "a"': r"invalid JSON \(Expecting ',' delimiter at character 13\)",
        b"": r"invalid JSON \(Expecting value at character 1\)",
        b'{"text": "\xff"}': r"invalid UTF-8 \(invalid start byte at byte 11\)",
        b'{"text": "\\ud800"}': "half a surrogate pair in the field 'text'",
        b'["a"]': "a list in place of an object",
        b'{"texts": "a", "b": 1}': "no field 'text' among 'texts', 'b'",
        b'{"text": null}': "a NoneType in the field 'text' in place of a text",
        b"[" * 100_000: r"invalid JSON \(nested too deeply\)",
        b"1" * 5000: "Exceeds the limit",
    }
    for number, (line, reason) in enumerate(lines.items()):
        path = folder / f"{number}.jsonl"
        path.write_bytes(b'{"text": "first"}\n' + line + b'\n{"text": "third"}\n')
        yield path, rf"{number}\.jsonl:2: {reason}", 2
    path = folder / "a.txt"
    path.write_bytes(b"one\ntwo\nthr\xff\xfe\n")
    yield path, r"a\.txt:3: invalid UTF-8 \(invalid start byte\)", 0
    yield parquet(folder / "null.parquet", ["a", None, "c"]), r"null\.parquet:row 2: a NoneType in the column", 2
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"a", b"\xff"]).buffers())
    yield parquet(folder / "utf.parquet", broken), r"utf\.parquet:row 2: invalid UTF-8 \(invalid start byte\)", 1
    path = folder / "column.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"texts": ["a"]}), path)
    yield path, r"column\.parquet: no column 'text' among 'texts'", 0
    path = folder / "short.parquet"
    path.write_bytes(b"PAR1")
    yield path, r"short\.parquet: invalid Parquet", 0
    path = parquet(folder / "page.parquet", TEXTS[:30], row_group_size=10, use_dictionary=False, compression="gzip")
    content = bytearray(path.read_bytes())
    chunk = pyarrow.parquet.read_metadata(path).row_group(1).column(1)
    begin = chunk.data_page_offset
    content[begin : begin + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(content)
    yield path, r"page\.parquet:row 11: invalid Parquet from here to row 20", 20


def test_what_is_bad_is_told_with_its_place_and_what_follows_is_read(tmp_path: Path) -> None:
    for path, sentence, good in bad_inputs(tmp_path):
        items = list(read(path, "text"))
        (bad,) = [item for item in items if isinstance(item, Bad)]
        told = f"{bad.place}: {bad.reason}"
        assert re.search(sentence, told), told
        assert "\n" not in told
        assert len(items) == 1 + good


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_documents_say_how_far_the_file_is_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    {"jsonl": jsonl, "parquet": parquet}[kind](path, TEXTS)
    items = [item for item in read(path, "text") if isinstance(item, Document)]
    assert [item.text for item in items] == TEXTS
    positions = [0, *(item.position for item in items)]
    assert positions == sorted(positions)
    assert positions[-1] == path.stat().st_size


def test_folders_give_what_can_be_read_in_them_in_order(tmp_path: Path) -> None:
    for name in ("b/c.txt", "a.jsonl", "b/a.parquet", "b/README", "z.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find([tmp_path])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.jsonl", "b/a.parquet", "b/c.txt"]
