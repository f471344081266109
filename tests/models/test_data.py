import hashlib
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mics_models.data import Corpus, Sampler, decode, encode, standard_library
from mics_models.data.corpus import FILE_START, SKIPPED, is_held_out, sources
from mics_models.data.sampler import _shuffled

STREAM = torch.arange(1000)  # each token is its own place, so that a batch shows where it came from


def documents(stream: torch.Tensor) -> set[bytes]:
    return {hashlib.sha256(part).digest() for part in bytes(stream.tolist()).split(bytes([FILE_START]))[1:]}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return standard_library()


def library(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_the_corpus_is_this_pythons_library_cut_into_disjoint_files(corpus: Corpus) -> None:
    train, held_out = documents(corpus.train), documents(corpus.held_out)
    assert not train & held_out
    content = Path(hashlib.__file__).read_bytes()
    assert hashlib.sha256(content).digest() in (held_out if is_held_out(content) else train)
    assert corpus.train.dtype == torch.uint8
    assert len(corpus.train) > 4e6
    assert 0.02 < len(corpus.held_out) / len(corpus.train) < 0.15


def test_the_corpus_is_the_same_every_time(corpus: Corpus) -> None:
    again = standard_library()
    assert torch.equal(again.train, corpus.train)
    assert torch.equal(again.held_out, corpus.held_out)


def test_the_sources_are_the_librarys_modules_alone_and_in_order() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).as_posix() for path in sources(root)]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    tops = {Path(name).parts[0] for name in names}
    assert not tops & (SKIPPED | {"site-packages", "dist-packages"})
    assert not [name for name in names if "/test/" in name or "/tests/" in name]


def test_a_file_stays_on_its_side_whatever_else_there_is(tmp_path: Path) -> None:
    files = {f"json/{number}.py": f"# {number}\n" for number in range(100)}
    whole = standard_library(library(tmp_path / "whole", files))
    part = standard_library(library(tmp_path / "part", dict(list(files.items())[20:])))
    assert documents(part.train) < documents(whole.train)
    assert documents(part.held_out) <= documents(whole.held_out)


def test_no_more_memory_is_taken_than_allowed(corpus: Corpus) -> None:
    small = standard_library(limit=1_000_000)
    assert 900_000 < len(small.train) + len(small.held_out) <= 1_000_000
    assert torch.equal(small.train, corpus.train[: len(small.train)])


def test_a_folder_without_a_library_is_refused(tmp_path: Path) -> None:
    library(tmp_path, {"mine.py": "x = 1\n"})
    with pytest.raises(ValueError, match=r"found 0 files to train on and 0 to hold out in .*, expected some of each"):
        standard_library(tmp_path)


def test_text_survives_its_tokens() -> None:
    text = "def größe(): ...\n"
    assert decode(encode(text)) == text
    assert encode(text).dtype == torch.uint8
    assert decode(torch.tensor([100, 50256, 101])) == "d\N{REPLACEMENT CHARACTER}e"


def test_a_corpus_knows_its_tokens(corpus: Corpus) -> None:
    assert corpus.vocab == 256
    assert corpus.train[0] == corpus.held_out[0] == corpus.start
    assert corpus.train_files == (corpus.train == corpus.start).sum()
    assert corpus.held_out_files == (corpus.held_out == corpus.start).sum()
    assert not (corpus.train == corpus.mask).any()
    assert corpus.decode(corpus.encode("größe")) == "größe"


def test_targets_are_the_tokens_that_follow() -> None:
    tokens, targets = Sampler(STREAM, seq=7, batch=4, seed=0).micro_batch(3)
    assert tokens.shape == targets.shape == (4, 7)
    assert tokens.dtype == torch.int64
    assert torch.equal(targets, tokens + 1)
    assert torch.equal(tokens, tokens[:, :1] + torch.arange(7))


def test_the_same_global_batch_for_every_world_and_number_of_micro_steps() -> None:
    whole = Sampler(STREAM, seq=7, batch=12, seed=5).micro_batch(9)[0]
    for world, micro_steps in [(1, 2), (2, 1), (2, 3), (3, 4), (4, 3), (12, 1)]:
        shares = [
            Sampler(STREAM, seq=7, batch=12, seed=5).micro_batch(9, micro_step, micro_steps, rank, world)[0]
            for micro_step in range(micro_steps)
            for rank in range(world)
        ]
        assert torch.equal(torch.cat(shares), whole)


def test_ranks_and_micro_steps_share_the_numbers_of_a_step_and_no_number_comes_twice() -> None:
    sampler = Sampler(STREAM, seq=7, batch=12, seed=5)
    for world, micro_steps in [(1, 1), (1, 2), (2, 3), (4, 3), (12, 1)]:
        numbers = [
            number
            for step in (9, 10)
            for micro_step in range(micro_steps)
            for rank in range(world)
            for number in sampler.samples(step, micro_step, micro_steps, rank, world)
        ]
        assert numbers == list(range(9 * 12, 11 * 12))


def test_a_micro_batch_is_made_of_the_samples_that_are_numbered() -> None:
    sampler = Sampler(STREAM, seq=7, batch=12, seed=5)
    place = (9, 1, 2, 1, 3)
    tokens = sampler.micro_batch(*place)[0]
    assert tokens[:, 0].tolist() == [sampler.start(number) for number in sampler.samples(*place)]


def test_the_sampler_knows_only_seed_and_step() -> None:
    used = Sampler(STREAM, seq=7, batch=4, seed=5)
    batches = [used.micro_batch(step)[0] for step in range(100)]
    torch.manual_seed(123)  # torch's own randomness plays no part
    for step in (99, 0, 41):
        assert torch.equal(Sampler(STREAM, seq=7, batch=4, seed=5).micro_batch(step)[0], batches[step])
    assert not torch.equal(Sampler(STREAM, seq=7, batch=4, seed=6).micro_batch(0)[0], batches[0])


def test_an_epoch_shows_each_window_once_and_the_next_others_in_another_order() -> None:
    sampler = Sampler(STREAM, seq=7, batch=1, seed=0)
    epochs = [[sampler.start(epoch * sampler.windows + n) for n in range(sampler.windows)] for epoch in range(3)]
    for starts in epochs:
        assert sorted(starts) == list(range(min(starts), min(starts) + 7 * sampler.windows, 7))
        assert sorted(starts) != starts
    assert len({min(starts) for starts in epochs}) > 1
    assert len({tuple(start // 7 for start in starts) for starts in epochs}) == 3


@given(tokens=st.integers(14, 60), seq=st.integers(1, 7), seed=st.integers(0, 2**40), sample=st.integers(0, 10**9))
def test_every_sample_lies_inside_the_stream(tokens: int, seq: int, seed: int, sample: int) -> None:
    sampler = Sampler(STREAM[:tokens], seq, batch=1, seed=seed)
    assert 0 <= sampler.start(sample) < tokens - seq  # with one token more, the last target


@given(size=st.integers(1, 300), key=st.integers(0, 2**40))
def test_the_shuffle_is_a_permutation_of_any_size(size: int, key: int) -> None:
    assert sorted(_shuffled(index, size, (key,)) for index in range(size)) == list(range(size))


def test_batches_that_cannot_be_shared_evenly_are_refused() -> None:
    sampler = Sampler(STREAM, seq=7, batch=6, seed=0)
    with pytest.raises(ValueError, match="a batch of 6 samples cannot be cut evenly over 2 micro-steps of 2 ranks"):
        sampler.micro_batch(0, 0, 2, 0, 2)
    with pytest.raises(ValueError, match="got micro-step 0 and rank 2, expected them below 1 and 2"):
        sampler.micro_batch(0, 0, 1, 2, 2)
    with pytest.raises(ValueError, match="got 1000 tokens, expected at least 1200"):
        Sampler(STREAM, seq=600, batch=6, seed=0)
    with pytest.raises(ValueError, match="got seq 7 and batch 0, expected at least 1"):
        Sampler(STREAM, seq=7, batch=0, seed=0)
