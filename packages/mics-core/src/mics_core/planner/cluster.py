"""A cluster in numbers: what a rank computes and holds, and what links carry. Kept in a TOML file, or known by name.

`save` writes the file and `load` reads it. `mics probe` measures one, `Cluster.preset` knows some from data sheets.
"""

# Without `from __future__ import annotations`, which would make texts of the fields' types that files are read by.

import json
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from enum import Enum
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from mics_core.errors import ConfigError
from mics_core.planner import presets
from mics_core.planner.candidate import System
from mics_core.planner.this_machine import THIS, this_machine

Made = TypeVar("Made")

MOST_RANKS = 1 << 26
"""Counts of more are slips."""

Table = tuple[tuple[float, float], ...]
"""Bytes that one rank sends, in increasing order, and the seconds that they took."""

Tables = Mapping[tuple[str, int], Table]
"""By the Collective's value and the number of ranks that take part."""


class Collective(Enum):
    """What a table is of."""

    GATHER = "gather"
    REDUCE = "reduce"
    ALL_REDUCE = "all-reduce"


class Transport(Enum):
    """Who carries collectives."""

    NCCL = "nccl"  # rings that a node's ranks share, beside the computation
    GLOO = "gloo"  # messages between CPU ranks; its reduce-scatter moves the bytes of an all-reduce


@dataclass(frozen=True)
class Link:
    """What a transfer costs: `bandwidth` and `latency`, or a measured table where there is one.

    On CPUs the seconds of "reduce" are without the sum of what arrives, those of "all-reduce" with it.
    """

    bandwidth: float  # bytes a second in one direction: of each rank inside a node, of each node between nodes
    latency: float  # seconds of one message
    tables: Tables = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.bandwidth > 0 and self.latency >= 0):  # nor may they be NaN
            raise ConfigError(
                f"Link: bandwidth is {self.bandwidth} and latency {self.latency}, expected bytes a second above 0 and "
                "seconds from 0 up"
            )


@dataclass(frozen=True)
class Cluster:
    """Nodes of one kind. Bandwidths are what programs reach, not what data sheets promise, where that is known."""

    name: str
    nodes: int
    ranks_per_node: int
    memory: int  # bytes of a rank that training may use
    flops: Mapping[str, float]  # peak of matrix products a second, by dtype: "bfloat16", "float16", "float32"
    memory_bandwidth: float  # bytes a second of a rank's memory, read + written
    intra: Link
    inter: Link
    efficiency: float  # share of the peak that a step's arithmetic reaches without any communication
    sources: Mapping[str, str] = field(default_factory=dict)  # field -> where its number is from
    transport: Transport = Transport.NCCL
    host: Mapping[str, float] = field(default_factory=dict)
    """On CPU ranks, by System's value: seconds of the host at every unit in a micro-step; half of it in the update."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value: Any = getattr(self, each.name)
            kind: Any = get_origin(each.type) or each.type
            if kind is float or each.name == "memory":  # 0.9 of some bytes is no int
                kind = Real
            if not isinstance(value, kind):
                raise ConfigError(f"Cluster: {each.name} is {value!r}, expected {_KINDS[kind]}: set it")
            if kind in (int, Real) and not value > 0:
                raise ConfigError(f"Cluster: {each.name} is {value}, expected more than 0: set it")
        if self.ranks > MOST_RANKS:
            raise ConfigError(
                f"Cluster: {self.nodes} nodes of {self.ranks_per_node} ranks are {self.ranks} ranks, expected at most "
                f"{MOST_RANKS}: take fewer nodes"
            )
        if self.efficiency > 1:
            raise ConfigError(
                f"Cluster: efficiency is {self.efficiency}, expected a share of the peak, at most 1: set it"
            )
        if not self.flops or not all(rate > 0 for rate in self.flops.values()):
            raise ConfigError(
                f"Cluster: flops is {dict(self.flops)}, expected more than 0 for at least one dtype, such as float32: "
                "set it"
            )
        known = [system.value for system in System]
        if not all(name in known and seconds >= 0 for name, seconds in self.host.items()):
            raise ConfigError(
                f"Cluster: host is {dict(self.host)}, expected seconds from 0 up for some of {known}: set it"
            )

    @property
    def ranks(self) -> int:
        """Of all nodes."""
        return self.nodes * self.ranks_per_node

    def with_nodes(self, nodes: int) -> "Cluster":
        """The same with so many nodes."""
        return replace(self, nodes=nodes)

    @classmethod
    def preset(cls, name: str, nodes: int = 1) -> "Cluster":
        """A known kind of nodes, such as "p4d.24xlarge"; "this machine" looks at what this process runs on."""
        one = this_machine() if name == THIS else tomllib.loads(presets.read(name, THIS))
        return _Reader(name).made(cls, one).with_nodes(nodes)

    @classmethod
    def parse(cls, text: str) -> "Cluster":
        """What commands are told: "p4d.24xlarge:64", a preset with nodes, or "cluster.toml:8", a file."""
        name, colon, count = str(text).rpartition(":")
        if not colon:
            name, count = count, ""
        elif not count.isdecimal() or len(count) > 9 or int(count) < 1:
            raise ConfigError(
                f"cluster: got {text[:60]!r}, expected a number of nodes behind the colon, as in {name}:64"
            )
        if name.endswith(".toml"):
            cluster = cls.load(Path(name))
            return cluster.with_nodes(int(count)) if count else cluster
        return cls.preset(name, int(count or 1))

    @classmethod
    def load(cls, path: Path | str) -> "Cluster":
        """Read what `save` wrote."""
        try:
            content = tomllib.loads(Path(path).read_text("utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(
                f"cluster: there is no file {path}: `mics probe {path}` under torchrun measures one, and presets have "
                "names such as p4d.24xlarge"
            ) from error
        except OSError as error:
            raise ConfigError(f"cluster: {path} cannot be read: {error.strerror}: name a file that can") from error
        except ValueError as error:
            wanted = "text" if isinstance(error, UnicodeDecodeError) else "TOML"
            raise ConfigError(f"cluster: {path} is no {wanted}: {error}: repair it, or measure anew") from error
        return _Reader(str(path)).made(Cluster, content)

    def toml(self) -> str:
        """What `save` writes."""
        return _write(self)

    def save(self, path: Path | str) -> None:
        """Write a TOML file that `load` reads."""
        Path(path).write_text(self.toml(), "utf-8")


@dataclass(frozen=True)
class _Rows:
    """A table of a link, as a file has it."""

    collective: Collective
    ranks: int
    bytes: list[float]
    seconds: list[float]


@dataclass(frozen=True)
class _Reader:
    """Makes a dataclass of a TOML table, by the types of its fields; a complaint names the file and the field."""

    path: str

    def made(self, kind: type[Made], content: Mapping[str, Any], within: str = "") -> Made:
        """One of this kind, whose fields are in the table."""
        hints: dict[str, Any] = {each.name: each.type for each in fields(kind)}  # type: ignore[arg-type]
        if unknown := [name for name in content if name not in hints]:
            said = f"expected only {', '.join(hints)}: remove it or spell it so"
            raise self._wrong(f" has a field {within}{unknown[0]}, {said}")
        for each in fields(kind):  # type: ignore[arg-type]
            if each.name not in content and each.default is each.default_factory is MISSING:
                said = f"expected {_KINDS[_written(hints[each.name])]}: add it, or let `mics probe` write the file"
                raise self._wrong(f" has no {within}{each.name}, {said}")
        values = {name: self._value(hints[name], value, within + name) for name, value in content.items()}
        try:
            return kind(**values)
        except ConfigError as error:
            raise self._wrong(f": {error}") from error

    def _value(self, hint: Any, value: Any, place: str) -> Any:
        written = _written(hint)
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise self._wrong(f": {place} has more than the 64 bits of TOML: correct it")
        if written is float and type(value) is int:
            return float(value)
        if type(value) is not written:
            raise self._wrong(f": {place} is {value!r}, expected {_KINDS[written]}: correct it")
        if hint == Tables:
            return dict(self._table(entry, place) for entry in value)
        if is_dataclass(hint):
            return self.made(hint, value, f"{place}.")  # type: ignore[arg-type]
        if written is dict:
            return {name: self._value(get_args(hint)[1], each, f"{place}.{name}") for name, each in value.items()}
        if written is list:
            return [self._number(each, place) for each in value]
        if issubclass(hint, Enum) and value not in (known := [each.value for each in hint]):
            raise self._wrong(f" has {place} {value!r}, expected one of {known}: choose one")
        return hint(value)

    def _table(self, entry: Any, place: str) -> tuple[tuple[str, int], Table]:
        if type(entry) is not dict:
            raise self._wrong(f": {place} has {entry!r}, expected [[{place}]] above fields")
        rows = self.made(_Rows, entry, f"{place}.")
        counts, seconds = rows.bytes, rows.seconds
        if len(counts) != len(seconds) or not counts or counts != sorted(set(counts)):
            said = "expected equally many, the bytes in increasing order: measure again with `mics probe`"
            raise self._wrong(f" has {len(counts)} bytes and {len(seconds)} seconds in {place}, {said}")
        return (rows.collective.value, rows.ranks), tuple(zip(counts, seconds, strict=True))

    def _number(self, each: Any, place: str) -> float:
        if type(each) not in (int, float) or not 0 < each < 1 << 63:
            raise self._wrong(f": {place} has {repr(each)[:40]}, expected numbers above 0: correct it")
        return float(each)

    def _wrong(self, said: str) -> ConfigError:
        return ConfigError(f"cluster: {self.path}{said}")


def _written(hint: Any) -> Any:
    """What TOML has for a field of this type."""
    if hint == Tables:
        return list
    kind = get_origin(hint) or hint
    return dict if kind is Mapping or is_dataclass(kind) else str if issubclass(kind, Enum) else kind


_KINDS: Mapping[type, str] = {
    str: "a text in quotes",
    int: "a whole number",
    float: "a number",
    Real: "a number",
    dict: "a table of fields",
    list: "a list",
    Mapping: "a table of fields",
    Link: "a Link",
    Transport: "a Transport",
}


def _write(cluster: Cluster) -> str:
    plain = {name: value for name, value in vars(cluster).items() if isinstance(value, str | Real | Enum)}
    lines = [f"{name} = {_text(value)}" for name, value in plain.items()]
    for name in ("flops", "host"):
        if table := getattr(cluster, name):
            lines += ["", f"[{name}]", *(f"{_text(key)} = {float(value)!r}" for key, value in table.items())]
    for name in ("intra", "inter"):
        link: Link = getattr(cluster, name)
        lines += ["", f"[{name}]", f"bandwidth = {float(link.bandwidth)!r}", f"latency = {float(link.latency)!r}"]
        for (collective, ranks), rows in link.tables.items():
            counts, seconds = ([float(each) for each in column] for column in zip(*rows, strict=True))
            lines += ["", f"[[{name}.tables]]", f"collective = {_text(collective)}", f"ranks = {ranks}"]
            lines += [f"bytes = {counts}", f"seconds = {seconds}"]
    if cluster.sources:
        lines += ["", "[sources]", *(f"{_text(key)} = {_text(value)}" for key, value in cluster.sources.items())]
    return "\n".join(lines) + "\n"


def _text(value: object) -> str:
    """As TOML has it."""
    value = value.value if isinstance(value, Enum) else value
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
