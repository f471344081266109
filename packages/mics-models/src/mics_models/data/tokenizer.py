"""Byte-level BPE: training, loading and use of a tokenizer of the `tokenizers` package.

A tokenizer is its tokenizer.json, byte for byte: all files of tokens that it made have the fingerprint of those bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mics_models.data.extras import extra

START = "<|endoftext|>"
MASK = "<|mask|>"
MASKS = (MASK, "[MASK]", "<mask>")
"""What tokenizers call the token that hides another; the first that is there counts."""

PIECE = 1 << 16
"""Characters that are encoded at once: the memory of a tokenizer grows with them, and a document may be long."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to tokens and back.

    What a text says is never read as a special token, so nothing but `start` begins a document; and nothing is cut off
    or filled up, whatever the tokenizer.json says about lengths.
    """

    content: bytes  # of tokenizer.json
    start: int
    mask: int | None
    vocab: int
    model: Any  # tokenizers.Tokenizer, ready to use; do not change it

    @property
    def fingerprint(self) -> bytes:
        """The SHA-256 of tokenizer.json."""
        return hashlib.sha256(self.content).digest()

    def encode(self, text: str) -> Tensor:
        """The tokens of a text, int64 [tokens], without a start."""
        return torch.tensor([token for ids in self.encode_batch(list(pieces(text))) for token in ids], dtype=torch.long)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, computed on all cores; cut long texts into `pieces`, or this takes much memory."""
        # The fast one leaves out where each token was in the text, and takes half the time.
        return [encoding.ids for encoding in self.model.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens, where special tokens have their names; tokens beyond the vocabulary have no text."""
        text: str = self.model.decode(tokens.tolist(), skip_special_tokens=False)
        return text


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """The text in pieces of at most `size` characters, which have the same tokens as the whole.

    That holds where a piece can end before a line's end and the white space around it, at which byte-level BPE cuts
    anyway. A line of more than `size` characters is cut within, which may cost it a token.
    """
    begin = 0
    while len(text) - begin > size:
        line = text.rfind("\n", begin, begin + size)
        end = begin + len(text[begin : max(line, begin)].rstrip())
        end = end if end > begin else begin + size
        yield text[begin:end]
        begin = end
    yield text[begin:]


def train(texts: Iterable[str], vocab: int) -> Tokenizer:
    """A tokenizer of at most `vocab` tokens, made for these texts: fewer where they give no more. Always the same."""
    tokenizers = extra("tokenizers")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    if vocab < len(alphabet) + 2:
        raise ValueError(
            f"tokenizer: got a vocabulary of {vocab}, expected at least {len(alphabet) + 2}, for every byte and two "
            "special tokens: raise it, or `prepare` with --vocab 256, where tokens are the bytes"
        )
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[START, MASK], initial_alphabet=sorted(alphabet), show_progress=False
    )
    model.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    return from_json(model.to_str().encode(), START, "the trained tokenizer")


def load_tokenizer(path: Path, start: str = START) -> Tokenizer:
    """The tokenizer of a tokenizer.json, where the token `start` begins each document."""
    return from_json(path.read_bytes(), start, str(path))


def from_json(content: bytes, start: str, name: str) -> Tokenizer:
    """The tokenizer that `content` describes; errors call it `name`."""
    tokenizers = extra("tokenizers")
    try:
        model = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # it raises no narrower one
        raise ValueError(f"tokenizer: {name} cannot be read ({error}), expected a tokenizer.json: name one") from error
    model.encode_special_tokens = True  # the text of a special token is text
    model.no_truncation()
    model.no_padding()
    numbers = model.get_vocab(with_added_tokens=True)
    if start not in numbers:
        raise ValueError(
            f"tokenizer: {name} has no token {start!r} to begin documents with: name one that it has with --start-token"
        )
    masks = [numbers[mask] for mask in MASKS if mask in numbers]
    return Tokenizer(content, numbers[start], masks[0] if masks else None, max(numbers.values()) + 1, model)
