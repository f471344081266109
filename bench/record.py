"""What a record of a measurement says beside its figures: which machine, which commit, which command."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.pages import WRITTEN, changes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / WRITTEN


@dataclass(frozen=True)
class Machine:
    """What the figures depend on and a reader cannot see in them."""

    device: str  # the GPU's name, or the CPU's
    cores: int
    threads: int  # that torch uses
    driver: str  # of the GPU
    cuda: str
    torch: str
    triton: str
    python: str
    platform: str


@dataclass(frozen=True)
class Commit:
    """The code that ran."""

    hash: str
    dirty: bool | None  # None: there is no git here to ask


def machine(device: torch.device | str = "cpu") -> Machine:
    """This machine, as it bears on measurements on `device`."""
    device = torch.device(device)
    gpu = device.type == "cuda"
    try:
        import triton  # type: ignore[import-untyped]

        triton_version = triton.__version__
    except ModuleNotFoundError:
        triton_version = ""
    return Machine(
        device=torch.cuda.get_device_name(device) if gpu else _cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        threads=torch.get_num_threads(),
        driver=_driver() if gpu else "",
        cuda=str(torch.version.cuda or torch.version.hip or ""),
        torch=torch.__version__,
        triton=triton_version,
        python=platform.python_version(),
        platform=platform.platform(),
    )


def _cpu_name() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (_said(command).splitlines() or [""])[0].strip()


def _said(command: Sequence[str]) -> str:
    """What a command prints; nothing if it is not there, fails, or hangs."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout if run.returncode == 0 else ""


def commit(known: str = "") -> Commit:
    """The commit of this tree; `known` where the tree was copied to the machine without its history."""
    found = _said(["git", "-c", f"safe.directory={ROOT}", "rev-parse", "HEAD"]).strip()
    if not found:
        return Commit(known or "unknown", None)
    return Commit(found, bool(changes(ROOT)))


def folder(device: torch.device | str) -> str:
    """Where results of `device` belong: `cpu`, or the GPU's short name, such as `h200`."""
    device = torch.device(device)
    if device.type != "cuda":
        return device.type
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return name.removeprefix("nvidia-") or "gpu"


def save(path: Path, content: Mapping[str, Any]) -> Path:
    """Write JSON so that a reader finds the old file or the whole new one, even if this run is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(plain(content), indent=1) + "\n")
    new.replace(path)
    return path


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote."""
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def stamp(words: Sequence[str], device: torch.device | str, known_commit: str = "") -> dict[str, Any]:
    """What every record begins with. Of an absolute path among the command's words only the name is kept."""
    return {
        "command": " ".join(Path(word).name if Path(word).is_absolute() else word for word in words),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": asdict(commit(known_commit)),
        "load": os.getloadavg()[0],  # before: more than 0 means others wanted the cores, too
        "machine": asdict(machine(device)),
    }


def origin(record: Mapping[str, Any]) -> str:
    """Where the figures of a record come from, as a line below them says it."""
    machine, rounds = record["machine"], sorted(set(_rounds(record)))
    said = [f"commit {at(record)}", f"{machine['device']}, {machine['cores']} cores"]
    if rounds:
        said.append(f"{rounds[0]} rounds" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]} rounds")
    return ", ".join([*said, f"load {record['load']:.1f} at the start"])


def at(record: Mapping[str, Any]) -> str:
    """The commit that a record measured."""
    commit = record["commit"]
    return f"{commit['hash'][:7]}{' with changes' if commit['dirty'] else ''}"


def _rounds(found: Any) -> Iterator[int]:
    """What a record says of rounds, wherever it says it."""
    if isinstance(found, Mapping):
        for name, value in found.items():
            yield from [value] if name == "rounds" else _rounds(value)
    elif isinstance(found, list):
        for value in found:
            yield from _rounds(value)


def plain(value: Any) -> Any:
    """Dataclasses as dicts, and numbers to the five digits that a measurement has at best; JSON knows no NaN."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if abs(value) < float("inf") else str(value)
    return _without_places(value) if isinstance(value, str) else value


def _without_places(text: str) -> str:
    """Messages name files; where this machine keeps them is nothing that a repository should remember."""
    for place, name in ((ROOT, "."), (sys.prefix, "<python>"), (sys.base_prefix, "<python>"), (Path.home(), "~")):
        if len(str(place)) > 1:
            text = text.replace(str(place), name)
    return text


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, readable as plain text: text columns to the left, numbers to the right."""
    rows = [[cell.replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    columns = list(zip(header, *rows, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    right = [all(re.match(r"[\d.~-]", cell) for cell in column[1:] if cell) and len(column) > 1 for column in columns]

    def line(cells: Sequence[str]) -> str:
        placed = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
        return f"| {' | '.join(placed)} |"

    rule = [("-" * (w - 1) + ":") if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(header), line(rule), *map(line, rows)])
