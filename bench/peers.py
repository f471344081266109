"""A training step against the peers on emulated nodes, in one run: seconds, and bytes that leave a node.

    python -m bench.peers

4 nodes of 2 ranks, 4 micro-steps; FSDP2 HSDP sums between replicas in the last micro-step only, its best setting. A
step is timed to the end of all that it started, so nothing of ours hides in the next one. The runtimes take turns, and
must agree on the loss.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from bench import record
from bench.cluster import Cluster, unavailable
from bench.links import NODES, RANKS, result

NAMES = ["HSDP 4", "mics 4,4,4", "mics 2,2,4"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"default: {NAMES}; also 'FSDP2', 'DDP'; the first is the base")
    parser.add_argument("--rate", type=float, default=100.0, help="Mbit/s of each node's link")
    parser.add_argument("--latency", type=float, default=1.0, help="ms between two nodes, one way")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--micro-steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=record.RESULTS / "cpu" / "peers.json")
    options = parser.parse_args(arguments)
    names = options.names or NAMES
    if reason := unavailable():
        print(f"peers: left out: {reason}")
        return 0
    sizes = [options.width, options.blocks, options.micro_steps, options.rounds]
    with Cluster(NODES, options.rate, options.latency) as cluster:
        work = str(Path(__file__).with_name("peers_work.py"))
        outputs = cluster.torchrun([work, json.dumps(names), *map(str, sizes)], RANKS, timeout=1800).outputs
        fidelity = cluster.fidelity()
    found = result(outputs)
    last = [losses[-1] for losses in found["losses"].values()]
    if max(last) - min(last) > 1e-4 * abs(last[0]):
        raise AssertionError(f"peers: the runtimes disagree on the loss: {dict(zip(names, last, strict=True))}")
    seconds = {name: median(found["seconds"][name]) for name in names}
    sent = {name: median(found["sent"][name]) for name in names}
    base = names[0]
    print(f"| | s per step | times as fast as {base} | MB that leave a node | of {base}'s |\n|---|---|---|---|---|")
    for name in names:
        print(
            f"| {name} | {seconds[name]:.2f} | {seconds[base] / seconds[name]:.2f} | {sent[name] / 1e6:.1f} | "
            f"{sent[name] / sent[base]:.3f} |"
        )
    content = {
        "command": ["python", "-m", "bench.peers", *(sys.argv[1:] if arguments is None else arguments)],
        "machine": record.machine(),
        "commit": record.commit(),
        "nodes": NODES,
        "ranks_per_node": RANKS,
        "rate_mbit": options.rate,
        "latency_ms": options.latency,
        "parameters": 2 * options.blocks * options.width**2,
        "micro_steps": options.micro_steps,
        "switch_late_ms": fidelity.mean_late_ms,
        "seconds": found["seconds"],
        "sent": found["sent"],
        "losses": found["losses"],
    }
    print(f"saved {record.save(options.out, content)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
