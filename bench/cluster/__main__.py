"""Run a script with torchrun on an emulated cluster, and print the bytes that each node sent and received.

python -m bench.cluster --nodes 4 --ranks 2 --rate 100 --latency 1 -- script.py ARGUMENTS...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bench.cluster import Cluster


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m bench.cluster", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1, help="processes on each node")
    parser.add_argument("--rate", type=float, default=100.0, help="of each node's link, in Mbit/s; default 100")
    parser.add_argument("--latency", type=float, default=1.0, help="between two nodes, one way, in ms; default 1")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds; default 3600")
    parser.add_argument("script", nargs="+", help="what torchrun runs, behind --")
    options = parser.parse_args(arguments)
    try:
        with Cluster(options.nodes, options.rate, options.latency) as cluster:
            run = cluster.torchrun(options.script, options.ranks, timeout=options.timeout, capture=False)
            quality = cluster.fidelity()
    except (ValueError, RuntimeError, TimeoutError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    for node, (sent, received) in enumerate(run.traffic):
        print(f"node {node}: sent {sent / 1e6:.3f} MB, received {received / 1e6:.3f} MB")
    print(
        f"{run.seconds:.1f} s; the switch used {quality.cpu_seconds / run.seconds:.1%} of a core and was late by "
        f"{quality.mean_late_ms:.2f} ms on average, {quality.worst_late_ms:.2f} ms at worst; {quality.dropped} dropped"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
