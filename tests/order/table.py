"""Prints what the order check records and finds: `python tests/order/table.py --help`; PYTHONPATH as for the tests.

The whole table takes half an hour of one free core, `--every 13` some minutes. Exit status 1 if anything was found that
is not planted, or a planted fault was not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import islice

import torch

from checking import Found, check, compare_ranks
from matrix import ALL, MAIN, deep_runs, large_runs, rank_runs
from planted import FAULTS
from scenarios import SCENARIOS
from training import Setting


class Row:
    """Sums of runs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.worlds: set[tuple[int, int, tuple[int, int, int]]] = set()
        self.programs = self.operators = self.events = self.orders = self.reused = self.faults = self.differ = 0

    def add(self, setting: Setting, found: Found) -> None:
        self.worlds.add((setting.world, setting.per_node, setting.sharding))
        self.programs += 1
        self.operators += found.operators
        self.events += found.events
        self.orders += found.orders
        self.reused += found.reused
        self.faults += len(found.broken)
        self.differ += len(found.differ)

    def __str__(self) -> str:
        counts = (len(self.worlds), self.programs, self.operators, self.events, self.orders, self.reused)
        return f"{self.name:18}" + "".join(f"{n:>11,}" for n in (*counts, self.faults, self.differ))


HEADS = ("shardings", "programs", "operators", "events", "orders", "reused", "broken", "differ")


def runs(names: list[str]) -> Iterator[tuple[str, Setting, int | None]]:
    """Scenario and setting, and how many random orders are played beside the late ones, if any are."""
    for name in names:
        for sharding in ALL:
            for number, setting in enumerate(deep_runs(name, sharding)):
                yield name, setting, None if number and sharding not in MAIN else 2
    for name, setting in large_runs():
        yield f"{name}, 64 ranks", setting, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), help="these scenarios")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every Nth run alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun, bad = time.monotonic(), 0
    rows: dict[str, Row] = {}
    for name, setting, chances in islice(runs(options.only), 0, None, options.every):
        found = check(name.partition(",")[0], setting, chances=chances)
        rows.setdefault(name, Row(name)).add(setting, found)
        for line in found.told:
            print(f"{name}: {setting}\n    {line}", flush=True)
        bad += bool(found.told)
    print(f"{'scenario':18}" + "".join(f"{head:>11}" for head in HEADS))
    total = Row("all")
    for row in rows.values():
        print(row)
        total.worlds |= row.worlds
        for count in ("programs", "operators", "events", "orders", "reused", "faults", "differ"):
            setattr(total, count, getattr(total, count) + getattr(row, count))
    print(total)
    compared = rank_runs()[:: options.every]
    told = [line for name, setting in compared for line in compare_ranks(name, setting)]
    print(f"all ranks compared in {len(compared)} worlds of 8: {len(told)} differences")
    bad += len(told)
    bad += _plant()
    print(f"{time.monotonic() - begun:.0f} s")
    return bool(bad)


def _plant() -> int:
    """Each fault in turn; how many were missed."""
    missed = played = 0
    print("\nplanted")
    for name, fault in FAULTS.items():
        if fault.between_ranks:
            rules = "R4" if compare_ranks(fault.scenario, fault.setting, fault=name) else ""
            found = Found()
        else:
            found = check(fault.scenario, fault.setting, chances=1, fault=name)
            rules = " ".join(sorted({each.rule for each in found.broken}))
        print(f"  {name:75} {rules or 'MISSED':12}" + (f"{len(found.differ)} orders differ" if found.differ else ""))
        missed += not rules
        played += bool(found.differ)
    print(f"{len(FAULTS)} planted, {len(FAULTS) - missed} found by the rules, {played} by playing")
    return missed


if __name__ == "__main__":
    sys.exit(main())
