"""A folder of prepared data: what its manifest says, and its use.

manifest.json              what was made of which files, with which settings
tokenizer.json
train/00000.tokens         a part: consecutive input files, a start token before each document
held_out/00000.tokens      the part's documents that are held out
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mics_models.data.byte_tokens import Bytes
from mics_models.data.corpus import Corpus
from mics_models.data.replacing import replacing
from mics_models.data.token_files import SUFFIX, Stream, TokenFile
from mics_models.data.tokenizer import Tokenizer, from_json

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
VERSION = 1
SIDES = ("train", "held_out")


@dataclass(frozen=True)
class Source:
    """An input file as it was when it was read."""

    path: str
    size: int
    changed: int  # nanoseconds


@dataclass(frozen=True)
class Count:
    """What a file of tokens holds."""

    tokens: int
    documents: int


@dataclass(frozen=True)
class Part:
    """What was made of some consecutive input files: one file of tokens for each side."""

    sources: tuple[Source, ...]
    train: Count
    held_out: Count
    bad: int  # documents that were skipped
    listed: tuple[str, ...]  # where the first of them are, and why

    def count(self, side: str) -> Count:
        """What is on one of the sides."""
        return {"train": self.train, "held_out": self.held_out}[side]


@dataclass(frozen=True)
class Manifest:
    """What a folder holds. It lists a part once both its files are complete."""

    settings: Mapping[str, str | int | None]  # a flag of the command line -> its value
    tokenizer: str  # fingerprint, hexadecimal
    planned: int  # parts, when all is done
    parts: Mapping[str, Part]

    def write(self, folder: Path) -> None:
        """Put it in the place of the manifest that the folder has."""
        with replacing(folder / MANIFEST) as file:
            file.write(json.dumps({"version": VERSION} | asdict(self), indent=1).encode())

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The manifest of a folder."""
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"data: {folder} has no {MANIFEST}, expected a folder that `python -m mics_models.data prepare` made: "
                "name one"
            )
        try:
            content = json.loads(path.read_bytes())
            if content["version"] != VERSION:
                raise ValueError(f"its version is {content['version']}")
            parts = {name: _part(part) for name, part in content["parts"].items()}
            return Manifest(content["settings"], content["tokenizer"], content["planned"], parts)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"data: {path} cannot be read ({error!r}), expected a manifest of version {VERSION}: prepare the data "
                "again in another folder"
            ) from error

    def total(self, side: str) -> Count:
        """What all parts have on one of the sides."""
        counts = [part.count(side) for part in self.parts.values()]
        return Count(sum(count.tokens for count in counts), sum(count.documents for count in counts))


def _part(content: Mapping[str, Any]) -> Part:
    sources = tuple(Source(**source) for source in content["sources"])
    train, held_out = (Count(**content[side]) for side in SIDES)
    return Part(sources, train, held_out, content["bad"], tuple(content["listed"]))


def file_of(folder: Path, name: str, side: str) -> Path:
    """Where a part's tokens of one side are."""
    return folder / side / f"{name}{SUFFIX}"


def open_part(folder: Path, manifest: Manifest, name: str, side: str) -> TokenFile:
    """A part's tokens of one side, if they are those of the manifest."""
    file = TokenFile.open(file_of(folder, name, side))
    found = (file.header.count, file.header.tokenizer.hex())
    expected = (manifest.parts[name].count(side).tokens, manifest.tokenizer)
    if found != expected:
        raise ValueError(
            f"data: {file.path} has {found[0]} tokens of tokenizer {found[1][:8]}, expected {expected[0]} of "
            f"{expected[1][:8]}: run the same prepare again"
        )
    return file


def read_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer | Bytes:
    """The tokenizer that made the folder's tokens."""
    path = folder / TOKENIZER
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != manifest.tokenizer:
        raise ValueError(
            f"data: {path} has the SHA-256 {found}, expected {manifest.tokenizer}: put back the tokenizer that made "
            "the tokens"
        )
    if content == Bytes().content:
        return Bytes()
    return from_json(content, str(manifest.settings["--start-token"]), str(path))


def _complete(folder: Path) -> Manifest:
    """The manifest of a folder that is all there."""
    manifest = Manifest.read(folder)
    if len(manifest.parts) != manifest.planned:
        raise ValueError(
            f"data: {folder} has {len(manifest.parts)} parts, expected {manifest.planned}, because its preparation was "
            "interrupted: run the same prepare again, it goes on"
        )
    return manifest


def load(folder: Path) -> Corpus:
    """The corpus that `python -m mics_models.data prepare --out FOLDER` made: mapped, so memory holds none of it."""
    manifest = _complete(folder)
    tokenizer = read_tokenizer(folder, manifest)
    train, held_out = (
        Stream(tuple(open_part(folder, manifest, name, side) for name in manifest.parts)) for side in SIDES
    )
    counts = [manifest.total(side) for side in SIDES]
    texts = [count.tokens - count.documents for count in counts]  # each document begins with a token of its own
    if not all(texts):
        raise ValueError(
            f"data: {folder} has {texts[0]} tokens of text to train on and {texts[1]} held out, expected some of each: "
            "prepare more text, or hold out a larger share with --held-out, in another folder"
        )
    return Corpus(
        train,
        held_out,
        counts[0].documents,
        counts[1].documents,
        vocab=tokenizer.vocab,
        start=tokenizer.start,
        mask=tokenizer.mask,
        encode=tokenizer.encode,
        decode=tokenizer.decode,
    )


def verify(folder: Path) -> Iterator[str]:
    """Read all of a folder, and say what is damaged, a sentence each."""
    manifest = _complete(folder)
    try:
        read_tokenizer(folder, manifest)
    except (ValueError, FileNotFoundError) as error:
        yield str(error)
    for name in manifest.parts:
        for side in SIDES:
            try:
                open_part(folder, manifest, name, side).verify()
            except (ValueError, FileNotFoundError) as error:
                yield str(error)
