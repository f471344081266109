"""A byte a token: nothing is trained, and the byte-level models read it as it is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mics_models.data import corpus


@dataclass(frozen=True)
class Bytes:
    """What a `Tokenizer` does, with the tokens of the standard library's corpus. Texts must have no zero byte."""

    content: bytes = b'{"tokens": "bytes"}\n'  # of tokenizer.json
    start: int = corpus.FILE_START
    mask: int = corpus.NO_TEXT
    vocab: int = corpus.VOCAB

    @property
    def fingerprint(self) -> bytes:
        """The SHA-256 of tokenizer.json."""
        return hashlib.sha256(self.content).digest()

    def encode(self, text: str) -> Tensor:
        """The bytes of a text, uint8 [tokens], without a start."""
        return corpus.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The bytes of each text."""
        return [list(text.encode()) for text in texts]

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens."""
        return corpus.decode(tokens)
