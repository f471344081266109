"""How far a long work is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mics_models.data.extras import extra

LINES = 10  # at most


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show on standard error how many of `total` bytes are done; call what this gives with the bytes done since."""
    if not sys.stderr.isatty():
        yield _lines(what, total)
        return
    rich = extra("rich.progress")
    columns = (
        *rich.Progress.get_default_columns(),
        rich.DownloadColumn(binary_units=False),
        rich.TransferSpeedColumn(),
    )
    with rich.Progress(*columns, console=extra("rich.console").Console(stderr=True)) as bars:
        bar = bars.add_task(what, total=total)
        yield lambda size: bars.advance(bar, size)


def _lines(what: str, total: int) -> Callable[[int], None]:
    begin = time.monotonic()
    done = told = 0

    def advance(size: int) -> None:
        nonlocal done, told
        done += size
        if (now := LINES * done // max(1, total)) > told:
            told = now
            speed = done / max(1e-9, time.monotonic() - begin)
            numbers = f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB, {speed / 1e6:,.1f} MB/s"
            print(f"{what}: {100 * done // total:3} %, {numbers}", file=sys.stderr, flush=True)

    return advance
