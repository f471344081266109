"""A cluster in numbers: what a rank computes and holds, and what links carry. Kept in a TOML file, or known by name.

`save` writes the file and `load` reads it. `mics probe` measures one, `Cluster.preset` knows some from data sheets.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

from mics_core.errors import ConfigError
from mics_core.planner.candidate import System

Made = TypeVar("Made")

MOST_RANKS = 1 << 26
"""Counts of more are slips."""

COLLECTIVES = ("gather", "reduce", "all-reduce")
"""What tables are of."""

Table = tuple[tuple[float, float], ...]
"""Bytes that one rank sends, in increasing order, and the seconds that they took."""


class Transport(Enum):
    """Who carries collectives."""

    NCCL = "nccl"  # rings that a node's ranks share, beside the computation
    GLOO = "gloo"  # messages between CPU ranks; its reduce-scatter moves the bytes of an all-reduce


@dataclass(frozen=True)
class Link:
    """What a transfer costs: `bandwidth` and `latency`, or a measured table where there is one.

    tables: by collective, of COLLECTIVES, and the number of ranks that take part. On CPUs the seconds of "reduce" are
        without the sum of what arrives, those of "all-reduce" with it.
    """

    bandwidth: float  # bytes a second in one direction: of each rank inside a node, of each node between nodes
    latency: float  # seconds of one message
    tables: Mapping[tuple[str, int], Table] = field(default_factory=dict)

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
        for kind, name in ((kind, name) for kind, names in _FIELDS.items() for name in names):
            value: Any = getattr(self, name)
            if not isinstance(value, kind):
                raise ConfigError(f"Cluster: {name} is {value!r}, expected {_KINDS[kind]}: set it")
            if kind in (int, Real) and not getattr(self, name) > 0:
                raise ConfigError(f"Cluster: {name} is {value}, expected more than 0: set it")
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

    def with_nodes(self, nodes: int) -> Cluster:
        """The same with so many nodes."""
        return replace(self, nodes=nodes)

    @classmethod
    def preset(cls, name: str, nodes: int = 1) -> Cluster:
        """A known kind of nodes, such as "p4d.24xlarge"; "this machine" looks at what this process runs on."""
        from mics_core.planner import presets  # it reads files with what is defined here

        return presets.find(name).with_nodes(nodes)

    @classmethod
    def parse(cls, text: str) -> Cluster:
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
    def load(cls, path: Path | str) -> Cluster:
        """Read what `save` wrote."""
        try:
            text = Path(path).read_text("utf-8")
        except FileNotFoundError as error:
            raise ConfigError(
                f"cluster: there is no file {path}: `mics probe {path}` under torchrun measures one, and presets have "
                "names such as p4d.24xlarge"
            ) from error
        except OSError as error:
            raise ConfigError(f"cluster: {path} cannot be read: {error.strerror}: name a file that can") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"cluster: {path} is no text: {error}: repair it, or measure anew") from error
        try:
            content = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"cluster: {path} is no TOML: {error}: repair it, or measure anew") from error
        return _Reader(str(path)).cluster(content)

    def toml(self) -> str:
        """What `save` writes."""
        return _write(self)

    def save(self, path: Path | str) -> None:
        """Write a TOML file that `load` reads."""
        Path(path).write_text(self.toml(), "utf-8")


@dataclass(frozen=True)
class _Reader:
    """Checks while it reads; a complaint names the file and the field."""

    path: str

    def cluster(self, content: dict[str, Any]) -> Cluster:
        known = {
            "name": str,
            "nodes": int,
            "ranks_per_node": int,
            "memory": int,
            "memory_bandwidth": float,
            "efficiency": float,
            "flops": dict,
            "intra": dict,
            "inter": dict,
        }
        optional = {"transport": str, "host": dict, "sources": dict}
        self._check_names(content, [*known, *optional], "")
        values: dict[str, Any] = {name: self._get(content, name, kind, "") for name, kind in known.items()}
        values |= {name: self._get(content, name, kind, "") for name, kind in optional.items() if name in content}
        values["flops"] = {dtype: self._get(values["flops"], dtype, float, "flops.") for dtype in values["flops"]}
        for name in ("intra", "inter"):
            values[name] = self._link(values[name], f"{name}.")
        if "transport" in values:
            values["transport"] = self._transport(values["transport"])
        if "host" in values:
            values["host"] = {name: self._get(values["host"], name, float, "host.") for name in values["host"]}
        for name in values.get("sources", ()):
            self._get(values["sources"], name, str, "sources.")
        return self._made(lambda: Cluster(**values))

    def _link(self, content: dict[str, Any], within: str) -> Link:
        self._check_names(content, ["bandwidth", "latency", "tables"], within)
        tables = {}
        for entry in self._get(content, "tables", list, within) if "tables" in content else []:
            place = f"{within}tables."
            if not isinstance(entry, dict):
                raise ConfigError(
                    f"cluster: {self.path}: {place[:-1]} has {entry!r}, expected [[{place[:-1]}]] above fields"
                )
            self._check_names(entry, ["collective", "ranks", "bytes", "seconds"], place)
            collective, ranks = self._get(entry, "collective", str, place), self._get(entry, "ranks", int, place)
            if collective not in COLLECTIVES:
                raise ConfigError(
                    f"cluster: {self.path} has {place}collective {collective!r}, expected one of {COLLECTIVES}: choose "
                    "one"
                )
            counts, seconds = self._numbers(entry, "bytes", place), self._numbers(entry, "seconds", place)
            if len(counts) != len(seconds) or not counts or counts != sorted(set(counts)):
                raise ConfigError(
                    f"cluster: {self.path} has {len(counts)} bytes and {len(seconds)} seconds in {place[:-1]}, "
                    "expected equally many, the bytes in increasing order: measure again with `mics probe`"
                )
            tables[collective, ranks] = tuple(zip(counts, seconds, strict=True))
        bandwidth, latency = (self._get(content, name, float, within) for name in ("bandwidth", "latency"))
        return self._made(lambda: Link(bandwidth, latency, tables))

    def _numbers(self, content: dict[str, Any], name: str, within: str) -> list[float]:
        given = self._get(content, name, list, within)
        for each in given:
            if isinstance(each, bool) or not isinstance(each, int | float) or not 0 < each < 1 << 63:
                raise ConfigError(
                    f"cluster: {self.path}: {within}{name} has {repr(each)[:40]}, expected numbers above 0: correct it"
                )
        return [float(each) for each in given]

    def _made(self, make: Callable[[], Made]) -> Made:
        try:
            return make()
        except ConfigError as error:
            raise ConfigError(f"cluster: {self.path}: {error}") from error

    def _transport(self, text: str) -> Transport:
        known = [each.value for each in Transport]
        if text not in known:
            raise ConfigError(f"cluster: {self.path} has transport {text!r}, expected one of {known}: choose one")
        return Transport(text)

    def _get(self, content: dict[str, Any], name: str, kind: type, within: str) -> Any:
        if name not in content:
            raise ConfigError(
                f"cluster: {self.path} has no {within}{name}, expected {_KINDS[kind]}: add it, or let `mics probe` "
                "write the file"
            )
        value = content[name]
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise ConfigError(f"cluster: {self.path}: {within}{name} has more than the 64 bits of TOML: correct it")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigError(f"cluster: {self.path}: {within}{name} is {value!r}, expected {_KINDS[kind]}: correct it")
        return value

    def _check_names(self, content: dict[str, Any], known: list[str], within: str) -> None:
        for name in content:
            if name not in known:
                raise ConfigError(
                    f"cluster: {self.path} has a field {within}{name}, expected only {', '.join(known)}: remove it or "
                    "spell it so"
                )


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

_FIELDS: Mapping[type, tuple[str, ...]] = {
    str: ("name",),
    int: ("nodes", "ranks_per_node"),
    Real: ("memory", "memory_bandwidth", "efficiency"),
    Mapping: ("flops", "host", "sources"),
    Link: ("intra", "inter"),
    Transport: ("transport",),
}


def _write(cluster: Cluster) -> str:
    lines = [f"name = {_text(cluster.name)}"]
    numbers = ("nodes", "ranks_per_node", "memory", "memory_bandwidth", "efficiency")
    lines += [f"{name} = {getattr(cluster, name)!r}" for name in numbers]
    lines.append(f"transport = {_text(cluster.transport.value)}")
    for name in ("flops", "host"):
        table: Mapping[str, float] = getattr(cluster, name)
        if table:
            lines += ["", f"[{name}]", *(f"{_text(key)} = {float(value)!r}" for key, value in table.items())]
    for name in ("intra", "inter"):
        link: Link = getattr(cluster, name)
        lines += ["", f"[{name}]", f"bandwidth = {float(link.bandwidth)!r}", f"latency = {float(link.latency)!r}"]
        for (collective, ranks), table_rows in link.tables.items():
            counts, seconds = zip(*table_rows, strict=True)
            lines += ["", f"[[{name}.tables]]", f"collective = {_text(collective)}", f"ranks = {ranks}"]
            lines += [f"bytes = {[float(count) for count in counts]}", f"seconds = {[float(time) for time in seconds]}"]
    if cluster.sources:
        lines += ["", "[sources]", *(f"{_text(key)} = {_text(value)}" for key, value in cluster.sources.items())]
    return "\n".join(lines) + "\n"


def _text(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
