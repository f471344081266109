"""Ranks that share one GPU: what they move and train is right, through the host's memory or by NCCL over sockets.

python -m bench.gpu.shared NOTES --ranks 4 [--nccl] [--pretend]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from bench import ranks
from bench.gpu.stand import arguments, environment, stand


def main(words: Sequence[str] | None = None) -> int:
    """Start the ranks, and write down what rank 0 tells."""
    parser = arguments(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--nccl", action="store_true", help="by NCCL, told that each rank is a host of its own")
    options = parser.parse_args(words)
    here = stand(options)
    how = "nccl" if options.nccl else "staged"
    told = ["bench.gpu.shared_work", how, "pretend" if here.pretends else "gpu"]
    # Without a network a host's name may lead nowhere.
    names = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if here.pretends:
        names["CUDA_VISIBLE_DEVICES"] = ""
    with environment(**{name: os.environ.get(name, value) for name, value in names.items()}):
        found = ranks.run(options.ranks, told, options.seconds - 10)
    here.write(f"{options.ranks} ranks, {how}", found)
    return 0 if found["right"] else 1


if __name__ == "__main__":
    sys.exit(main())
