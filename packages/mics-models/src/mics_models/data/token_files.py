"""Tokens on disk: a header that says what they are, then the tokens, in a file that is mapped and never read whole.

    offset  bytes
         0      8  magic
         8      4  version
        12      4  bytes of a token: 2 up to a vocabulary of 65,536, else 4
        16      8  vocabulary: each token is below it
        24      8  number of tokens
        32     32  SHA-256 of the tokens
        64     32  fingerprint of the tokenizer that made them
        96     32  SHA-256 of the 96 bytes before
       128         the tokens, unsigned

All numbers are little-endian. Opening a file checks its header and its size, which costs nothing; `verify` reads all of
it and checks the tokens, too.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from mics_models.data.replacing import replacing

MAGIC = b"mics-tok"
VERSION = 1
FIELDS = struct.Struct("<8sIIQQ32s32s")
HEADER = FIELDS.size + 32  # and the header's own checksum
SUFFIX = ".tokens"


class Tokens(Protocol):
    """A stream of tokens, cut by slices: a tensor of them, or a `Stream` of files."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class Header:
    """What a file of tokens says about itself."""

    vocab: int
    count: int
    checksum: bytes  # of the tokens
    tokenizer: bytes  # fingerprint

    def __post_init__(self) -> None:
        if sys.byteorder != "little":
            raise ValueError("token files: this machine is big-endian, expected a little-endian one: use another")

    @property
    def width(self) -> int:
        """Bytes of a token."""
        return width(self.vocab)

    def pack(self) -> bytes:
        """The header's bytes."""
        fields = FIELDS.pack(MAGIC, VERSION, self.width, self.vocab, self.count, self.checksum, self.tokenizer)
        return fields + hashlib.sha256(fields).digest()

    @staticmethod
    def unpack(content: bytes, path: Path) -> Header:
        """The header in the first bytes of the file `path`."""
        if len(content) < HEADER:
            raise ValueError(
                f"token files: {path} has {len(content)} bytes, expected a header of {HEADER}: prepare it again"
            )
        fields = content[: FIELDS.size]
        magic, version, found_width, vocab, count, checksum, tokenizer = FIELDS.unpack(fields)
        if magic != MAGIC:
            raise ValueError(f"token files: {path} begins with {magic!r}, expected {MAGIC!r}: name a file of tokens")
        if version != VERSION:
            raise ValueError(
                f"token files: {path} has version {version}, expected {VERSION}: prepare it again with this release"
            )
        if hashlib.sha256(fields).digest() != content[FIELDS.size : HEADER] or found_width != width(vocab):
            raise ValueError(f"token files: the header of {path} is damaged, expected its checksum: prepare it again")
        return Header(vocab, count, checksum, tokenizer)


def width(vocab: int) -> int:
    """Bytes of a token of a vocabulary."""
    return 2 if vocab <= 1 << 16 else 4


class TokenWriter:
    """Appends to one file; it holds no tokens in memory."""

    def __init__(self, file: BinaryIO, vocab: int) -> None:
        self.count = 0
        self.vocab = vocab
        self.digest = hashlib.sha256()
        self._file = file

    def append(self, tokens: Sequence[int]) -> None:
        """Write these tokens behind those before them."""
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.vocab:
            raise ValueError(
                f"token files: got tokens from {min(tokens)} to {max(tokens)}, expected them from 0 and below the "
                f"vocabulary of {self.vocab}: encode with the tokenizer that the file is for"
            )
        content = array("H" if width(self.vocab) == 2 else "I", tokens).tobytes()
        self.digest.update(content)
        self._file.write(content)
        self.count += len(tokens)


@contextmanager
def writing(path: Path, vocab: int, tokenizer: bytes) -> Iterator[TokenWriter]:
    """A writer of the file `path`, which is there once the block has ended, and not after an exception."""
    with replacing(path) as file:
        file.seek(HEADER)
        writer = TokenWriter(file, vocab)
        yield writer
        file.seek(0)
        file.write(Header(vocab, writer.count, writer.digest.digest(), tokenizer).pack())


@dataclass(frozen=True, eq=False)
class TokenFile:
    """One file, open and mapped: memory holds only what is being read of it. Do not write to its tokens."""

    path: Path
    header: Header
    tokens: Tensor  # uint16 or uint32 [count]

    @staticmethod
    def open(path: Path) -> TokenFile:
        """Map a file, after a check of its header and size."""
        with path.open("rb") as file:
            header = Header.unpack(file.read(HEADER), path)
        size, expected = path.stat().st_size, HEADER + header.count * header.width
        if size != expected:
            raise ValueError(
                f"token files: {path} has {size} bytes, expected {expected} for its {header.count} tokens: prepare it "
                "again"
            )
        try:
            # Not shared: a write would reach this process's copy of a page, never the file.
            content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        except RuntimeError as error:  # Linux may refuse to map a file that is larger than memory and swap
            raise ValueError(
                f"token files: {path} cannot be mapped ({error}), expected room for {size} bytes: prepare its input in "
                "smaller files"
            ) from error
        dtype = torch.uint16 if header.width == 2 else torch.uint32
        return TokenFile(path, header, content[HEADER:].view(dtype))

    def verify(self) -> None:
        """Read the whole file, and raise if its tokens are not those that were written."""
        with self.path.open("rb") as file:
            file.seek(HEADER)
            found = hashlib.file_digest(file, "sha256").digest()
        if found != self.header.checksum:
            raise ValueError(
                f"token files: the tokens of {self.path} have the SHA-256 {found.hex()}, expected "
                f"{self.header.checksum.hex()}: they are damaged, prepare them again"
            )


@dataclass(frozen=True, eq=False)
class Stream:
    """Several files as one stream of tokens, in their order."""

    files: tuple[TokenFile, ...]

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("token files: got no files, expected at least one: name some, or a folder that has some")
        first = self.files[0]
        for file in self.files[1:]:
            if (file.header.vocab, file.header.tokenizer) != (first.header.vocab, first.header.tokenizer):
                raise ValueError(
                    f"token files: {file.path} and {first.path} come from different tokenizers, expected one: prepare "
                    "them together"
                )

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(file.header.count for file in self.files))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, place: slice) -> Tensor:
        """A slice without a step, int64; only its own pages are read."""
        begin, end, step = place.indices(len(self))
        if step != 1:
            raise ValueError(f"token files: got a slice with step {step}, expected 1: take every token, then choose")
        pieces = [torch.empty(0, dtype=torch.int64)]
        number = bisect_right(self._ends, begin)
        while begin < end:
            stop = min(end, self._ends[number])
            file = self.files[number]
            offset = self._ends[number] - file.header.count
            pieces.append(file.tokens[begin - offset : stop - offset].long())
            begin, number = stop, number + 1
        return torch.cat(pieces)


def open_tokens(source: Path | Sequence[Path]) -> Stream:
    """The tokens of these files, or of a folder's files in the order of their names."""
    paths = sorted(source.glob(f"*{SUFFIX}")) if isinstance(source, Path) else source
    return Stream(tuple(TokenFile.open(path) for path in paths))
