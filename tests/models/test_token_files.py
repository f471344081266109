import tracemalloc
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mics_models.data import Sampler, open_tokens
from mics_models.data.token_files import HEADER, TokenFile, writing

FINGERPRINT = bytes(range(32))


def write(path: Path, *batches: list[int], vocab: int = 1000, tokenizer: bytes = FINGERPRINT) -> Path:
    with writing(path, vocab, tokenizer) as writer:
        for batch in batches:
            writer.append(batch)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


@given(data=st.data(), vocab=st.sampled_from([2, 300, 65536, 65537, 2**31]))
def test_a_file_gives_back_the_tokens_that_were_written(folder: Path, data: st.DataObject, vocab: int) -> None:
    batches = data.draw(st.lists(st.lists(st.integers(0, vocab - 1), max_size=9), max_size=5))
    file = TokenFile.open(write(folder / "round.tokens", *batches, vocab=vocab))
    file.verify()
    assert file.tokens.tolist() == [token for batch in batches for token in batch]
    assert file.tokens.dtype == (torch.uint16 if vocab <= 65536 else torch.uint32)
    assert (file.header.vocab, file.header.tokenizer) == (vocab, FINGERPRINT)


def test_a_writer_holds_no_tokens_in_memory(tmp_path: Path) -> None:
    batch = [7] * 50_000
    tracemalloc.start()
    try:
        write(tmp_path / "large.tokens", *[batch] * 80)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(open_tokens(tmp_path)) == 4_000_000
    assert peak < 1_000_000


@given(
    parts=st.lists(st.lists(st.integers(0, 999), max_size=6), min_size=1, max_size=5),
    begin=st.integers(-3, 30),
    end=st.integers(-3, 30),
)
def test_a_stream_is_its_files_one_after_the_other(folder: Path, parts: list[list[int]], begin: int, end: int) -> None:
    stream = open_tokens([write(folder / f"{number}.part", part) for number, part in enumerate(parts)])
    whole = torch.tensor([token for part in parts for token in part], dtype=torch.int64)
    assert len(stream) == len(whole)
    assert stream[begin:end].dtype == torch.int64
    assert torch.equal(stream[begin:end], whole[begin:end])


def test_batches_of_files_are_those_of_one_tensor(tmp_path: Path) -> None:
    whole = torch.arange(1000) * 99  # more than 2 bytes each
    cuts = [0, *accumulate([300, 0, 7, 1, 692])]
    for number, (begin, end) in enumerate(pairwise(cuts)):
        write(tmp_path / f"{number}.tokens", whole[begin:end].tolist(), vocab=100_000)
    for step in range(20):
        batches = [Sampler(t, seq=13, batch=8, seed=3).micro_batch(step) for t in (whole, open_tokens(tmp_path))]
        assert torch.equal(batches[0][0], batches[1][0])
        assert torch.equal(batches[0][1], batches[1][1])


def test_a_file_far_larger_than_what_is_read_opens_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tokens", [1, 2, 3])
    header = TokenFile.open(path).header
    count = 1 << 30  # 2 GiB, of which the disk holds nothing
    with path.open("r+b") as file:
        file.write(type(header)(header.vocab, count, header.checksum, header.tokenizer).pack())
        file.truncate(HEADER + 2 * count)
    stream = open_tokens(tmp_path)
    assert stream[:4].tolist() == [1, 2, 3, 0]
    assert stream[count - 2 : count + 5].tolist() == [0, 0]


def test_a_file_that_cannot_be_mapped_is_told_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("Cannot allocate memory (12)")

    monkeypatch.setattr(torch, "from_file", refused)
    with pytest.raises(
        ValueError, match=r"a\.tokens cannot be mapped \(Cannot allocate .*: prepare its input in smaller"
    ):
        TokenFile.open(write(tmp_path / "a.tokens", [1, 2]))


@given(offset=st.integers(0, HEADER + 2 * 20 - 1), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found_and_the_file_named(folder: Path, offset: int, bit: int) -> None:
    path = write(folder / "flipped.tokens", list(range(20)))
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"flipped\.tokens"):
        TokenFile.open(path).verify()
    if offset < HEADER:
        with pytest.raises(ValueError, match=r"flipped\.tokens"):
            TokenFile.open(path)


@given(size=st.integers(0, HEADER + 2 * 20 + 30).filter(lambda size: size != HEADER + 2 * 20))
def test_a_file_that_is_cut_or_extended_does_not_open(folder: Path, size: int) -> None:
    path = write(folder / "cut.tokens", list(range(20)))
    content = path.read_bytes() + bytes(30)
    path.write_bytes(content[:size])
    with pytest.raises(ValueError, match=f"cut.tokens has {size} bytes, expected"):
        TokenFile.open(path)


@pytest.mark.parametrize(
    ("offset", "content", "sentence"),
    [
        (0, b"GGUF", r"x.tokens begins with b'GGUF-tok', expected b'mics-tok': name a file of tokens"),
        (8, b"\2", r"x.tokens has version 2, expected 1: prepare it again"),
        (24, b"\1", r"the header of .*x.tokens is damaged, expected its checksum: prepare it again"),
        (HEADER, b"\1", r"the tokens of .*x.tokens have the SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}: they are"),
    ],
)
def test_damage_is_told_for_what_it_is(tmp_path: Path, offset: int, content: bytes, sentence: str) -> None:
    path = write(tmp_path / "x.tokens", [0, 0])
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)
    with pytest.raises(ValueError, match=sentence):
        TokenFile.open(path).verify()


def test_a_token_beyond_the_vocabulary_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    for tokens in ([5, 10], [-1, 5]):
        with pytest.raises(
            ValueError, match=r"got tokens from .* to .*, expected them from 0 and below the vocabulary"
        ):
            write(tmp_path / "a.tokens", [1], tokens, vocab=10)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tokens", [1, 2])
    with pytest.raises(ValueError, match="got tokens from 5000"):
        write(path, [3], [5000])
    assert list(tmp_path.iterdir()) == [path]
    assert open_tokens([path])[:].tolist() == [1, 2]


def test_files_that_are_no_stream_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got no files, expected at least one"):
        open_tokens(tmp_path)
    paths = [write(tmp_path / "a", [1]), write(tmp_path / "b", [1], tokenizer=bytes(32))]
    with pytest.raises(ValueError, match=r"b and .*a come from different tokenizers, expected one: prepare them"):
        open_tokens(paths)
    with pytest.raises(ValueError, match="got a slice with step 2, expected 1"):
        open_tokens(paths[:1])[::2]
