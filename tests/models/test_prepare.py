import json
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest

from mics_models.data import Sampler, load
from mics_models.data.__main__ import main
from mics_models.data.corpus import is_held_out
from mics_models.data.prepare import Settings, prepare
from mics_models.data.tokenizer import START, Tokenizer, train
from text_files import TEXTS, documents, jsonl, parquet


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mics_models.data.prepare.PART", 1)  # each input is a part


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(train(TEXTS, 300).content)
    return path


@pytest.fixture
def settings(tokenizer_file: Path) -> Settings:
    return Settings(held_out=4, tokenizer=tokenizer_file)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    for number in range(4):
        jsonl(folder / f"{number}.jsonl", TEXTS[15 * number : 15 * number + 15])
    return folder


def test_every_document_is_there_once_whole_in_order_and_on_its_side(tmp_path: Path, settings: Settings) -> None:
    folder = tmp_path / "txt"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02}.txt").write_text(text)
    kinds = {
        "txt": folder,
        "jsonl": jsonl(tmp_path / "a.jsonl", TEXTS),
        "parquet": parquet(tmp_path / "a.parquet", list(TEXTS), row_group_size=7),
    }
    for kind, path in kinds.items():
        out = tmp_path / f"from {kind}"
        manifest = prepare([path], out, settings)
        train_documents, held_out = documents(out)
        assert train_documents == [text for text in TEXTS if not is_held_out(text.encode(), 4)]
        assert held_out == [text for text in TEXTS if is_held_out(text.encode(), 4)]
        counts = [manifest.total(side) for side in ("train", "held_out")]
        corpus = load(out)
        assert [count.tokens for count in counts] == [len(corpus.train), len(corpus.held_out)]
        assert [count.documents for count in counts] == [len(train_documents), len(held_out)]
        assert (corpus.train_files, corpus.held_out_files) == (len(train_documents), len(held_out))
        assert corpus.encode(TEXTS[3]).tolist() == corpus.encode(corpus.decode(corpus.encode(TEXTS[3]))).tolist()
        tokens, targets = Sampler(corpus.train, seq=16, batch=4, seed=0).micro_batch(0)
        assert tokens.max() < corpus.vocab
        assert tokens[:, 1:].equal(targets[:, :-1])


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_the_end_of_each_text_is_held_out_where_no_whole_one_would_be(
    tmp_path: Path, settings: Settings, count: int, kind: str
) -> None:
    candidates = [f"{number}: to be or not to be, größer und größer\n" * 400 for number in range(20)]
    texts = [text for text in candidates if not is_held_out(text.encode(), 4)][:count]
    paths = [tmp_path / f"a.{kind}"]
    if kind == "txt":
        paths = [tmp_path / f"{number}{'.md' if number % 2 else '.txt'}" for number in range(count)]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text)
    elif kind == "jsonl":
        jsonl(paths[0], texts)
    else:
        parquet(paths[0], list(texts))
    said: list[str] = []
    prepare(paths, tmp_path / "out", settings, said.append)
    assert said[0] == "too few documents to hold a whole one out: the last 1/4 of each is held out"
    for kept, ends, text in zip(*documents(tmp_path / "out"), texts, strict=True):
        assert kept + ends == text
        assert len(ends) == len(text) // 4
    prepare(paths, tmp_path / "out", settings, said.append)
    assert said[-1].startswith(f"0 of {len(paths)} parts to make")
    more = tmp_path / "more.txt"
    more.write_text(next(text for text in TEXTS if is_held_out(text.encode(), 4)))
    with pytest.raises(
        ValueError, match="was begun with too few documents to hold whole ones out, got enough, expected the same"
    ):
        prepare([*paths, more], tmp_path / "out", settings)


def test_a_tokenizer_is_not_trained_on_ends_that_are_held_out(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("to be or not to be\n" * 750 + "qxqxqx" * 790)
    prepare([path], tmp_path / "out", Settings(held_out=4, vocab=300))
    words = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]
    assert "be" in words
    assert not [word for word in words if "qx" in word]


def test_small_files_share_a_part(
    tmp_path: Path, inputs: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(path.stat().st_size for path in inputs.iterdir())
    monkeypatch.setattr("mics_models.data.prepare.PART", size // 3)
    prepare([inputs], tmp_path / "shared", settings)
    assert [path.name for path in sorted((tmp_path / "shared" / "train").iterdir())] == ["00000.tokens", "00001.tokens"]
    monkeypatch.setattr("mics_models.data.prepare.PART", 1)
    prepare([inputs], tmp_path / "alone", settings)
    assert documents(tmp_path / "shared") == documents(tmp_path / "alone")


def test_long_documents_and_many_are_encoded_in_small_batches(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    encode = Tokenizer.encode_batch

    def watched(self: Tokenizer, texts: list[str]) -> list[list[int]]:
        sizes.append(sum(map(len, texts)))
        return encode(self, texts)

    monkeypatch.setattr("mics_models.data.prepare.BATCH", 100_000)
    monkeypatch.setattr(Tokenizer, "encode_batch", watched)
    texts = ["a few words on a line\n" * 20_000, *TEXTS * 50]
    prepare([jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "out", settings)
    train_documents, held_out = documents(tmp_path / "out")
    assert sorted(train_documents + held_out) == sorted(texts)
    assert sum(sizes) == 440_000 + 50 * sum(map(len, TEXTS))
    assert max(sizes) < 100_000 + (1 << 16)


def test_what_cannot_be_read_is_refused_before_any_work(tmp_path: Path, inputs: Path, settings: Settings) -> None:
    (tmp_path / "a.csv").touch()
    (tmp_path / "empty").mkdir()
    for name, error, sentence in [
        ("a.csv", ValueError, r"a\.csv is no \.txt, \.md, \.jsonl, \.parquet file, expected one of these: convert it"),
        ("b.txt", FileNotFoundError, r"b\.txt does not exist, expected a file or a folder: correct the name"),
        (
            "empty",
            ValueError,
            r"the folder .*empty has no \.txt, \.md, \.jsonl, \.parquet file, expected some: name another",
        ),
        ("in/0.jsonl", ValueError, r"0\.jsonl and .*0\.jsonl are one file, expected each once: name it once"),
    ]:
        with pytest.raises(error, match=sentence):
            prepare([inputs, tmp_path / name], tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="got --held-out 1, expected at least 2"):
        Settings(held_out=1)


def test_what_is_bad_ends_the_work_unless_it_may_be_skipped(tmp_path: Path, inputs: Path, settings: Settings) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "first"}\n' + "nonsense\n" * 30 + '{"text": "last"}\n')
    out, skipping = tmp_path / "out", Settings(held_out=4, tokenizer=settings.tokenizer, skip_bad=True)
    stopped = r"bad\.jsonl:2: got invalid JSON .*, expected a document: correct it, or skip all such with --skip-bad"
    with pytest.raises(ValueError, match=stopped):
        prepare([inputs, path], out, settings)
    part = prepare([inputs, path], out, skipping).parts["00004"]
    assert part.bad == 30
    assert [line.split(": ")[0] for line in part.listed] == [f"{path}:{number}" for number in range(2, 22)]
    assert sum(map(len, documents(out))) == 60 + 2
    with pytest.raises(ValueError, match=stopped):  # what was skipped once is not forgotten
        prepare([inputs, path], out, settings)


def test_a_tokenizer_is_trained_on_its_share_of_what_is_not_held_out(
    tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def watched(texts: Iterator[str], vocab: int) -> Tokenizer:
        seen[:] = texts
        return train(seen, vocab)

    monkeypatch.setattr("mics_models.data.prepare.train", watched)
    manifest = prepare([inputs], tmp_path / "all", Settings(held_out=4, vocab=300))
    assert seen == documents(tmp_path / "all")[0]
    assert load(tmp_path / "all").vocab == 300
    assert manifest.settings["--vocab"] == 300
    size = sum(path.stat().st_size for path in inputs.iterdir())
    monkeypatch.setattr("mics_models.data.prepare.TRAINED_ON", size // 3)
    prepare([inputs], tmp_path / "part", Settings(held_out=4, vocab=300))
    assert len(TEXTS) / 6 < len(seen) < len(TEXTS) / 2
    assert {TEXTS.index(text) // 15 for text in seen} == {0, 1, 2, 3}  # some of each input
    for number, text in enumerate(TEXTS):  # an input is read whole or not at all
        (inputs / f"{number}.jsonl").unlink(missing_ok=True)
        (inputs / f"{number:02}.txt").write_text(text)
    monkeypatch.setattr("mics_models.data.prepare.TRAINED_ON", sum(map(len, TEXTS)) // 3)
    prepare([inputs], tmp_path / "files", Settings(held_out=4, vocab=300))
    assert len(TEXTS) / 6 < len(seen) < len(TEXTS) / 2


def test_a_corpus_without_a_held_out_document_is_refused(tmp_path: Path, settings: Settings) -> None:
    for texts in (["", ""], ["a"]):
        with pytest.raises(
            ValueError, match=r"has 0 tokens of text to train on and [01] held out, expected some of each"
        ):
            prepare([jsonl(tmp_path / "a.jsonl", texts)], tmp_path / f"out of {len(texts)}", settings)
    with pytest.raises(ValueError, match=r"nothing in the inputs, such as \S*b\.jsonl, expected text: name others"):
        prepare([jsonl(tmp_path / "b.jsonl", [])], tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_what_is_no_prepared_folder_is_refused(tmp_path: Path, inputs: Path, settings: Settings) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no manifest.json, expected a folder that .* made: name one"):
        load(tmp_path)
    out = tmp_path / "out"
    prepare([inputs], out, settings)
    manifest = json.loads((out / "manifest.json").read_bytes())
    for content in (b"{", b"[]", json.dumps(manifest | {"version": 2}).encode(), b'{"version": 1}'):
        (out / "manifest.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"manifest.json cannot be read \(.*\), expected a manifest of version 1"):
            load(out)
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"tokenizer.json has the SHA-256 .*, expected .*: put back the tokenizer"):
        load(out)


def test_the_commands_prepare_show_and_verify(
    tmp_path: Path, inputs: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with (inputs / "0.jsonl").open("a") as file:
        file.write("{}\n")
    command = ["prepare", str(inputs), "--out", str(out), "--tokenizer", str(tokenizer_file), "--held-out", "4"]
    assert main(command) == 1
    assert "0.jsonl:16: got no field 'text' among none, expected a document" in capsys.readouterr().err
    assert main([*command, "--skip-bad"]) == 0
    told = capsys.readouterr()
    assert "4 of 4 parts to make" in told.out
    assert "skipped 1 bad documents, of which the first:\n  " in told.out
    assert "0.jsonl:16: no field 'text' among none\n" in told.out
    assert "encoding: 100 %" in told.err
    assert main(["verify", str(out)]) == 0
    assert main(["show", str(out)]) == 0
    told = capsys.readouterr()
    assert "everything is as it was written" in told.out
    assert f"300 tokens in the vocabulary, made with --field text --held-out 4 --start-token {START}" in told.out
    assert f"{START}{documents(out)[0][0]}" in told.out
    for path in (out / "held_out" / "00003.tokens", out / "train" / "00000.tokens"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    assert main(["verify", str(out)]) == 1
    told = capsys.readouterr()
    assert "2 damaged files" in told.out
    assert [name in told.err for name in ("train/00000.tokens", "held_out/00003.tokens", "00001")] == [
        True,
        True,
        False,
    ]


def test_an_interrupt_leaves_the_command_with_one_sentence(
    tmp_path: Path, inputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tokenizer, "encode_batch", interrupted)
    assert main(["prepare", str(inputs), "--out", str(tmp_path / "out"), "--vocab", "300"]) == 130
    assert capsys.readouterr().err.endswith("data: interrupted; the same prepare goes on where this one was\n")


def test_a_terminal_gets_a_bar(
    tmp_path: Path, inputs: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    prepare([inputs], tmp_path / "out", settings)
    assert "encoding" in terminal.getvalue()
    assert "100%" in terminal.getvalue()
