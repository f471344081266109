"""All that needs a GPU: probes, tests and benchmarks, in two calls of nine minutes.

    python -m bench.gpu_check [--part 2 --part 5] [--minutes 9] [--out DIR] [--commit HASH] [--pretend]

The most telling comes first, and each step runs in a process of its own. The record is written before the first step
and after every one, so a run that is killed leaves what it had. Each step may take its share of the time that is left.
Failed tests and wrong results are a failure; missed goals are printed and recorded. `--pretend` tries the command on a
CPU: all is small, and what only a GPU has is left out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu.bandwidth import CASE, CEILING, DROPPED
from bench.gpu.steps import Outcome, Step, run, steps
from bench.gpu.steps import outcome as ended
from bench.kernels import kernels_table
from bench.record import RESULTS, folder, plain, save, stamp

Run = Callable[[Step, float], Outcome]


def check(chosen: Sequence[Step], path: Path, record: dict[str, Any], seconds: float, perform: Run) -> bool:
    """Perform the steps within so many seconds, and keep `record` at `path` up to date; whether all passed."""
    end = time.monotonic() + seconds
    left = list(chosen)
    outcomes: list[Any] = []

    def keep(**news: Any) -> None:
        record.update(news)
        save(path, record)

    keep(steps=outcomes, left=[step.name for step in left], ceiling=None, cases=[], finished=False)
    while left:
        remaining = end - time.monotonic()
        if remaining < 1:
            break
        step = left[0]
        share = step.seconds / sum(each.seconds for each in left)
        print(f"part {step.part}, {step.name}: at most {remaining * share:.0f} s", file=sys.stderr, flush=True)
        begun = time.monotonic()
        try:
            outcome = perform(step, remaining * share)
        except Exception:  # what goes wrong about one step is no reason to lose the others
            took = time.monotonic() - begun
            outcome = ended(step, "failed", took, remaining * share, [], traceback.format_exc())
        left.pop(0)
        outcomes.append(plain(outcome))
        news = _kernels(outcome.findings)
        keep(steps=outcomes, left=[each.name for each in left], **news)
        print(f"  {outcome.status} in {outcome.seconds:.0f} s", file=sys.stderr, flush=True)
        if outcome.output:
            print(outcome.output, file=sys.stderr, flush=True)
    keep(finished=True)
    return not left and all(outcome["status"] == "passed" for outcome in outcomes)


def _kernels(findings: Sequence[Any]) -> dict[str, Any]:
    """What tables read, where a step has found it."""
    ceilings = [each["found"] for each in findings if each["name"] == CEILING]
    if not ceilings:
        return {}
    named: dict[str, Any] = {"ceiling": ceilings[0]}
    named["cases"] = [each["found"] for each in findings if each["name"] == CASE]
    named["dropped"] = next((each["found"] for each in findings if each["name"] == DROPPED), [])
    return named


def summary(record: dict[str, Any]) -> str:
    """For whoever waits at the screen."""
    done, cases = record["steps"], record["cases"]
    lines = [f"part {each['part']}, {each['step']}: {each['status']}, {each['seconds']:.0f} s" for each in done]
    lines += [f"{name}: no time was left" for name in record["left"]]
    missed = [f"missed: {each['op']} {each['scene']}: {'; '.join(each['missed'])}" for each in cases if each["missed"]]
    table = [kernels_table(cases), ""] if cases else []
    return "\n".join([*table, *missed, *lines])


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command's words."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", type=int, action="append", help="only this, from 0 for probes to 8; may be repeated")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which what is left is dropped; default 9")
    parser.add_argument("--out", type=Path, help="folder of the records; default bench/results, pretended a new one")
    parser.add_argument("--commit", default="", help="the commit, where the tree was copied without its history")
    parser.add_argument("--pretend", action="store_true", help="on a CPU, small, to try the command")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check this machine's GPUs."""
    options = parsed(arguments)
    if not options.pretend and not torch.cuda.is_available():
        print("gpu-check needs a CUDA GPU and torch finds none here: run it on a machine with one", file=sys.stderr)
        return 1
    out = options.out or (Path(tempfile.mkdtemp(prefix="gpu-check-")) if options.pretend else RESULTS)
    device = torch.device("cpu") if options.pretend else torch.device("cuda", 0)
    words = ["python", "-m", "bench.gpu_check", *(sys.argv[1:] if arguments is None else arguments)]
    chosen = [
        step
        for step in steps(2 if options.pretend else torch.cuda.device_count(), pretend=options.pretend)
        if options.part is None or step.part in options.part
    ]
    name = "-".join(["gpu-check", *map(str, options.part or [])])
    path = out / folder(device) / f"{name}.json"
    record = stamp(words, device, options.commit) | {"pretended": options.pretend}
    more = ["--out", str(out), "--commit", options.commit]

    def perform(step: Step, limit: float) -> Outcome:
        return run(step, limit, more, pretend=options.pretend)

    right = check(chosen, path, record, 60 * options.minutes, perform)
    print(summary(record))
    print(f"\nwritten to {path}", file=sys.stderr)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
