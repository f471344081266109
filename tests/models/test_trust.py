"""Nothing that is read runs code: files with pickles in the place of what a reader expects are refused, or text."""

import contextlib
import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from mics_models.data import load, open_tokens
from mics_models.data.inputs import read as read_documents
from mics_models.data.prepare import Settings, prepare
from mics_models.data.prepared import verify
from mics_models.data.tokenizer import load_tokenizer
from mics_models.hf import open_safetensors
from mics_models.training import journal, settings
from shapes import LATER
from text_files import TEXTS, jsonl


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("made",)


def evils() -> dict[str, bytes]:
    file = io.BytesIO()
    torch.save(Evil(), file)
    return {"pickle": pickle.dumps(Evil()), "text": pickle.dumps(Evil(), 0) + b"\n", "torch": file.getvalue()}


READERS: dict[str, Callable[[Path], object]] = {
    "data/manifest.json": lambda folder: load(folder / "data"),
    "data/tokenizer.json": lambda folder: load(folder / "data"),
    "data/train/00000.tokens": lambda folder: (list(verify(folder / "data")), open_tokens(folder / "data" / "train")),
    "settings.toml": lambda folder: settings.read(folder / "settings.toml", ()),
    "log.jsonl": journal.read,
    "tokenizer.json": lambda folder: load_tokenizer(folder / "tokenizer.json"),
    "model.safetensors": lambda folder: open_safetensors(folder, LATER),
    "model.safetensors.index.json": lambda folder: open_safetensors(folder, LATER),
} | {
    f"a{kind}": lambda folder, kind=kind: list(read_documents(folder / f"a{kind}", "text"))  # type: ignore[misc]
    for kind in (".txt", ".md", ".jsonl", ".parquet")
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made of text")
    prepare([jsonl(folder / "a.jsonl", TEXTS)], folder / "data", Settings(held_out=4, vocab=290))
    return folder / "data"


@pytest.mark.parametrize("evil", evils().values(), ids=evils())
@pytest.mark.parametrize("name", READERS)
def test_a_pickle_in_the_place_of_a_file_is_not_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, evil: bytes
) -> None:
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / name).write_bytes(evil)
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(Exception):
        READERS[name](tmp_path)
    assert not (tmp_path / "made").exists()
    assert pickle.loads(pickle.dumps(Evil())) is None, "the pickle is one that would have"
    assert (tmp_path / "made").exists()


def test_a_pickle_inside_a_parquet_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hidden = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Evil())}
    schema = pyarrow.schema([pyarrow.field("text", pyarrow.string(), metadata=hidden)])
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}, schema), tmp_path / "a.parquet")
    assert [document.text for document in read_documents(tmp_path / "a.parquet", "text")] == TEXTS  # type: ignore[union-attr]
    assert not (tmp_path / "made").exists()
