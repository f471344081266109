"""All that needs a GPU, in one command: the tests, kernels compiled, and the kernel benchmarks into one JSON; then
training steps on one GPU and on all, against PyTorch's runtimes, into another.

    python -m bench.gpu_check [--out DIR] [--minutes 5] [--ops pack,adamw] [--skip-tests] [--skip-training]
        [--commit HASH]

The record is written before the first step and after every one, so a run that is killed leaves what it had. Failed
tests and wrong results are a failure; missed goals are printed and recorded.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.kernel_bench import Bench, Outcome, run_all
from bench.kernel_cases import OPS, Case, cases
from bench.kernels import chosen_ops, kernels_table, progress
from bench.record import RESULTS, ROOT, folder, plain, save, stamp

TESTS = [ROOT / "tests" / "kernels", ROOT / "tests" / "gpu"]

TESTS_SHARE = 0.6
"""Of the time, that the tests may take: they mostly wait for compilers."""

TRAINING_SECONDS = 240.0
"""That training may take, beyond the minutes asked for."""

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


def run_tests(tests: Sequence[Path], seconds: float) -> TestOutcome:
    """Run pytest on `tests` in a process of its own: compiled kernels, and no crash that ends the benchmarks."""
    # What other plugins a rented machine has, and warns about, is none of our tests' business: they run with none.
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-u", "-m", "pytest", *map(str, tests), "-v", "--tb=short", "--color=no"]
    command += ["-W", "default"]  # nor are the warnings of its versions
    if importlib.util.find_spec("xdist"):
        command += ["-p", "xdist.plugin", "-n", str(min(8, os.cpu_count() or 1))]  # compilers want a core each
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        # A group of its own, so that nothing of it still runs on the GPU when the benchmarks begin.
        run = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = run.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
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


def check(
    make_bench: Callable[[], Bench],
    path: Path,
    record: dict[str, Any],
    *,
    tests: Sequence[Path] | None,
    chosen: Sequence[Case],
    seconds: float,
) -> bool:
    """Run tests, then cases, within `seconds`; keep `record` at `path` up to date; say whether all is right."""
    end = time.monotonic() + seconds
    outcomes: list[Outcome] = []

    def keep(**news: Any) -> None:
        record.update(news)
        save(path, record)

    keep(tests=None, ceiling=None, cases=[], dropped=[case.name for case in chosen], error="", finished=False)
    right = True
    if tests is not None:
        tested = run_tests(tests, TESTS_SHARE * seconds)
        right = tested.status == "passed"
        print(f"tests {tested.status}: {tested.counts} in {tested.seconds:.0f} s", file=sys.stderr, flush=True)
        if not right:
            print(tested.failures, file=sys.stderr, flush=True)
        keep(tests=tested)

    def report(outcome: Outcome) -> None:
        outcomes.append(outcome)
        progress(outcome)
        left = record["dropped"]
        keep(cases=outcomes, dropped=[name for name in left if name != outcome.name])

    try:
        bench = make_bench()
        keep(ceiling=bench.ceiling())
        print(f"copy: {record['ceiling']['gb_per_s']:.4g} GB/s", file=sys.stderr, flush=True)
        run_all(bench, chosen, report, deadline=end)
    except Exception as error:  # the record must say why there are no figures
        keep(error=f"{type(error).__name__}: {error}\n{traceback.format_exc()[-4000:]}")
        print(record["error"], file=sys.stderr, flush=True)
    keep(finished=True)
    print(kernels_table(plain(outcomes)))
    if record["dropped"]:
        print(f"\nout of time, so not measured: {', '.join(record['dropped'])}")
    for outcome in outcomes:
        if outcome.missed:
            print(f"missed: {outcome.name}: {'; '.join(outcome.missed)}")
    return right and not record["error"] and not any(outcome.error for outcome in outcomes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check this machine's GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record; default bench/results")
    parser.add_argument("--minutes", type=float, default=5.0, help="after which what is left is dropped; default 5")
    parser.add_argument("--ops", type=chosen_ops, default=list(OPS), help="of the benchmarks, as pack,adamw")
    parser.add_argument("--skip-tests", action="store_true", help="only the benchmarks")
    parser.add_argument("--skip-training", action="store_true", help="without training steps")
    parser.add_argument("--commit", default="", help="the commit, where the tree was copied without its history")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA GPU and torch finds none here: run it on a machine with one", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    words = ["python", "-m", "bench.gpu_check", *(sys.argv[1:] if arguments is None else arguments)]
    path = options.out / folder(device) / "gpu-check.json"
    record = stamp(words, device, options.commit)
    tests = None if options.skip_tests else TESTS
    bench = partial(Bench, device, seconds=0.4)
    chosen, seconds = cases(device, options.ops), 60 * options.minutes
    right = check(bench, path, record, tests=tests, chosen=chosen, seconds=seconds)
    print(f"\nwritten to {path}", file=sys.stderr)
    if not options.skip_training:
        right &= train(options.out, options.commit)
    return 0 if right else 1


def train(out: Path, commit: str, seconds: float = TRAINING_SECONDS) -> bool:
    """Measure training steps on one GPU and on all, in processes of their own; whether that went well, and in time."""
    words = [sys.executable, "-m", "bench.training", "--seconds", "15", "--out", str(out), "--commit", commit]
    with subprocess.Popen(words, cwd=ROOT) as running:
        try:
            return running.wait(timeout=seconds) == 0
        except subprocess.TimeoutExpired:
            print(f"training took longer than {seconds:.0f} s, so none of it is recorded", file=sys.stderr)
            return False
        finally:
            if running.poll() is None:
                running.send_signal(signal.SIGINT)  # it ends its ranks, which a kill of it would leave on the GPUs


if __name__ == "__main__":
    sys.exit(main())
