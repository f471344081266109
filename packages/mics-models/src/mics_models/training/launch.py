"""torchrun without its last words: `python -m mics_models.training.launch TORCHRUN-ARGUMENTS`.

Where ranks end with an error or by a signal, torchrun adds fifty lines to what rank 0 has said. This says nothing more,
and ends with the ranks' exit status.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

TOLD = (1, 2, 3)
"""The exit statuses of pretrain, which has said why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    logging.disable()
    # torchrun passes on what it gets, and a Python that is still importing answers SIGINT with a traceback. By SIGUSR1
    # torchrun itself ends, without a word to its ranks.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        run.main(sys.argv[1:] if arguments is None else list(arguments))
    except ChildFailedError as failed:
        statuses = {rank: failure.exitcode for rank, failure in failed.failures.items()}
        rank = min(statuses, key=lambda rank: statuses[rank] == -signal.SIGTERM)  # as torchrun ends the others
        if statuses[rank] not in TOLD:
            print(f"launch: rank {rank} ended with exit status {statuses[rank]}, expected 0", file=sys.stderr)
        return statuses[rank] if statuses[rank] > 0 else 128 - statuses[rank]
    except SignalException as asked:
        return 128 + asked.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
