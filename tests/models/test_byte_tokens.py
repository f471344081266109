"""Prepared data whose tokens are bytes, which the default model trains on, and what `prepare` says at its end."""

import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mics_models.data import encode, load
from mics_models.data.__main__ import main
from mics_models.data.byte_tokens import Bytes
from mics_models.data.corpus import is_held_out
from mics_models.data.prepare import Settings, prepare
from mics_models.data.prepared import verify
from mics_models.training.batches import Batches, configure
from mics_models.training.settings import read
from text_files import TEXTS, jsonl

BYTES = Settings(held_out=4, vocab=256)


@given(text=st.text(st.characters(exclude_characters="\0", codec="utf-8")))
def test_any_text_survives_its_bytes_and_has_no_special_one(text: str) -> None:
    tokens = Bytes().encode(text)
    assert Bytes().encode_batch([text]) == [tokens.tolist()] == [list(text.encode())]
    assert Bytes().decode(tokens) == text
    assert not {Bytes().start, Bytes().mask} & set(tokens.tolist())


def test_each_byte_is_a_token_and_a_zero_begins_each_document(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare([jsonl(tmp_path / "a.jsonl", TEXTS)], out, BYTES)
    corpus = load(out)
    assert (corpus.vocab, corpus.start, corpus.mask) == (256, 0, 255)
    for side, held_out in ((corpus.train, False), (corpus.held_out, True)):
        kept = [text.encode() for text in TEXTS if is_held_out(text.encode(), 4) is held_out]
        assert bytes(side[:].tolist()) == b"".join(b"\0" + text for text in kept)
    assert corpus.encode("größer").equal(encode("größer"))
    assert list(verify(out)) == []
    prepare([tmp_path / "a.jsonl"], out, BYTES)  # goes on where there is nothing left to do
    with pytest.raises(ValueError, match="was begun with --vocab 256, got --vocab 300, expected the same"):
        prepare([tmp_path / "a.jsonl"], out, Settings(held_out=4, vocab=300))


def test_a_text_with_a_zero_byte_is_bad_where_tokens_are_bytes(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*TEXTS, "a\0b"])
    with pytest.raises(ValueError, match=r"a\.jsonl, before byte \d+: got a zero byte, which begins documents"):
        prepare([path], tmp_path / "out", BYTES)
    manifest = prepare([path], tmp_path / "out", Settings(held_out=4, vocab=256, skip_bad=True))
    assert [part.bad for part in manifest.parts.values()] == [1]


def test_a_start_token_without_a_tokenizer_that_has_it_is_refused() -> None:
    with pytest.raises(ValueError, match="got --start-token <s> without --tokenizer, expected both or neither"):
        Settings(start_token="<s>")


@pytest.mark.parametrize("vocab", [256, 300])
def test_the_command_that_prepare_ends_with_trains_on_what_it_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], vocab: int
) -> None:
    out = tmp_path / "a folder"
    source = jsonl(tmp_path / "a.jsonl", [4 * text for text in TEXTS])
    assert main(["prepare", str(source), "--out", str(out), "--vocab", str(vocab), "--held-out", "4"]) == 0
    said = capsys.readouterr().out
    assert f"{vocab} tokens in the vocabulary" in said
    command = shlex.split(said.splitlines()[-1])
    assert command[:5] == ["torchrun", "--nproc-per-node", "4", "-m", "mics_models.pretrain"]
    told = read(None, command[5:])
    batches = Batches(told, configure(told.model), load(Path(told.data.folder)), rank=3, world=4)
    assert batches.training(0, 0)["tokens"].max() < configure(told.model).vocab == vocab
