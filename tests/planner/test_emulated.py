"""Predicted beside measured on the emulated cluster of the bench. Three numbers are fitted, to three of the rows.

Nothing here is skipped where a record is missing: what is there must hold, and it must be enough.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from mics_core.planner import Candidate, Cluster, Link, System, Transport
from mics_core.planner.simulator import turn
from mics_core.planner.workload import Workload
from mics_core.sharding import Precision, Sharding
from workloads_by_hand import workload

RESULTS = Path(__file__).parents[2] / "bench" / "results"
SPEED = 1e12
"""FLOP/s; the stand-in's seconds are turned into FLOPs and back."""

RANKS = 8
"""Of the rows that the fit is made from."""

HOST_ROW, INSIDE_ROW, PEER_ROW = (("peers-100", name, 8) for name in ("mics 1,1,1", "mics 2,2,2", "HSDP 2"))
CALIBRATION = {HOST_ROW, INSIDE_ROW, PEER_ROW}

# Not fitted. gloo's time for a few bytes, 0.4 ms where nothing else runs, and 4 ranks share a core; memory as
# bench/results/cpu/kernels.json has it for buffers of this size, shared alike; headers take 1 % of a link.
MESSAGE, MEMORY, PAYLOAD = 1.6e-3, 2.5e9, 0.99


@dataclass(frozen=True)
class Fit:
    """The three numbers that are fitted, each to the row of CALIBRATION that depends on it most."""

    host: float = 1e-3  # seconds of the host at every unit under our runtime
    inside: float = 1e8  # bytes a second from rank to rank in a node
    peer: float = 1e-3  # as host, under FSDP2


@dataclass(frozen=True)
class Row:
    """A measured step."""

    scene: dict[str, Any]
    variant: str
    micro_steps: int
    seconds: float

    @property
    def ranks(self) -> int:
        return int(self.scene["nodes"] * self.scene["ranks_per_node"])

    @property
    def key(self) -> tuple[str, str, int]:
        return self.scene["name"], self.variant, self.micro_steps

    def cluster(self, fit: Fit) -> Cluster:
        """The emulated cluster; all ranks share the machine's cores, so more ranks are slower ones."""
        crowd = self.ranks / RANKS
        wire = 1e-3 * self.scene["latency_ms"]
        hooks = json.loads((RESULTS / "cpu" / "host.json").read_text())
        plain = 1e6 * hooks["microseconds"]["plain PyTorch"]["median"] / hooks["units"]
        ours = plain + hooks["cost_per_unit"]["mics"]
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
                "mics": fit.host * crowd,
                "DDP": fit.host * crowd * plain / ours,
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
        return turn(self.workload(), self.cluster(fit), choice, system, self.scene["steps"])

    @property
    def predicted(self) -> float:
        return self.predict(fitted())


@cache
def rows() -> dict[tuple[str, str, int], Row]:
    """All measured steps but those without `mics.accumulate`, whose schedule is not simulated."""
    found = {}
    for path in sorted((RESULTS / "cluster").glob("*.json")):
        record = json.loads(path.read_text())
        for case in record["cases"]:
            for variant, figures in case["variants"].items():
                row = Row(record["scene"], variant, case["micro_steps"], figures["spread"]["median"])
                if "no-overlap" not in variant:
                    found[row.key] = row
    return found


@cache
def fitted() -> Fit:
    """The numbers that give the rows of CALIBRATION: each in turn by bisection, a few times."""
    fit = Fit()
    for _ in range(4):
        fit = replace(fit, host=_bisect(HOST_ROW, lambda x, now=fit: replace(now, host=x), 1e-6, 1e-1))
        fit = replace(fit, inside=1 / _bisect(INSIDE_ROW, lambda x, now=fit: replace(now, inside=1 / x), 1e-10, 1e-6))
        fit = replace(fit, peer=_bisect(PEER_ROW, lambda x, now=fit: replace(now, peer=x), 1e-6, 1e-1))
    return fit


def _bisect(key: tuple[str, str, int], fit_of: Callable[[float], Fit], low: float, high: float) -> float:
    """What makes the row's step as long as it was; the more, the longer."""
    row = rows()[key]
    for _ in range(20):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if row.predict(fit_of(middle)) > row.seconds else (middle, high)
    return (low * high) ** 0.5


def wire_bound() -> list[Row]:
    """Where wires or waits take the time; at 400 Mbit/s with nothing to compute the two cores do."""
    return [row for row in rows().values() if row.scene["rate_mbit"] <= 100 or row.scene["stand_in"]["forward"]]


def errors(of: list[Row]) -> dict[tuple[str, str, int], float]:
    return {row.key: row.predicted / row.seconds - 1 for row in of}


def test_steps_that_nothing_was_fitted_to_are_within_15_percent() -> None:
    unseen = {key: error for key, error in errors(wire_bound()).items() if key not in CALIBRATION}
    assert len(unseen) >= 12
    assert len({row.variant for row in wire_bound()}) >= 8
    assert {key: round(error, 3) for key, error in unseen.items() if abs(error) > 0.15} == {}


def test_the_mean_error_is_a_few_percent() -> None:
    found = [abs(error) for error in errors(wire_bound()).values()]
    assert sum(found) / len(found) < 0.05


def test_variants_that_differ_by_more_than_10_percent_are_ranked_rightly() -> None:
    pairs = right = 0
    for one, other in combinations(rows().values(), 2):
        slower, faster = sorted((one, other), key=lambda row: -row.seconds)
        alike = one.scene["name"] == other.scene["name"] and one.micro_steps == other.micro_steps
        if alike and slower.seconds > 1.1 * faster.seconds:
            pairs += 1
            right += slower.predicted > faster.predicted
    assert pairs >= 12
    assert right / pairs >= 0.95, f"{right} of {pairs}"


def test_no_prediction_is_below_the_limit_that_the_bench_works_out() -> None:
    for path in sorted((RESULTS / "cluster").glob("*.json")):
        for case in json.loads(path.read_text())["cases"]:
            for variant, figures in case["variants"].items():
                key = (path.stem, variant, case["micro_steps"])
                if figures["expected"] and key in rows():
                    assert rows()[key].predicted >= 0.99 * figures["expected"]["limit"], key


def test_the_fit_meets_its_rows_with_numbers_that_can_be_true() -> None:
    for key in CALIBRATION:
        assert rows()[key].predicted == pytest.approx(rows()[key].seconds, rel=0.01), key
    assert 1e-4 < fitted().host < 1e-2
    assert 1e-4 < fitted().peer < 1e-2
    assert 2e7 < fitted().inside < 1e9
