"""Tests in a process of their own, with kernels compiled.

python -m bench.gpu.pytests NOTES --seconds 60 [--pretend] tests/kernels
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bench.gpu.stand import arguments, stand
from bench.record import ROOT

LONGEST_TEXT = 20_000
"""Characters kept of what failing tests print."""


@dataclass(frozen=True)
class TestOutcome:
    """How the tests went."""

    __test__ = False  # pytest would collect it by its name

    status: str  # passed, failed, or out of time
    counts: dict[str, int]
    seconds: float
    failures: str  # what pytest printed about them


def run_tests(tests: Sequence[str], seconds: float) -> TestOutcome:
    """Run pytest on `tests` in a process of its own: compiled kernels, and no crash that ends the benchmarks."""
    # What other plugins a rented machine has, and warns about, is none of our tests' business: they run with none.
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-u", "-m", "pytest", *tests, "-v", "--tb=short", "--color=no"]
    command += ["-W", "default"]  # nor are the warnings of its versions
    if importlib.util.find_spec("xdist"):
        command += ["-p", "xdist.plugin", "-n", str(min(12, os.cpu_count() or 1))]  # compilers want a core each
        # Ranks are a pool of one process of tests: twelve pools would share the GPU.
        command += ["--dist", "loadgroup" if any("ranks" in each for each in tests) else "worksteal"]
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        # A group of its own, so that nothing of it still runs on the GPU when the benchmarks begin.
        run = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = run.wait(timeout=seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # whoever interrupts wants to know how far it came
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        printed.seek(0)
        text = printed.read()
    return TestOutcome(
        status="out of time" if status is None else "passed" if status == 0 else "failed",
        counts=counts(text),
        seconds=time.monotonic() - begun,
        failures="" if status == 0 else failures(text),
    )


def counts(text: str) -> dict[str, int]:
    """How many tests passed, failed, ...: read off the verbose lines, so that a killed run still says."""
    word = r"(PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)"
    # "tests/a.py::test PASSED [ 5%]" from one process, "[gw0] [ 5%] PASSED tests/a.py::test" from several
    lines = re.findall(rf"^\S+\.py::.* {word}\s+\[ *\d+%\]$|^\[gw\d+\] \[ *\d+%\] {word} \S+\.py::", text, re.M)
    return dict(Counter(one or several for one, several in lines))


def failures(text: str) -> str:
    """What pytest printed about failing tests; without such a section (a crash, no time), the end of all it printed."""
    section = re.search(r"^=+ (?:FAILURES|ERRORS) =+$", text, re.M)
    return text[section.start() :][:LONGEST_TEXT] if section else text[-LONGEST_TEXT:]


def main(words: Sequence[str] | None = None) -> int:
    """Run them, and write down how it went."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have told all to ignore it
    parser = arguments(__doc__)
    parser.add_argument("tests", nargs="+", help="folders and files, or pytest's options behind --")
    options = parser.parse_args(words)
    here = stand(options)
    outcome = run_tests(options.tests, options.seconds - 12)  # importing torch comes before, writing it down after
    print(outcome.failures, file=sys.stderr)
    here.write("tests", outcome)
    return 0 if outcome.status == "passed" else 1


if __name__ == "__main__":
    sys.exit(main())
