"""The manifest: which files make a checkpoint, how long they are, their checksums. Without it there is no checkpoint.

Checksums are CRC-32: on the machines at hand 4.5 GB/s, where SHA-256 makes 1.3 and disks 0.3 to 2. It finds every
flipped bit and every short burst; it is no protection against an attacker.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

FORMAT = 1
MANIFEST = "manifest.json"
INDEX = ".metadata"
"""Where torch.distributed.checkpoint says what lies where."""


class Damaged(RuntimeError):
    """What a checkpoint is that cannot be loaded as it is; who knows its folder says which one can."""


@dataclass(frozen=True)
class Entry:
    """A file."""

    bytes: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """What the file says."""

    number: int
    """Counts a folder's checkpoints up, so that the oldest is known."""
    files: dict[str, Entry]
    about: dict[str, Any]
    """Ranks, sharding, precision, optimizer, loss scale, runs."""

    @property
    def runs(self) -> tuple[str, ...]:
        """The run that wrote it, after those which that one was loaded from; without a name in old ones."""
        return tuple(self.about.get("runs", ("",)))

    @property
    def run(self) -> str:
        """The run that wrote it."""
        return self.runs[-1]

    def render(self) -> bytes:
        """The file's only possible content: reading compares with it, so every changed bit is found."""
        body = {"format": FORMAT, **asdict(self)}
        checksum = zlib.crc32(json.dumps(body, sort_keys=True).encode())
        return (json.dumps({**body, "crc32": checksum}, sort_keys=True, indent=1) + "\n").encode()

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check it; Damaged if it is."""
        return cls.parse((folder / MANIFEST).read_bytes(), folder / MANIFEST)

    @classmethod
    def parse(cls, content: bytes, path: Path) -> Manifest:
        """Check what a file holds; Damaged if it is."""
        try:
            body = json.loads(content)
            version = body["format"]
            files = {name: Entry(**entry) for name, entry in body["files"].items()}
            manifest = cls(body["number"], files, body["about"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"load: {path} is damaged, expected a manifest") from error
        if version != FORMAT:
            raise RuntimeError(f"load: {path} has format {version}, expected {FORMAT}: use the mics that wrote it")
        if manifest.render() != content:
            raise Damaged(f"load: {path} is damaged, its checksum differs")
        return manifest


def measure(path: Path) -> Entry:
    """A file's length and checksum."""
    with path.open("rb", buffering=0) as file:
        return measured(file)


def measured(file: IO[bytes]) -> Entry:
    """The same of an open file."""
    length = checksum = 0
    while block := file.read(1 << 22):
        length += len(block)
        checksum = zlib.crc32(block, checksum)
    return Entry(length, checksum)
