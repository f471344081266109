"""Every benchmark that this machine allows, one after the other, and the pages that show what they found.

    python -m bench.all [PARTS...] [--minutes 20]

A part that fails does not keep the others from running; one that no longer fits into the time is left out, and said.
The pages take no figures of a tree that has changes beside its commit: this run says so before it begins, and fails.
Records of such trees that were there before, of parts that did not run now, are named and fail nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from bench import report
from bench.cluster import unavailable
from bench.pages import changes
from bench.record import ROOT, commit
from bench.scenes.runtimes import left_out
from bench.scenes.table import SCENES


@dataclass(frozen=True)
class Part:
    """A benchmark: its module and words, about how long it takes, and why it cannot run here."""

    name: str
    words: tuple[str, ...]
    seconds: int
    unable: Callable[[], str | None] = lambda: None


PYTHON = [sys.executable, "-m"]
"""What runs a part's words."""

MOST_NAMES = 3
"""Of changed files, that a message tells."""

CHECKPOINTS = "--megabytes 1000 --rounds 3 --steps-rounds 5 --ranks 1"
PARTS = (
    Part("host", ("bench.host", "--seconds", "5"), 10),
    Part("planner", ("bench.planner",), 30),
    Part("training", ("bench.training", "--seconds", "5"), 65),
    Part("checkpoints", ("bench.checkpoints", *CHECKPOINTS.split()), 45),
    Part("wires", ("bench.wires",), 15, unavailable),
    Part("links", ("bench.links",), 90, unavailable),
    # Those in mixed precision are seven minutes more: `make bench-scenes` has them.
    *[
        Part(scene.name, ("bench.scenes", scene.name), scene.budget, unavailable)
        for scene in SCENES
        if scene.precision == "fp32"
    ],
    Part("kernels", ("bench.kernels", "--threads", "1", "--seconds", "0.3"), 85),
)


def run(parts: Sequence[Part], seconds: float, command: Sequence[str]) -> dict[str, str]:
    """Run the parts within the time; what became of those that did not run to their end, by name."""
    end = time.monotonic() + seconds
    trouble: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        left = end - time.monotonic()
        reason = part.unable()
        if reason is None and left < part.seconds:
            reason = f"left out: it takes about {part.seconds} s, and {left:.0f} s are left of the time"
        elif reason is not None:
            reason = f"left out: {reason}"
        else:
            _say(f"part {number} of {len(parts)}, {part.name}: about {part.seconds} s, {left:.0f} s left for all")
            status = subprocess.run([*command, *part.words], cwd=ROOT).returncode
            reason = f"failed with status {status}" if status else None
        if reason is not None:
            trouble[part.name] = reason
            _say(f"{part.name}: {reason}")
    return trouble


def missing() -> dict[str, str]:
    """What no part measures on this machine, and why."""
    found = {"ZeRO-3": left_out("ZeRO-3")}
    if not torch.cuda.is_available():
        found["GPUs"] = "torch finds none here, so all runs on the CPU"
    return {name: f"left out: {reason}" for name, reason in found.items() if reason is not None}


def renewed(begun: str) -> bool:
    """Renew the pages; whether they show all that was measured since then. A refused record is named, new or old."""
    records = report.read()
    refused = report.refused(records)
    changed = report.renew(records, refused)
    _say(f"pages renewed: {', '.join(changed) or 'none'}")
    new = [name for name in refused if records[name]["date"] >= begun]
    if old := [name for name in refused if name not in new]:
        _say(f"from before this run: {report.refusal(records, old)}")
    if new:
        _say(report.refusal(records, new))
    return not new


def warning(changed: Sequence[str]) -> str:
    """What awaits the records of a tree with changes."""
    more = f" and {len(changed) - MOST_NAMES} more" if len(changed) > MOST_NAMES else ""
    return (
        f"the tree has changes ({', '.join(changed[:MOST_NAMES])}{more}), so the pages will refuse what is measured "
        "now: commit first, or take the records afterwards with python -m bench.report --dirty NAME ..."
    )


def _say(text: str) -> None:
    print(f"\n=== {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them, renew the pages, and repeat what did not run."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="python -m bench.all", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"default: all of {', '.join(names)}")
    parser.add_argument("--minutes", type=float, default=20.0, help="after which nothing new begins; default 20")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(names):
        parser.error(f"got {', '.join(sorted(unknown))}, expected some of {', '.join(names)}")
    chosen = [part for part in PARTS if part.name in (options.parts or names)]
    if commit().dirty:
        _say(warning(changes(ROOT)))
    begun = datetime.now(UTC).isoformat(timespec="seconds")  # as records have it
    trouble = run(chosen, 60 * options.minutes, PYTHON)
    complete = renewed(begun)
    for name, reason in (trouble | missing()).items():
        _say(f"{name}: {reason}")
    return 1 if not complete or any(reason.startswith("failed") for reason in trouble.values()) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
