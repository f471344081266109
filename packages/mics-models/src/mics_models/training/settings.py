"""What a run is told: a TOML file, and `table.key=value` on the command line over it.

Every key has a default here, which is what `make pretrain` runs: some minutes on two CPU cores.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from mics_models.bert import BERTConfig
from mics_models.gpt import GPTConfig

Section = TypeVar("Section")

_NUMBERS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "batch.samples batch.seq batch.micro_steps optimizer.lr schedule.steps log.every evaluation.batches "
        "checkpoint.keep",
        lambda value: value > 0,
        "more than 0",
    ),
    (
        "seed optimizer.eps optimizer.weight_decay optimizer.clip schedule.minutes evaluation.every evaluation.sampled "
        "checkpoint.every log.peak_tflops",
        lambda value: value >= 0,
        "0 or more",
    ),
    ("optimizer.beta1 optimizer.beta2", lambda value: 0 <= value < 1, "from 0 to below 1"),
    (
        "schedule.warmup schedule.decay schedule.last data.masked",
        lambda value: 0 <= value <= 1,
        "a share from 0 to 1",
    ),
)
"""Keys, which of their values can be, and that in words. A NaN fits nowhere."""


@dataclass(frozen=True)
class ModelSettings:
    """Which model."""

    name: str = "byte-tiny"  # in mics_models.GPTS or BERTS
    weights: str = ""  # to begin with: a safetensors file or a folder of them, Hugging Face's or ours; empty: drawn
    compile: bool = False  # each block, with torch.compile
    config: Mapping[str, Any] = field(default_factory=dict)  # of its configuration, what is to be different


@dataclass(frozen=True)
class DataSettings:
    """What it learns from."""

    folder: str = ""  # made by `python -m mics_models.data prepare`; empty: the sources of Python's standard library
    packed: bool = False  # tokens see no other document than their own
    masked: float = 0.15  # of the tokens, for a BERT


@dataclass(frozen=True)
class ShardingSettings:
    """Into how many pieces each state is cut."""

    params: int = 0  # 0: the ranks of a node
    grads: int = 0  # 0: as params
    optimizer: int = 0  # 0: as grads; -1: all ranks
    ranks_per_node: int = 0  # 0: as the launcher says
    precision: str = "fp32"  # or bf16, fp16
    between_nodes: str = ""  # int8, float8_e4m3fn or float8_e5m2: once a step so many bits; empty: as precision says
    prefetch_mb: int = -1  # gathered ahead of its use; -1: the largest unit


@dataclass(frozen=True)
class BatchSettings:
    """What a step takes."""

    samples: int = 16  # of all ranks and micro-steps
    seq: int = 128  # tokens of a sample
    micro_steps: int = 2  # in which a step comes


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW."""

    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices, not of norms and biases
    clip: float = 1.0  # the largest norm of the gradient


@dataclass(frozen=True)
class ScheduleSettings:
    """How long, and at which rate."""

    steps: int = 500  # of the optimizer
    minutes: float = 0.0  # end after these, whatever; 0: no limit
    kind: str = "cosine"  # or wsd: warm up, stay, decay
    warmup: float = 0.05  # of the steps
    decay: float = 0.2  # of the steps, at the end, with wsd
    last: float = 0.05  # of the rate, at the end


@dataclass(frozen=True)
class EvaluationSettings:
    """The loss on held-out data."""

    every: int = 100  # steps; 0: at the end only
    batches: int = 4  # of as many samples as a step takes
    sampled: int = 240  # tokens that a GPT writes at the end
    prompt: str = "\ndef "  # which they follow


@dataclass(frozen=True)
class CheckpointSettings:
    """What is kept."""

    every: int = 200  # steps; 0: at the end only
    keep: int = 2  # of the newest
    background: bool = True  # write while training goes on
    resume: str = "never"  # always: go on where the run in `output` stopped; auto: if it has a checkpoint, else begin


@dataclass(frozen=True)
class LogSettings:
    """What is said."""

    every: int = 20  # steps
    tensorboard: bool = True  # or the lines of JSON alone
    peak_tflops: float = 0.0  # of one device, for the MFU; 0: known by its name, else measured; none on CPUs


@dataclass(frozen=True)
class Settings:
    """All of it."""

    output: str = ""  # a folder; empty: runs/ and the time
    seed: int = 0  # of weights, batches and the sample
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    sharding: ShardingSettings = field(default_factory=ShardingSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    log: LogSettings = field(default_factory=LogSettings)

    def __post_init__(self) -> None:
        for keys, fits, expected in _NUMBERS:
            for key in keys.split():
                if not fits(_at(self, key)):
                    raise ValueError(f"settings: {key} is {_at(self, key)}, expected {expected}: change it")
        for key in ("output", "data.folder", "model.weights"):
            if "\0" in _at(self, key):
                raise ValueError(
                    f"settings: {key} is {_at(self, key)!r}, expected a path, without a zero byte: correct it"
                )
        words = {
            "schedule.kind": ("cosine", "wsd"),
            "sharding.precision": ("fp32", "bf16", "fp16"),
            "sharding.between_nodes": ("", "int8", "float8_e4m3fn", "float8_e5m2"),
            "checkpoint.resume": ("never", "always", "auto"),
        }
        for key, allowed in words.items():
            if _at(self, key) not in allowed:
                raise ValueError(f"settings: {key} is {_at(self, key)!r}, expected one of {allowed}: choose one")
        if self.checkpoint.resume != "never" and not self.output:
            raise ValueError(
                f"settings: checkpoint.resume is {self.checkpoint.resume!r} and output is empty, expected the folder "
                "of the run to go on with: name it"
            )
        if not self.data.masked or not self.evaluation.prompt:
            raise ValueError("settings: data.masked is 0 or evaluation.prompt empty, expected something: give a value")


def read(file: Path | None, changes: Sequence[str]) -> Settings:
    """The settings of a file, with `table.key=value` over them; an unknown key is an error that names the nearest."""
    table: dict[str, Any] = {}
    if file is not None:
        try:
            table = tomllib.loads(file.read_bytes().decode())
        except FileNotFoundError as error:
            raise ValueError(f"settings: {file} is not there, expected a file of settings: correct its name") from error
        except ValueError as error:
            raise ValueError(f"settings: {file} is no TOML ({error}), expected tables of keys: repair it") from error
    for change in changes:
        key, sign, value = change.partition("=")
        if not sign:
            raise ValueError(
                f"settings: got {change!r}, expected table.key=value, such as batch.seq=256: add the value"
            )
        _put(table, key.strip().split("."), _Text(value.strip()), change)
    return _build(Settings, table, "")


def flatten(settings: Settings) -> Iterator[tuple[str, Any]]:
    """Every key with its value."""

    def walk(table: Mapping[str, Any], before: str) -> Iterator[tuple[str, Any]]:
        for name, value in table.items():
            if isinstance(value, Mapping) and before + name != "model.config":
                yield from walk(value, f"{before}{name}.")
            else:
                yield before + name, value

    return walk(asdict(settings), "")


def to_toml(settings: Settings) -> str:
    """A file that `read` makes the same settings of."""
    lines = {"": [f"{name} = {_literal(value)}" for name, value in flatten(settings) if "." not in name]}
    for key, value in flatten(settings):
        table, _, name = key.rpartition(".")
        if key == "model.config":
            lines[key] = [f"{inner} = {_literal(what)}" for inner, what in value.items()]
        elif table:
            lines.setdefault(table, []).append(f"{name} = {_literal(value)}")
    parts = ["\n".join([f"[{table}]"] * bool(table) + rows) for table, rows in lines.items() if rows]
    return "\n\n".join(parts) + "\n"


def explained() -> str:
    """Every key with its default and the comment that it has above."""
    source = Path(__file__).read_text()
    meanings = {}
    for kind, body in re.findall(r"^class (\w*)Settings:\n(.*?)(?=^\n\n@|^    def )", source, re.M | re.S):
        for name, comment in re.findall(r"^    (\w+): .* = .*?  # (.*)$", body, re.M):
            meanings[f"{kind.lower()}.{name}".lstrip(".")] = comment
    table, lines = "", []
    for line in to_toml(Settings()).splitlines():
        table = line.strip("[]") if line.startswith("[") else table
        name = line.partition(" = ")[0]
        meaning = meanings.get(f"{table}.{name}".lstrip("."))
        lines.append(f"{line:<28}# {meaning}" if meaning else line)
    return "\n".join(lines) + "\n"


def nearest(key: str, known: Sequence[str]) -> str:
    """What to do about an unknown key, as the end of a sentence."""
    close = get_close_matches(key, known, 1, 0.5)
    return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(known)}"


_CONFIG_KEYS = dict.fromkeys(f"model.config.{each.name}" for kind in (GPTConfig, BERTConfig) for each in fields(kind))


def _at(settings: Settings, key: str) -> Any:
    table, _, name = key.rpartition(".")
    return getattr(getattr(settings, table) if table else settings, name)


def _build(kind: type[Section], table: Mapping[str, Any], before: str) -> Section:
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    default = kind()
    values: dict[str, Any] = {}
    for name, value in table.items():
        key = before + name
        if name not in known:
            everywhere = [*(there for there, _ in flatten(Settings())), *_CONFIG_KEYS]
            elsewhere = [there for there in everywhere if there.rpartition(".")[2] == name]
            here = nearest(key, [before + other for other in known])
            meant = f"did you mean {' or '.join(elsewhere)}?" if elsewhere else here
            raise ValueError(f"settings: {key} is unknown, {meant}")
        expected = getattr(default, name)
        if is_dataclass(expected):
            if not isinstance(value, Mapping):
                raise ValueError(
                    f"settings: {key} is {_meant(value)!r}, expected a table of keys: write {key}.KEY = VALUE"
                )
            values[name] = _build(type(expected), value, f"{key}.")
        else:
            values[name] = typed(key, value, expected)
    return kind(**values)


class _Text(str):
    """A value from the command line, as it was written there."""


def typed(key: str, value: Any, default: Any) -> Any:
    """The value, if it is of the default's type."""
    if isinstance(value, _Text) and isinstance(default, str) and not value.startswith(('"', "'")):
        return str(value)  # shells need no second quotes
    value = _meant(value)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise ValueError(f"settings: {key} is {value!r}, expected a value like {default!r}: write {_A[type(default)]}")
    if isinstance(value, int | float) and not abs(value) < _LARGEST[type(value)]:
        raise ValueError(f"settings: {key} is {value}, expected a number that a machine can count with: change it")
    return value


_A = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a table"}
_LARGEST = {bool: 2, int: 1 << 63, float: math.inf}


def _meant(value: Any) -> Any:
    """The value as it is; what is text from the command line as TOML reads it, or the text itself."""
    if isinstance(value, Mapping):
        return {name: _meant(inner) for name, inner in value.items()}
    if not isinstance(value, _Text):
        return value
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return str(value)


def _put(table: dict[str, Any], path: Sequence[str], value: Any, change: str) -> None:
    for name in path[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ValueError(
                f"settings: {change!r} sets a key inside {name}, which is a value: drop the part behind it"
            )
    table[path[-1]] = value


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
