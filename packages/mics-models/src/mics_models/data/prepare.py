"""From files of text to files of tokens, a part at a time.

A part is one input file, or some small ones together. Its two files of tokens are complete before the manifest lists
it, so a run that was interrupted, by whatever, is taken up by the same command where it was: parts that are there, of
input files that have not changed since, are not made again. Memory holds a batch of documents, and the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from mics_models.data.byte_tokens import Bytes
from mics_models.data.corpus import HELD_OUT_SHARE, VOCAB, is_held_out
from mics_models.data.inputs import Bad, Document, find, read
from mics_models.data.prepared import (
    MANIFEST,
    SIDES,
    TOKENIZER,
    Count,
    Manifest,
    Part,
    Source,
    file_of,
    load,
    open_part,
    read_tokenizer,
)
from mics_models.data.progress import progress
from mics_models.data.replacing import replacing
from mics_models.data.token_files import writing
from mics_models.data.tokenizer import START, Tokenizer, load_tokenizer, pieces, train

PART = 256 << 20
"""Bytes of input after which a part ends; it ends with a whole file."""
TRAINED_ON = 1 << 30
"""Bytes of input that a tokenizer is trained on, at most; all inputs give the same share."""
BATCH = 1 << 21
"""Characters that are encoded at once."""
LISTED = 20
"""So many bad documents are told one by one."""

Plan = Mapping[str, tuple[Source, ...]]  # a part's name -> what it is made of


@dataclass(frozen=True)
class Settings:
    """What the command line sets."""

    field: str = "text"
    held_out: int = HELD_OUT_SHARE
    vocab: int = 32000
    tokenizer: Path | None = None
    start_token: str = START
    skip_bad: bool = False
    ends: bool = False  # the end of each document is held out, in place of whole ones: `prepare` finds out

    def __post_init__(self) -> None:
        if self.held_out < 2:
            raise ValueError(f"data: got --held-out {self.held_out}, expected at least 2: one document in so many")
        if self.start_token != START and self.tokenizer is None:
            raise ValueError(
                f"data: got --start-token {self.start_token} without --tokenizer, expected both or neither: what is "
                "made here has a start of its own"
            )

    @property
    def byte_level(self) -> bool:
        """Whether each byte is a token."""
        return self.tokenizer is None and self.vocab == VOCAB

    def sides(self, text: str) -> Iterator[tuple[str, str]]:
        """What is on which side of a document's text: all of it on one, or a part on either."""
        if not self.ends:
            yield SIDES[is_held_out(text.encode(), self.held_out)], text
            return
        end = max(1, len(text) // self.held_out)
        yield from zip(SIDES, (text[:-end], text[-end:]), strict=True)


def prepare(paths: Sequence[Path], out: Path, settings: Settings, say: Callable[[str], None] = print) -> Manifest:
    """Make the folder `out` of these files and folders, or go on with it, and return its manifest."""
    plan = _planned(find(paths))
    if not _size(plan):
        raise ValueError(f"data: there is nothing in the inputs, such as {paths[0]}, expected text: name others")
    if _on_one_side(plan, settings):
        say(f"too few documents to hold a whole one out: the last 1/{settings.held_out} of each is held out")
        settings = replace(settings, ends=True)
    for side in SIDES:
        (out / side).mkdir(parents=True, exist_ok=True)
    begin = _resume if (out / MANIFEST).exists() else _begin
    manifest, tokenizer = begin(plan, out, settings, say)
    manifest.write(out)
    todo = {name: sources for name, sources in plan.items() if name not in manifest.parts}
    say(f"{len(todo)} of {len(plan)} parts to make, {_size(todo) / 1e6:,.1f} of {_size(plan) / 1e6:,.1f} MB of input")
    with progress("encoding", _size(todo)) as advance:
        for name, sources in todo.items():
            parts = {**manifest.parts, name: _make(out, name, sources, tokenizer, settings, advance)}
            manifest = replace(manifest, parts=dict(sorted(parts.items())))
            manifest.write(out)
    load(out)  # it refuses what cannot be trained on
    return manifest


def _on_one_side(plan: Plan, settings: Settings) -> bool:
    """Whether all documents would be trained on, or all be held out. What is bad is told when it is encoded."""
    seen: set[str] = set()
    looking = replace(settings, skip_bad=True)
    for source in (source for sources in plan.values() for source in sources):
        for document in _documents(source, looking, _Skipped()):
            seen.update(side for side, _ in settings.sides(document.text))
            if len(seen) > 1:
                return False
    return len(seen) == 1


def _planned(paths: Iterable[Path]) -> Plan:
    """Cut the inputs into parts, in their order."""
    parts: list[list[Source]] = []
    size = PART
    for path in paths:
        status = path.stat()
        if size >= PART:
            parts.append([])
            size = 0
        parts[-1].append(Source(str(path), status.st_size, status.st_mtime_ns))
        size += status.st_size
    return {f"{number:05}": tuple(part) for number, part in enumerate(parts)}


def _size(plan: Plan) -> int:
    return sum(source.size for sources in plan.values() for source in sources)


def _recorded(settings: Settings, tokenizer: str | None) -> dict[str, str | int | None]:
    """The settings that decide which tokens come out."""
    return {
        "--field": settings.field,
        "--held-out": f"{settings.held_out} (the end of each)" if settings.ends else settings.held_out,
        "--vocab": None if tokenizer else settings.vocab,
        "--start-token": None if settings.byte_level else settings.start_token,
        "--tokenizer": tokenizer,
    }


def _given(settings: Settings) -> Tokenizer | None:
    return load_tokenizer(settings.tokenizer, settings.start_token) if settings.tokenizer else None


def _begin(plan: Plan, out: Path, settings: Settings, say: Callable[[str], None]) -> tuple[Manifest, Tokenizer | Bytes]:
    """A new folder's tokenizer, and a manifest without parts."""
    given = _given(settings)
    tokenizer = Bytes() if settings.byte_level else given
    if tokenizer is None:
        say(f"training a tokenizer of {settings.vocab} tokens on {min(_size(plan), TRAINED_ON) / 1e6:,.1f} MB of input")
        with progress("reading", _size(plan)) as advance:
            tokenizer = train(_training_texts(plan, settings, advance), settings.vocab)
    with replacing(out / TOKENIZER) as file:
        file.write(tokenizer.content)
    recorded = _recorded(settings, given.fingerprint.hex() if given else None)
    return Manifest(recorded, tokenizer.fingerprint.hex(), len(plan), {}), tokenizer


def _resume(
    plan: Plan, out: Path, settings: Settings, say: Callable[[str], None]
) -> tuple[Manifest, Tokenizer | Bytes]:
    """A folder's own tokenizer, and its manifest with the parts that need not be made again."""
    manifest, given = Manifest.read(out), _given(settings)
    for flag, value in _recorded(settings, given.fingerprint.hex() if given else None).items():
        if (begun := manifest.settings[flag]) != value:
            was, now = (f"no {flag}" if it is None else f"{flag} {it}" for it in (begun, value))
            if flag == "--held-out" and str(begun).split()[0] == str(settings.held_out):  # the inputs decide the rest
                was, now = ("enough", "too few") if settings.ends else ("too few", "enough")
                was += " documents to hold whole ones out"
            raise ValueError(
                f"data: {out} was begun with {was}, got {now}, expected the same: repeat that, or choose another --out"
            )
    named = {source.path for sources in plan.values() for source in sources}
    for source in (source for part in manifest.parts.values() for source in part.sources):
        if source.path not in named:
            raise ValueError(
                f"data: {out} holds tokens of {source.path}, which is not named now, expected all that it holds: name "
                "it, too, or choose another --out"
            )
    parts = {}
    for name, sources in plan.items():
        part = manifest.parts.get(name)
        if part is None or part.sources != sources or (part.bad and not settings.skip_bad):
            continue
        try:
            for side in SIDES:
                open_part(out, manifest, name, side)
        except (ValueError, FileNotFoundError) as error:
            say(f"part {name} is made again: {error}")
        else:
            parts[name] = part
    return replace(manifest, planned=len(plan), parts=parts), read_tokenizer(out, manifest)


def _training_texts(plan: Plan, settings: Settings, advance: Callable[[int], None]) -> Iterator[str]:
    """What a tokenizer is trained on: from each input its share, and nothing that is held out."""
    share = min(1.0, TRAINED_ON / max(1, _size(plan)))
    passed = taken = 0  # bytes of input
    for source in (source for sources in plan.values() for source in sources):
        passed += source.size
        before = taken
        for document in _documents(source, settings, _Skipped()) if taken < share * passed else ():
            yield from (text for side, text in settings.sides(document.text) if side == SIDES[0])
            taken = before + document.position
            if taken >= share * passed:
                break
        advance(source.size)


@dataclass
class _Skipped:
    count: int = 0
    listed: tuple[str, ...] = ()

    def add(self, line: str) -> None:
        self.count += 1
        self.listed = (*self.listed, line)[:LISTED]


def _documents(source: Source, settings: Settings, skipped: _Skipped) -> Iterator[Document]:
    """What is in an input; what is bad ends the work, unless it may be skipped."""
    for item in read(Path(source.path), settings.field):
        if isinstance(item, Document) and settings.byte_level and "\0" in item.text:
            item = Bad(f"{source.path}, before byte {item.position}", "a zero byte, which begins documents")
        if isinstance(item, Document):
            yield item
        elif settings.skip_bad:
            skipped.add(f"{item.place}: {item.reason}")
        else:
            raise ValueError(
                f"data: {item.place}: got {item.reason}, expected a document: correct it, or skip all such with "
                "--skip-bad"
            )


@dataclass(frozen=True)
class _Piece:
    side: str
    begins: bool  # a document
    text: str


def _make(
    out: Path,
    name: str,
    sources: tuple[Source, ...],
    tokenizer: Tokenizer | Bytes,
    settings: Settings,
    advance: Callable[[int], None],
) -> Part:
    """Write a part's files of tokens."""
    documents = dict.fromkeys(SIDES, 0)
    skipped = _Skipped()

    def all_pieces() -> Iterator[_Piece]:
        for source in sources:
            position = 0
            for document in _documents(source, settings, skipped):
                for side, text in settings.sides(document.text):
                    documents[side] += 1
                    for number, piece in enumerate(pieces(text)):
                        yield _Piece(side, number == 0, piece)
                advance(document.position - position)
                position = document.position
            advance(source.size - position)

    with ExitStack() as stack:
        writers = {
            side: stack.enter_context(writing(file_of(out, name, side), tokenizer.vocab, tokenizer.fingerprint))
            for side in SIDES
        }
        for batch in _batches(all_pieces()):
            encoded = tokenizer.encode_batch([piece.text for piece in batch])
            for piece, tokens in zip(batch, encoded, strict=True):
                writers[piece.side].append([tokenizer.start, *tokens] if piece.begins else tokens)
    train_count, held_out = (Count(writers[side].count, documents[side]) for side in SIDES)
    return Part(sources, train_count, held_out, skipped.count, skipped.listed)


def _batches(all_pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for piece in all_pieces:
        batch.append(piece)
        size += len(piece.text) + 1  # so that empty documents end a batch, too
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch
