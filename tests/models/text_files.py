"""Files of documents for the tests, and what data prepared from them holds."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet

from mics_models.data import load
from mics_models.data.tokenizer import START

TEXTS = [f"document {number}\n" + "größer und größer. " * (number % 7) for number in range(60)]


def jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts))
    return path


def parquet(path: Path, texts: list[object], **options: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"other": list(range(len(texts))), "text": texts}), path, **options)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def documents(out: Path) -> tuple[list[str], list[str]]:
    corpus = load(out)
    streams = (corpus.decode(stream[:]).split(START) for stream in (corpus.train, corpus.held_out))
    (first, *train_documents), (second, *held_out) = streams
    assert first == second == ""
    return train_documents, held_out
