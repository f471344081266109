"""The corpus that is on every machine: the sources of Python's standard library, one token per byte.

A zero byte, which no Python source contains, begins each file, so a model also learns how files begin and end. Whether
a file is trained on or held out depends on its content alone: copies of a file are all on the same side, and a file
stays on its side whatever else the library contains.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mics_models.data.token_files import Tokens

VOCAB = 256
FILE_START = 0
NO_TEXT = 255
"""The byte that no UTF-8 contains: it masks."""
HELD_OUT_SHARE = 16
"""One file in this many is held out."""

SKIPPED = frozenset({"encodings", "idle_test", "lib2to3", "pydoc_data", "test", "tests"})
"""Generated tables, and what many installations of Python leave out: so the corpus is nearly the same everywhere."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """What a model trains on and is measured on, with all that is to be known about its tokens."""

    train: Tokens
    held_out: Tokens
    train_files: int  # or documents, where a file holds many
    held_out_files: int
    vocab: int  # each token is below it
    start: int  # the token that begins each document
    mask: int | None  # the token that hides another from a masked language model, if there is one
    encode: Callable[[str], Tensor]  # text -> [tokens] of any integer dtype, without a start
    decode: Callable[[Tensor], str]


def sources(library: Path) -> list[Path]:
    """The standard library's modules under `library` in a fixed order, without site-packages and without tests."""
    tops = [entry for entry in library.iterdir() if entry.stem in sys.stdlib_module_names - SKIPPED]
    paths = [entry for entry in tops if entry.suffix == ".py"]
    paths += [path for entry in tops if entry.is_dir() for path in entry.rglob("*.py")]
    kept = [path for path in paths if not SKIPPED.intersection(path.relative_to(library).parts) and path.is_file()]
    return sorted(kept, key=lambda path: path.relative_to(library).as_posix())


def is_held_out(content: bytes, share: int = HELD_OUT_SHARE) -> bool:
    """Which side of the split a file or document is on, where one in `share` is held out."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") % share == 0


def standard_library(library: Path | None = None, limit: int = 64 << 20) -> Corpus:
    """The corpus of `library` (default: this Python's own): a byte a token, and at most `limit` bytes of memory.

    Files are read one at a time, and the first that would go beyond the limit ends the reading.
    """
    library = Path(sysconfig.get_path("stdlib")) if library is None else library
    streams = {False: bytearray(), True: bytearray()}  # held out? -> its tokens
    files = {False: 0, True: 0}
    for path in sources(library):
        if len(streams[False]) + len(streams[True]) + path.stat().st_size + 1 > limit:
            break
        content = path.read_bytes()
        side = is_held_out(content)
        streams[side].append(FILE_START)
        streams[side] += content
        files[side] += 1
    if not files[False] or not files[True]:
        raise ValueError(
            f"corpus: found {files[False]} files to train on and {files[True]} to hold out in {library}, expected some "
            "of each: name the folder of a Python installation that has the library's sources, or raise the limit"
        )
    train, held_out = (torch.frombuffer(streams[side], dtype=torch.uint8) for side in (False, True))
    return Corpus(train, held_out, files[False], files[True], VOCAB, FILE_START, NO_TEXT, encode, decode)


def encode(text: str) -> Tensor:
    """The tokens of a text."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def decode(tokens: Tensor) -> str:
    """The text of tokens; what is no byte, or no UTF-8, becomes replacement characters."""
    # A model with a larger vocabulary may draw tokens beyond 255.
    return bytes(min(token, NO_TEXT) for token in tokens.tolist()).decode(errors="replace")
