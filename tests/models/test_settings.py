"""What a run is told: files, changes on the command line, and what is said of mistakes."""

import pickle
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mics_models.data import Corpus, decode, encode
from mics_models.training.batches import Batches, configure
from mics_models.training.settings import ModelSettings, Settings, explained, flatten, read, to_toml

EXAMPLES = Path(__file__).parents[2] / "examples"


@st.composite
def told(draw: st.DrawFn) -> Settings:
    """Settings with some keys changed to other legal values."""
    changes: dict[str, Any] = {}
    if draw(st.booleans()):
        changes["output"] = draw(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
    for name in ("batch", "optimizer", "schedule", "log"):
        section = getattr(Settings(), name)
        for each in fields(section):
            default = getattr(section, each.name)
            if draw(st.booleans()) and type(default) is int:
                section = replace(section, **{each.name: draw(st.integers(1, 10**9))})
            elif draw(st.booleans()) and type(default) is float:
                section = replace(section, **{each.name: draw(st.floats(1e-9, 1))})
        changes[name] = section
    if draw(st.booleans()):
        config = draw(st.dictionaries(st.sampled_from(["layers", "width"]), st.integers(1, 99)))
        changes["model"] = ModelSettings(config=config)
    return Settings(**changes)


@given(told())
def test_what_is_written_is_what_is_read(told: Settings) -> None:
    assert through_file(to_toml(told)) == told


def through_file(text: str, *changes: str) -> Settings:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "told.toml"
        file.write_text(text)
        return read(file, changes)


def test_every_key_is_written_once_and_has_a_default() -> None:
    keys = [key for key, _ in flatten(Settings())]
    assert len(keys) == len(set(keys)) > 30
    assert not any(is_dataclass(value) for _, value in flatten(Settings()))


def test_the_command_line_goes_over_the_file() -> None:
    file = '[batch]\nseq = 64\nsamples = 4\n[model]\nname = "bert-tiny"\n'
    found = through_file(file, "batch.seq=32", "optimizer.lr=1", "model.config.layers=3", "output=2024-06-01 7")
    assert (found.batch.seq, found.batch.samples, found.model.name) == (32, 4, "bert-tiny")
    assert found.optimizer.lr == 1.0
    assert isinstance(found.optimizer.lr, float)
    assert found.output == "2024-06-01 7"
    assert configure(found.model).layers == 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("batch.sequence=3", r"batch.sequence is unknown, did you mean batch.seq\?"),
        ("schedule.lr=3", r"schedule.lr is unknown, did you mean optimizer.lr\?"),
        ("model.every=3", r"did you mean evaluation.every or checkpoint.every or log.every\?"),
        ("model.layers=3", r"model.layers is unknown, did you mean model.config.layers\?"),
        ("layers=3", r"layers is unknown, did you mean model.config.layers\?"),
        ("shedule.steps=3", r"shedule is unknown, did you mean schedule\?"),
        ("batch=3", "batch is 3, expected a table of keys"),
        ("batch.seq=short", "batch.seq is 'short', expected a value like 128: write a whole number"),
        ("batch.seq=1.5", "batch.seq is 1.5, expected a value like 128"),
        ("model.compile=1", "model.compile is 1, expected a value like False"),
        ("batch.seq.more=1", "batch.seq is {'more': 1}, expected a value like 128"),
        ("seq", "got 'seq', expected table.key=value"),
        ("batch.seq=0", "batch.seq is 0, expected more than 0"),
        ("schedule.minutes=-1", "schedule.minutes is -1.0, expected 0 or more"),
        ("schedule.warmup=2", "schedule.warmup is 2.0, expected a share from 0 to 1"),
        ("schedule.kind=linear", r"schedule.kind is 'linear', expected one of \('cosine', 'wsd'\)"),
        ("checkpoint.resume=true", "checkpoint.resume is 'true', expected one of"),
        ("checkpoint.resume=always", "expected the folder of the run to go on with"),
        ("evaluation.prompt=", "evaluation.prompt empty"),
        ("data.masked=0", "data.masked is 0"),
        ("optimizer.beta1=-1", "optimizer.beta1 is -1.0, expected from 0 to below 1"),
        ("optimizer.beta2=1", "optimizer.beta2 is 1.0, expected from 0 to below 1"),
        ("optimizer.beta2=inf", "optimizer.beta2 is inf, expected a number that a machine can count with"),
        ("optimizer.eps=-1", "optimizer.eps is -1.0, expected 0 or more"),
        ("optimizer.eps=nan", "optimizer.eps is nan, expected a number that a machine can count with"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay is -1.0, expected 0 or more"),
        ("optimizer.lr=inf", "optimizer.lr is inf, expected a number that a machine can count with"),
        ("output=a\0b", r"output is 'a\\x00b', expected a path, without a zero byte"),
        ("seed=-1", "seed is -1, expected 0 or more"),
        ("seed=99999999999999999999", "seed is 99999999999999999999, expected a number that a machine"),
        ("schedule.steps=99999999999999999999", "schedule.steps is 9+, expected a number that a machine"),
        ("log.peak_tflops=-1", "log.peak_tflops is -1.0, expected 0 or more"),
    ],
)
def test_a_mistake_is_one_sentence_that_says_what_to_do(change: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as raised:
        read(None, [change])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"[batch\n", r"told.toml is no TOML .*, expected tables of keys"),
        (b"\xff\xfe", r"told.toml is no TOML .*, expected tables of keys"),
        (pickle.dumps({"seed": 1}), r"told.toml is no TOML .*, expected tables of keys"),
        (b"[optimiser]\nlr = 1", r"optimiser is unknown, did you mean optimizer\?"),
        (b"[optimizer]\nlearning = 1", "optimizer.learning is unknown"),
        (b"steps = 3", "steps is unknown"),
        (b"batch = 3", "batch is 3, expected a table of keys"),
        (b"[[batch]]\nseq = 3", "batch is .*, expected a table of keys"),
        (b"[optimizer]\neps = nan", "optimizer.eps is nan"),
        (b"[model]\nconfig = 3", "model.config is 3, expected a value like {}: write a table"),
        (None, r"told.toml is not there, expected a file of settings"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(content: bytes | None, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "told.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as raised:
        read(file, ())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (ModelSettings("gpt-124m"), r"'gpt-124m', an unknown model, did you mean gpt2-124m\?"),
        (ModelSettings(config={"layers": "two"}), "model.config.layers is 'two', expected a value like 4"),
        (
            ModelSettings(config={"init_std": float("nan")}),
            "model.config.init_std is nan, expected a number that a machine",
        ),
        (ModelSettings(config={"init_std": -1.0}), "init_std is -1.0, expected a finite number from 0 up"),
        (ModelSettings(config={"layer": 2}), r"model.config.layer is unknown, did you mean layers\?"),
    ],
)
def test_an_unknown_model_or_key_of_its_configuration(model: ModelSettings, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        configure(model)


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_the_examples_can_be_read(example: Path) -> None:
    told = read(example, ())
    assert told.output
    config = configure(told.model)
    assert config.num_params() > 1e8
    tokens = torch.zeros(10 * told.batch.seq, dtype=torch.uint8)
    corpus = Corpus(tokens, tokens, 1, 1, config.vocab, 0, 1, encode, decode)
    world = 128 if told.model.name == "bert-10b" else 8  # as its comment says
    assert Batches(told, config, corpus, 0, world).training(0, 0)["tokens"].shape[1] == told.batch.seq


def test_the_help_explains_every_key() -> None:
    lines = [line for line in explained().splitlines() if " = " in line]
    assert len(lines) == len(list(flatten(Settings()))) - 1  # model.config is a table
    assert not [line for line in lines if "  # " not in line and not line.startswith(("lr", "beta", "eps"))]
