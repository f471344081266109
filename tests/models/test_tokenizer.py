import argparse
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st

from mics_models.data.tokenizer import MASK, START, Tokenizer, from_json, load_tokenizer, pieces, train

SOURCE = Path(argparse.__file__).read_text()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train([SOURCE], 600)


@given(text=st.text())
def test_any_text_survives_its_tokens(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokens.dtype == torch.int64
    assert not set(tokens.tolist()) & {tokenizer.start, tokenizer.mask}


def test_a_trained_tokenizer_is_always_the_same_and_shortens_its_text(tokenizer: Tokenizer) -> None:
    assert train([SOURCE], 600).content == tokenizer.content
    assert tokenizer.vocab == 600
    assert len(tokenizer.encode(SOURCE)) < 0.5 * len(SOURCE)


def test_a_text_cannot_forge_a_special_token(tokenizer: Tokenizer) -> None:
    text = f"a{START}b {MASK}"
    assert not set(tokenizer.encode(text).tolist()) & {tokenizer.start, tokenizer.mask}
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(torch.tensor([tokenizer.start])) == START


def test_a_loaded_tokenizer_is_the_file_byte_for_byte(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer.content)
    loaded = load_tokenizer(path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.start, loaded.mask, loaded.vocab) == (tokenizer.start, tokenizer.mask, tokenizer.vocab)
    assert torch.equal(loaded.encode(SOURCE), tokenizer.encode(SOURCE))
    path.write_bytes(tokenizer.content + b"\n")
    assert load_tokenizer(path).fingerprint != tokenizer.fingerprint


def test_nothing_is_cut_off_or_filled_up(tokenizer: Tokenizer) -> None:
    model = tokenizers.Tokenizer.from_str(tokenizer.content.decode())
    model.enable_truncation(3)
    model.enable_padding(length=100)
    limited = from_json(model.to_str().encode(), START, "limited")
    assert limited.encode_batch(["some words, more than three tokens", "a"]) == tokenizer.encode_batch(
        ["some words, more than three tokens", "a"]
    )


@given(text=st.text(alphabet="ab \n\t.", max_size=60), size=st.integers(1, 20))
def test_pieces_make_up_the_text(text: str, size: int) -> None:
    cut = list(pieces(text, size))
    assert "".join(cut) == text
    assert max(map(len, cut)) <= size


def test_pieces_have_the_tokens_of_the_whole(tokenizer: Tokenizer) -> None:
    whole = tokenizer.model.encode(SOURCE, add_special_tokens=False).ids
    for size in (200, 333, 10_000):
        cut = list(pieces(SOURCE, size))
        assert len(cut) >= len(SOURCE) // size
        assert [token for ids in tokenizer.encode_batch(cut) for token in ids] == whole


def test_what_is_no_usable_tokenizer_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got a vocabulary of 200, expected at least 258, for every byte and two"):
        train([SOURCE], 200)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x.json cannot be read \(.*\), expected a tokenizer.json: name one"):
        load_tokenizer(tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"mine has no token '<s>' to begin documents with: name one that it has"):
        from_json(tokenizer.content, "<s>", "mine")


def test_a_missing_package_is_one_sentence(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'tokenizers is not installed, .*: run pip install "mics-models\[data'
    ):
        from_json(tokenizer.content, START, "mine")
