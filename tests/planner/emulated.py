"""Predicted beside measured on the emulated cluster of the bench. Three numbers are fitted, to three of the rows.

python tests/planner/emulated.py    # writes what the records give into docs/planning.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from mics_core.planner import Candidate, Cluster, Link, System, Transport, Workload
from mics_core.planner.simulator import mean_seconds
from mics_core.spec.sharding import Precision, Sharding
from workloads_by_hand import workload

PAGE = Path(__file__).parents[2] / "docs" / "planning.md"
MARKED = re.compile(r"(<!-- emulated -->\n).*?(<!-- /emulated -->)", re.S)

RESULTS = Path(__file__).parents[2] / "bench" / "results"
SPEED = 1e12
"""FLOP/s; the stand-in's seconds are turned into FLOPs and back."""

RANKS = 8
"""Of the rows that the fit is made from."""

CALIBRATION = ("mics 1,1,1", "mics 2,2,2", "HSDP 2")
"""The steps of the fit, of the scene peers-100 with the most micro-steps."""

SHARED = 4
"""Ranks of those that share a core."""

# Not fitted. gloo's time for a few bytes, 0.4 ms where nothing else runs, and 4 ranks share a core; memory as
# bench/results/cpu/kernels.json has it for buffers of this size, shared alike; headers take 1 % of a link.
MESSAGE, MEMORY, PAYLOAD = 1.6e-3, 2.5e9, 0.99


@dataclass(frozen=True)
class Fit:
    """The three numbers that are fitted, each to the step of CALIBRATION that depends on it most."""

    step: float = 1e-2  # seconds of every step, whatever is in it: ranks that meet, clip, and wake on shared cores
    inside: float = 1e8  # bytes a second from rank to rank in a node
    peer: float = 1e-3  # seconds of the host at every unit under FSDP2


@dataclass(eq=False)
class Row:
    """A measured step."""

    scene: dict[str, Any]
    variant: str
    micro_steps: int
    seconds: float

    @property
    def ranks(self) -> int:
        return int(self.scene["nodes"] * self.scene["ranks_per_node"])

    def __str__(self) -> str:
        return f"`{self.variant}` in {self.scene['name']} with {self.micro_steps} micro-steps"

    @property
    def key(self) -> tuple[str, str, int]:
        return self.scene["name"], self.variant, self.micro_steps

    def cluster(self, fit: Fit) -> Cluster:
        """The emulated cluster; all ranks share the machine's cores, so more ranks are slower ones."""
        crowd = self.ranks / RANKS
        wire = 1e-3 * self.scene["latency_ms"]
        hooks = json.loads((RESULTS / "cpu" / "host.json").read_text())
        plain = hooks["microseconds"]["plain PyTorch"]["median"] / hooks["units"]
        host = 1e-6 * SHARED * hooks["cost_per_unit"]["mics"]
        return Cluster(
            name="emulated",
            nodes=self.scene["nodes"],
            ranks_per_node=self.scene["ranks_per_node"],
            memory=10**9,
            flops={"float32": SPEED},
            memory_bandwidth=MEMORY / crowd,
            intra=Link(fit.inside / crowd, MESSAGE * crowd),
            inter=Link(PAYLOAD * self.scene["rate_mbit"] * 1e6 / 8, wire + MESSAGE * crowd),
            efficiency=1.0,
            transport=Transport.GLOO,
            host={
                "mics": host * crowd,
                "DDP": 1e-6 * SHARED * plain * crowd,
                "FSDP2": fit.peer * crowd,
                "HSDP": fit.peer * crowd,
                "ZeRO-3": fit.peer * crowd,
            },
        )

    def workload(self) -> Workload:
        """A block is two matrices; the stand-in's backward waits twice as long as its forward, as FLOPs do."""
        stand_in = self.scene["stand_in"]
        assert stand_in["backward"] == 2 * stand_in["forward"]
        return workload(self.scene["blocks"], 2 * self.scene["width"] ** 2, stand_in["forward"] * SPEED, self.ranks)

    def choice(self) -> tuple[Candidate, System]:
        """What the variant's name stands for, as bench/scenes/runtimes.py has it."""
        system, sharding, options = System.MICS, Sharding.ddp(), {}
        match self.variant.split():
            case ["DDP"]:
                system = System.DDP
            case ["HSDP", ranks]:
                system, sharding = System.HSDP, Sharding.mics(int(ranks))
            case ["FSDP2", "full"]:
                system, sharding = System.FSDP2, Sharding.zero3()
            case ["FSDP2", "reshard", ranks]:
                system, sharding = System.FSDP2, Sharding(int(ranks), -1, -1)
            case ["ZeRO-3"]:
                system, sharding = System.ZERO3, Sharding.zero3()
            case ["mics", degrees, *switched]:
                sharding = Sharding(*map(int, degrees.split(",")))
                options = {"ranks_per_node": 1} if "flat" in switched else {}
                options |= {"prefetch_units": 0} if "no-prefetch" in switched else {}
        resolved = sharding.resolve(self.ranks)
        return Candidate(resolved, Precision.fp32(), 1, self.micro_steps, **options), system

    def predict(self, fit: Fit) -> float:
        choice, system = self.choice()
        simulated = mean_seconds(self.workload(), self.cluster(fit), choice, system, self.scene["steps"])
        return simulated + fit.step * self.ranks / RANKS

    @cached_property
    def predicted(self) -> float:
        return self.predict(fitted())

    @property
    def error(self) -> float:
        return self.predicted / self.seconds - 1


def records() -> list[Path]:
    """The scenes that were measured."""
    return sorted((RESULTS / "cluster").glob("*.json"))


@cache
def rows() -> dict[tuple[str, str, int], Row]:
    """All measured steps in float32 but those without `mics.accumulate`, whose schedule is not simulated."""
    found = {}
    for path in records():
        record = json.loads(path.read_text())
        for case in record["cases"] if record["scene"].get("precision", "fp32") == "fp32" else ():
            for variant, figures in case["variants"].items():
                row = Row(record["scene"], variant, case["micro_steps"], figures["spread"]["median"])
                if "no-overlap" not in variant:
                    found[row.key] = row
    return found


@cache
def calibration() -> list[Row]:
    """The rows of CALIBRATION."""
    most = max(row.micro_steps for row in rows().values() if row.scene["name"] == "peers-100")
    return [rows()["peers-100", variant, most] for variant in CALIBRATION]


@cache
def fitted() -> Fit:
    """The numbers that give those rows: each in turn by bisection, a few times."""
    fit = Fit()
    step, inside, peer = calibration()
    for _ in range(4):
        fit = replace(fit, step=_bisect(step, lambda x, now=fit: replace(now, step=x), 1e-6, 1e-0))
        fit = replace(fit, inside=1 / _bisect(inside, lambda x, now=fit: replace(now, inside=1 / x), 1e-10, 1e-6))
        fit = replace(fit, peer=_bisect(peer, lambda x, now=fit: replace(now, peer=x), 1e-6, 1e-1))
    return fit


def _bisect(row: Row, fit_of: Callable[[float], Fit], low: float, high: float) -> float:
    """What makes the row's step as long as it was; the more, the longer."""
    for _ in range(20):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if row.predict(fit_of(middle)) > row.seconds else (middle, high)
    return (low * high) ** 0.5


def wire_bound() -> list[Row]:
    """Where wires or waits take the time; at 400 Mbit/s with nothing to compute the two cores do."""
    return [row for row in rows().values() if row.scene["rate_mbit"] <= 100 or row.scene["stand_in"]["forward"]]


def unseen() -> list[Row]:
    """Those of the wire-bound rows that nothing was fitted to."""
    return [row for row in wire_bound() if row not in calibration()]


def astray() -> list[Row]:
    """The unseen ones that are more than 15 % off."""
    return [row for row in unseen() if abs(row.error) > 0.15]


def pairs() -> list[tuple[Row, Row]]:
    """The slower and the faster of two variants that took turns and differ by more than 10 %."""
    found = []
    for one, other in combinations(rows().values(), 2):
        slower, faster = sorted((one, other), key=lambda row: -row.seconds)
        alike = one.scene["name"] == other.scene["name"] and one.micro_steps == other.micro_steps
        if alike and slower.seconds > 1.1 * faster.seconds:
            found.append((slower, faster))
    return found


def report() -> str:
    """What docs/planning.md says of all this."""
    fit = fitted()
    step, inside, peer = calibration()
    wrong = [(slower, faster) for slower, faster in pairs() if slower.predicted <= faster.predicted]
    lines = [
        "| | fitted to | |",
        "|---|---|---:|",
        f"| whatever comes once a step | {step} | {1e3 * fit.step:.0f} ms |",
        f"| between two ranks of a node, bytes a second | {inside} | {fit.inside / 1e6:.0f} MB/s |",
        f"| the host, FSDP2's | {peer} | {1e3 * fit.peer:.1f} ms |",
        "",
        f"- {_said(unseen())}",
        *[f"- more than 15 % off: {row}, {100 * row.error:+.1f} %" for row in astray()],
        f"- of {len(pairs())} pairs that differ by more than 10 %, {len(pairs()) - len(wrong)} are ranked rightly",
        *[f"- not so: {slower} is not predicted slower than {faster}" for slower, faster in wrong],
    ]
    if others := [row for row in rows().values() if row not in wire_bound()]:
        lines.append(f"- where the cores take the time, {_said(others)}")
    commits = sorted({json.loads(path.read_text())["commit"]["hash"][:7] for path in records()})
    lines.append(f"- measured at commit {', '.join(commits)}")
    lines += ["", "Seconds of a step, measured and predicted; the rows of the fit in italics."]
    for name in dict.fromkeys(row.scene["name"] for row in rows().values()):
        lines += ["", *_table([row for row in rows().values() if row.scene["name"] == name])]
    return "\n".join(lines)


def _said(of: list[Row]) -> str:
    mean, worst = sum(abs(row.error) for row in of) / len(of), max(of, key=lambda row: abs(row.error))
    return (
        f"{len(of)} other steps: off by {100 * mean:.1f} % in the mean, and {100 * worst.error:+.1f} % at most, {worst}"
    )


def _table(mine: list[Row]) -> list[str]:
    counts = sorted({row.micro_steps for row in mine})
    told = {(row.variant, row.micro_steps): row for row in mine}
    lines = [f"| {mine[0].scene['name']} | {' | '.join(f'micro-steps: {count}' for count in counts)} |"]
    lines.append(f"|---|{'---:|' * len(counts)}")
    for variant in dict.fromkeys(row.variant for row in mine):
        cells = []
        for count in counts:
            row = told[variant, count]
            italics = "*" if row in calibration() else ""
            cells.append(f"{italics}{row.seconds:.3f} {row.predicted:.3f}{italics}")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return lines


def renewed(text: str) -> str:
    """The page with what the records give."""
    return MARKED.sub(lambda match: f"{match[1]}{report()}\n{match[2]}", text)


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text("utf-8")), "utf-8")
