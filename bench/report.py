"""Rebuild measured tables in README.md and docs/ from the records in bench/results, so that nobody types a figure.

    python -m bench.report            # writes what has changed
    python -m bench.report --check    # changes nothing; 1 if something would change

A table stands between `<!-- bench:NAME -->` and `<!-- /bench -->`; TABLES lists the names, and each scene is one.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.checkpoints import checkpoints_note, checkpoints_table
from bench.links import links_table
from bench.record import RESULTS, ROOT, load, table
from bench.scenes.figures import WEAK, goals_table, scene_table, weak_note, weak_table
from bench.scenes.table import SCENES
from bench.training import training_note, training_table

PAGES = ("README.md", "docs/benchmarks.md")
MARKED = re.compile(r"(<!-- bench:(\S+) -->\n).*?(<!-- /bench -->)", re.S)

Records = Mapping[str, Mapping[str, Any]]
"""What was measured, by the name of its file below bench/results: `cluster/weak-2`, `cpu/host`."""


def read(folder: Path = RESULTS) -> Records:
    """All records there."""
    return {str(path.relative_to(folder).with_suffix("")): load(path) for path in sorted(folder.glob("*/*.json"))}


def rebuilt(text: str, records: Records) -> str:
    """The page with its tables renewed; ValueError for a marker with an unknown name."""

    def renewed(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"report: marker bench:{name}, expected one of {', '.join(TABLES)}")
        return f"{begin}{TABLES[name](records)}\n{end}"

    return MARKED.sub(renewed, text)


def _scenes(records: Records) -> dict[str, Mapping[str, Any]]:
    return {name.removeprefix("cluster/"): found for name, found in records.items() if name.startswith("cluster/")}


def _missing(names: Sequence[str], command: str) -> str:
    return f"Not measured yet: {', '.join(names)}. `{command}` does."


def _made(*found: Mapping[str, Any]) -> str:
    """Where figures come from, in a line below them."""
    said = []
    for record in found:
        commit, machine = record["commit"], record["machine"]
        changed = " with changes" if commit["dirty"] else ""
        said.append(f"commit {commit['hash'][:7]}{changed}, {machine['device']}, {machine['cores']} cores")
    left_out = {f"{n}: {why}" for record in found for n, why in record.get("left_out", {}).items()}
    return "\n".join([f"\n*{'; '.join(dict.fromkeys(said))}.*", *[f"\nLeft out: {line}." for line in sorted(left_out)]])


def _scene(name: str) -> Callable[[Records], str]:
    def made(records: Records) -> str:
        found = _scenes(records).get(name)
        if found is None:
            return _missing([name], f"python -m bench.scenes {name}")
        return f"{scene_table(found)}\n{_made(found)}"

    return made


def _weak(records: Records) -> str:
    scenes = _scenes(records)
    if missing := [name for name in WEAK if name not in scenes]:
        return _missing(missing, f"python -m bench.scenes {' '.join(missing)}")
    return f"{weak_table(scenes)}\n\n{weak_note(scenes)}\n{_made(*[scenes[name] for name in WEAK])}"


def _goals(records: Records) -> str:
    return goals_table(_scenes(records))


def _peers(records: Records) -> str:
    """The scene of the peers at 100 Mbit/s and 4 micro-steps, for the README."""
    found = _scenes(records).get("peers-large")
    if found is None:
        return _missing(["peers-large"], "python -m bench.scenes peers-large")
    four = [case for case in found["cases"] if case["micro_steps"] == 4]
    return f"{scene_table(dict(found) | {'cases': four or found['cases']})}\n{_made(found)}"


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
    return table(header, rows)


def _host(records: Records) -> str:
    found = records.get("cpu/host")
    if found is None:
        return _missing(["host"], "python -m bench.host")
    rows = [
        [name, f"{1e6 * spread['median']:.0f}", f"{found['cost_per_unit'][name]:.0f}"]
        for name, spread in found["microseconds"].items()
    ]
    return f"{table(['', 'forward + backward, us', 'cost of a unit, us'], rows)}\n{_made(found)}"


def _links(records: Records) -> str:
    found = records.get("cpu/links")
    if found is None:
        return _missing(["links"], "python -m bench.links")
    return f"{links_table(found['rows'])}\n{_made(found)}"


def _training(records: Records) -> str:
    tables = [
        f"{training_table(found['rows'])}\n\n{training_note(found)}\n{_made(found)}"
        for name, found in records.items()
        if name.endswith("/training")
    ]
    return "\n\n".join(tables) or _missing(["training"], "python -m bench.training")


def _checkpoints(records: Records) -> str:
    found = records.get("cpu/checkpoints")
    if found is None:
        return _missing(["checkpoints"], "python -m bench.checkpoints")
    return f"{checkpoints_table(found['rows'])}\n\n{checkpoints_note(found['rows'])}\n{_made(found)}"


TABLES: Mapping[str, Callable[[Records], str]] = {
    "goals": _goals,
    "peers": _peers,
    "weak": _weak,
    "budget": _budget,
    "host": _host,
    "links": _links,
    "training": _training,
    "checkpoints": _checkpoints,
    **{scene.name: _scene(scene.name) for scene in SCENES},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Renew the pages."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say which pages are out of date")
    options = parser.parse_args(arguments)
    records, changed = read(), []
    for page in map(ROOT.joinpath, PAGES):
        before = page.read_text()
        after = rebuilt(before, records)
        if after != before:
            changed.append(page.name)
            if not options.check:
                page.write_text(after)
    print(f"{'out of date' if options.check else 'renewed'}: {', '.join(changed) or 'nothing'}")
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
