import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mics_models.data import load
from mics_models.data.prepare import Settings, prepare
from mics_models.data.prepared import verify
from mics_models.data.tokenizer import Tokenizer, train
from text_files import TEXTS, contents, jsonl


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


def made(out: Path, *arguments: object) -> list[str]:
    """The parts that a run makes."""
    before = {path: path.stat().st_mtime_ns for path in out.glob("train/*")}
    prepare(*arguments)
    return sorted(path.stem for path in out.glob("train/*") if path.stat().st_mtime_ns != before.get(path))


def test_an_interrupted_run_goes_on_and_ends_where_one_that_was_not_does(
    tmp_path: Path, inputs: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, encode, calls = tmp_path / "out", Tokenizer.encode_batch, iter(range(100))

    def interrupted(self: Tokenizer, texts: list[str]) -> list[list[int]]:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare([inputs], out, settings)
    assert not list(out.rglob("*.partial"))
    for use in (load, lambda folder: list(verify(folder))):
        with pytest.raises(ValueError, match="out has 2 parts, expected 4, because its preparation was interrupted"):
            use(out)
    assert made(out, [inputs], out, settings) == ["00002", "00003"]
    prepare([inputs], tmp_path / "whole", settings)
    assert contents(out) == contents(tmp_path / "whole")
    assert made(out, [inputs], out, settings) == []


def test_a_killed_run_goes_on_and_ends_where_one_that_was_not_does(tmp_path: Path, inputs: Path) -> None:
    # Killed when a file of tokens is complete but has not its name yet.
    code = f"""
import os, signal, sys
from mics_models.data import __main__, prepare
prepare.PART, calls, fsync = 1, iter(range(100)), os.fsync
os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == 6 else fsync(file)
__main__.main({["prepare", str(inputs), "--out", str(tmp_path / "out"), "--vocab", "300", "--held-out", "4"]!r})
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert list((tmp_path / "out").rglob("*.partial"))
    trained = Settings(held_out=4, vocab=300)
    assert made(tmp_path / "out", [inputs], tmp_path / "out", trained) == ["00001", "00002", "00003"]
    prepare([inputs], tmp_path / "whole", trained)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("side", ["train", "held_out"])
@pytest.mark.parametrize("damage", ["missing", "cut", "another's"])
def test_a_part_whose_file_is_not_right_is_made_again(
    tmp_path: Path, inputs: Path, settings: Settings, side: str, damage: str
) -> None:
    out = tmp_path / "out"
    prepare([inputs], out, settings)
    right = contents(out)
    path = out / side / "00001.tokens"
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.write_bytes((out / side / "00000.tokens").read_bytes())
    with pytest.raises((ValueError, FileNotFoundError), match=r"00001\.tokens"):
        load(out)
    told: list[str] = []
    prepare([inputs], out, settings, told.append)
    assert contents(out) == right
    assert told[0].startswith("part 00001 is made again: ")
    assert told[1].startswith("1 of 4 parts to make, ")


def test_only_what_changed_or_is_new_is_made_again(tmp_path: Path, inputs: Path, settings: Settings) -> None:
    out = tmp_path / "out"
    prepare([inputs], out, settings)
    jsonl(inputs / "2.jsonl", TEXTS[:20])
    jsonl(inputs / "9.jsonl", TEXTS[:3])
    assert made(out, [inputs], out, settings) == ["00002", "00004"]
    prepare([inputs], tmp_path / "whole", settings)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_folder_is_gone_on_with_only_by_the_command_that_began_it(
    tmp_path: Path, inputs: Path, settings: Settings
) -> None:
    out = tmp_path / "out"
    prepare([inputs], out, settings)
    before = contents(out)
    for other, sentence in [
        (
            Settings(held_out=8, tokenizer=settings.tokenizer),
            "was begun with --held-out 4, got --held-out 8, expected the same",
        ),
        (
            Settings(held_out=4, tokenizer=settings.tokenizer, field="x"),
            "was begun with --field text, got --field x, expected",
        ),
        (Settings(held_out=4, vocab=300), "was begun with no --vocab, got --vocab 300, expected"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            prepare([inputs], out, other)
    with pytest.raises(ValueError, match=r"holds tokens of .*0\.jsonl, which is not named now, expected all that it"):
        prepare([inputs / "1.jsonl"], out, settings)
    assert contents(out) == before
