"""Every kernel's bandwidth beside the best torch idiom's and a copy's.

python -m bench.gpu.bandwidth NOTES --seconds 60 [--pretend] [--ops pack,adamw]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from bench.gpu.stand import arguments, stand
from bench.kernel_bench import Bench, Outcome, run_all
from bench.kernel_cases import MB, OPS, cases
from bench.kernels import chosen_ops, progress

CEILING, CASE, DROPPED = "ceiling", "case", "dropped"
"""What findings are called."""


def main(words: Sequence[str] | None = None) -> int:
    """Measure what time allows; wrong results are a failure, missed goals are told."""
    parser = arguments(__doc__)
    parser.add_argument("--ops", type=chosen_ops, default=list(OPS), help="some of them, as pack,adamw")
    options = parser.parse_args(words)
    here, end = stand(options), time.monotonic() + options.seconds - 5
    wrong: list[str] = []

    def report(outcome: Outcome) -> None:
        progress(outcome)
        here.write(CASE, outcome)
        wrong.extend([outcome.name] if outcome.error else [])

    bench = Bench(here.device, seconds=0.0 if here.pretends else 0.4, largest_copy=here.small(1024, 1) * MB)
    here.write(CEILING, bench.ceiling())
    chosen = cases(here.device, options.ops, quick=here.pretends)
    here.write(DROPPED, run_all(bench, chosen, report, deadline=end))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
