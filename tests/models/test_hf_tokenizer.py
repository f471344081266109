"""What `mics export --names hf` writes beside the weights gives transformers the tokens of the training."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from mics_models.data import load, standard_library
from mics_models.data.prepare import Settings as Preparing
from mics_models.data.prepare import prepare
from mics_models.hf_checkpoint import names
from mics_models.training.settings import DataSettings, ModelSettings, Settings, flatten
from text_files import TEXTS, jsonl

TEXT = "größer und größer. document 7\n\tif x <= 3:  # ÿ, 日本\n"


def written(folder: Path, model: str, data: str) -> Path:
    told = Settings(model=ModelSettings(model, config={"vocab": 300}), data=DataSettings(folder=data))
    _, files = names({"settings": dict(flatten(told))})
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())
    return folder


@pytest.mark.parametrize("model", ["byte-tiny", "bert-tiny"])
@pytest.mark.parametrize("vocab", [0, 256, 290])
def test_transformers_reads_the_tokens_of_the_training(tmp_path: Path, vocab: int, model: str) -> None:
    data = ""
    if vocab:
        data = str(tmp_path / "data")
        prepare([jsonl(tmp_path / "a.jsonl", TEXTS)], Path(data), Preparing(held_out=4, vocab=vocab))
    corpus = load(Path(data)) if data else standard_library()
    theirs = transformers.AutoTokenizer.from_pretrained(written(tmp_path / "hf", model, data))
    expected = corpus.encode(TEXT).tolist()
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == theirs.encode(TEXT) == expected
    assert theirs.decode(expected) == TEXT
    assert theirs.bos_token_id == theirs.eos_token_id == corpus.start
    assert theirs.mask_token_id == corpus.mask
    assert len(theirs) == corpus.vocab
    assert theirs.decode([corpus.start, *expected], skip_special_tokens=True) == TEXT
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.bos_token_id == config.eos_token_id == corpus.start
    starts = torch.tensor([corpus.start])
    assert theirs.decode(starts) == theirs.eos_token


def test_a_line_says_what_to_copy_where_the_data_is_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(tmp_path / "hf", "byte-tiny", str(tmp_path / "gone"))
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert "eos_token_id" not in json.loads((folder / "config.json").read_text())
    said = capsys.readouterr().err
    assert said.startswith("hf: no tokenizer is written, because data: ")
    assert said.endswith(f"export where {tmp_path / 'gone'} is, or copy its tokenizer.json beside config.json\n")
    assert said.count("\n") == 1
