"""How much of a slow link refresh, hop 2 and both behind each other use, between emulated nodes.

    python -m bench.links

The share of a link is the time that a node's bytes need at the link's rate, over the time that they took.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import record
from bench.cluster import Cluster, unavailable
from bench.harness import quantile
from bench.ranks import result

ACTIONS = ("refresh", "hop 2", "both")
RANKS = 2


def run(nodes: int, rate: float, latency: float, sizes: Sequence[float]) -> list[dict[str, Any]]:
    """A row for each size: the shares of the link that each transfer reached."""
    words = ["-m", "bench.links_work", str(RANKS), *map(str, sizes)]
    with Cluster(nodes, rate, latency) as cluster:
        found = result(cluster.torchrun(words, RANKS, timeout=600).outputs)
    return [
        {"rate_mbit": rate, "megabytes": size, "share": {name: shares(each, name, rate) for name in ACTIONS}}
        for size, each in zip(sizes, found, strict=True)
    ]


def shares(found: Mapping[str, Any], name: str, rate: float) -> dict[str, float]:
    """The least, the median and the largest share in all rounds."""
    least = found["sent_by_node"][name] * 8 / (rate * 1e6)
    reached = [least / seconds for seconds in found["seconds"][name]]
    return {"least": min(reached), "median": quantile(reached, 0.5), "most": max(reached), "rounds": len(reached)}


def links_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """As Markdown: medians, and between which shares the rounds lie."""

    def cell(share: Mapping[str, float]) -> str:
        return f"{share['median']:.3f} ({share['least']:.3f}-{share['most']:.3f})"

    texts = [
        [f"{row['rate_mbit']:g}", f"{row['megabytes']:g}", *[cell(row["share"][name]) for name in ACTIONS]]
        for row in rows
    ]
    return record.table(["Mbit/s", "MB", *ACTIONS], texts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(prog="python -m bench.links", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--nodes", type=int, default=4, help=f"of {RANKS} ranks")
    parser.add_argument("--rates", type=float, nargs="+", default=[100, 400], help="Mbit/s of each node's link")
    parser.add_argument("--sizes", type=float, nargs="+", default=[4, 8], help="MB that a rank's buffer holds")
    parser.add_argument("--latency", type=float, default=1.0, help="ms between two nodes, one way")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "cpu" / "links.json")
    options = parser.parse_args(arguments)
    if reason := unavailable():
        print(f"links: left out: {reason}")
        return 0
    words = ["python", "-m", "bench.links", *(sys.argv[1:] if arguments is None else arguments)]
    content = record.stamp(words, "cpu") | {"ranks_per_node": RANKS, "latency_ms": options.latency}
    rows = [row for rate in options.rates for row in run(options.nodes, rate, options.latency, options.sizes)]
    print(links_table(rows))
    print(f"saved {record.save(options.out, content | {'nodes': options.nodes, 'rows': rows})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
