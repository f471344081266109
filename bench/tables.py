"""The tables of the pages, by the name of their marker: which records each shows, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from bench.checkpoints import checkpoints_note, checkpoints_table
from bench.kernels import kernels_note, kernels_table
from bench.links import links_table
from bench.losses import losses_table
from bench.planner import planner_note, planner_table
from bench.record import origin, table
from bench.scenes.figures import (
    GOALS,
    WEAK,
    WEAK_HISTORY,
    goals_table,
    peers_note,
    scene_table,
    weak_note,
    weak_table,
)
from bench.scenes.table import SCENES
from bench.training import training_note, training_table
from bench.wires import wires_table

Records = Mapping[str, Mapping[str, Any]]
"""What was measured, by the name of its file below bench/results: `cluster/weak-2`, `cpu/host`."""


@dataclass(frozen=True)
class Table:
    """A table, and the names of the records that it shows, or patterns of them: no other is given to `make`."""

    shows: tuple[str, ...]
    make: Callable[[Records], str]

    def of(self, records: Records) -> Records:
        """Those that it shows."""
        return {name: found for name, found in records.items() if any(fnmatchcase(name, each) for each in self.shows)}


def _scenes(records: Records) -> dict[str, Mapping[str, Any]]:
    return {name.removeprefix("cluster/"): found for name, found in records.items()}


def _missing(names: Sequence[str], command: str) -> str:
    return f"Not measured yet: {', '.join(names)}. `{command}` does."


def _made(*found: Mapping[str, Any]) -> str:
    """Where figures come from, in a line below them; of several scenes by name."""
    if not found:
        return ""
    names = [f"{record['scene']['name']}: " if len(found) > 1 else "" for record in found]
    said = [f"{name}{origin(record)}" for name, record in zip(names, found, strict=True)]
    left_out = {f"{n}: {why}" for record in found for n, why in record.get("left_out", {}).items()}
    return "\n".join([f"\n*{'; '.join(said)}.*", *[f"\nLeft out: {line}." for line in sorted(left_out)]])


def _one(name: str, command: str, shown: Callable[[Mapping[str, Any]], str]) -> Table:
    """A table of one record."""

    def made(records: Records) -> str:
        found = records.get(name)
        if found is None:
            return _missing([name.rpartition("/")[2]], command)
        return f"{shown(found)}\n{_made(found)}"

    return Table((name,), made)


def _scene(name: str, shown: Callable[[Mapping[str, Any]], str] = scene_table) -> Table:
    return _one(f"cluster/{name}", f"python -m bench.scenes {name}", shown)


def _peers(found: Mapping[str, Any]) -> str:
    """A scene against the peers, and what to know of them before a look at their figures."""
    return f"{scene_table(found)}\n\n{peers_note(found)}"


def _weak(records: Records) -> str:
    scenes = _scenes(records)
    if missing := [name for name in WEAK if name not in scenes]:
        return _missing(missing, f"python -m bench.scenes {' '.join(missing)}")
    return f"{weak_table(scenes)}\n\n{weak_note(scenes)}\n{_made(*[scenes[name] for name in WEAK])}"


def _goals(records: Records) -> str:
    return f"{goals_table(_scenes(records))}\n\n{WEAK_HISTORY}\n{_made(*records.values())}"


def _budget(records: Records) -> str:
    """What each scene may take, and took."""
    scenes = _scenes(records)
    took = {name: f"{found['took']:.0f}" for name, found in scenes.items()}
    rows = [
        [
            scene.name,
            f"{scene.nodes} x {scene.ranks_per_node}",
            f"{scene.rate_mbit:g}",
            f"{scene.parameters / 1e6:.2f}",
            ", ".join(map(str, scene.micro_steps)),
            f"{1e3 * scene.stand_in.forward:g} + {1e3 * scene.stand_in.backward:g}",
            str(scene.budget),
            took.get(scene.name, ""),
        ]
        for scene in SCENES
    ]
    total = sum(scene.budget for scene in SCENES)
    rows.append(["all", "", "", "", "", "", str(total), f"{sum(found['took'] for found in scenes.values()):.0f}"])
    header = ["scene", "nodes x ranks", "Mbit/s", "M parameters", "micro-steps", "stand-in, ms", "budget, s", "took, s"]
    return f"{table(header, rows)}\n{_made(*records.values())}"


def _host(found: Mapping[str, Any]) -> str:
    rows = [
        [name, f"{1e6 * spread['median']:.0f}", f"{found['cost_per_unit'][name]:.0f}"]
        for name, spread in found["microseconds"].items()
    ]
    return table(["", "forward + backward, us", "cost of a unit, us"], rows)


def _kernels(records: Records, shown: Callable[[Mapping[str, Any]], str]) -> str:
    """What is shown of the kernels on each device."""
    told = [f"{shown(found)}\n{_made(found)}" for found in records.values()]
    return "\n\n".join(told) or _missing(["kernels"], "python -m bench.kernels")


def _training(records: Records) -> str:
    tables = [
        f"{training_table(found['rows'])}\n\n{training_note(found)}\n{_made(found)}" for found in records.values()
    ]
    return "\n\n".join(tables) or _missing(["training"], "python -m bench.training")


def _losses(records: Records) -> str:
    """Of runs of some models and precisions each, as they take long."""
    tables = [f"{losses_table(found['rows'])}\n{_made(found)}" for found in records.values()]
    return "\n\n".join(tables) or _missing(["losses"], "python -m bench.losses")


def _checkpoints(found: Mapping[str, Any]) -> str:
    return f"{checkpoints_table(found['rows'])}\n\n{checkpoints_note(found['rows'])}"


def _planner(found: Mapping[str, Any]) -> str:
    return f"{planner_table(found)}\n\n{planner_note(found)}"


KERNELS = ("*/kernels", "*/gpu-check")

TABLES: Mapping[str, Table] = {
    "goals": Table(tuple(sorted({f"cluster/{scene}" for goal in GOALS for scene in goal.scenes})), _goals),
    "peers": _scene("peers-large", _peers),
    "kernels": Table(KERNELS, partial(_kernels, shown=lambda found: kernels_table(found["cases"]))),
    "kernels-note": Table(KERNELS, partial(_kernels, shown=lambda found: kernels_note(found["cases"]))),
    "weak": Table(tuple(f"cluster/{name}" for name in WEAK), _weak),
    "budget": Table(tuple(f"cluster/{scene.name}" for scene in SCENES), _budget),
    "wires": _one("cpu/wires", "python -m bench.wires", wires_table),
    "host": _one("cpu/host", "python -m bench.host", _host),
    "links": _one("cpu/links", "python -m bench.links", lambda found: links_table(found["rows"])),
    "losses": Table(("cpu/losses*",), _losses),
    "planner": _one("cpu/planner", "python -m bench.planner", _planner),
    "training": Table(("*/training",), _training),
    "checkpoints": _one("cpu/checkpoints", "python -m bench.checkpoints", _checkpoints),
    **{scene.name: _scene(scene.name) for scene in SCENES},
}
