"""Every op of mics_kernels against the best torch idiom for the same work.

python -m bench.kernels [--quick] [--ops pack,adamw] [--out NAME]     a table, and a JSON under bench/results/
pytest bench/kernels.py --benchmark-only                              pytest-benchmark's own tables
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from bench.harness import Ratio
from bench.kernel_bench import NOISE, OURS, Bench, Outcome, run_all
from bench.kernel_cases import KB, MB, OPS, Case, cases, size_text
from bench.record import RESULTS, folder, plain, save, stamp, table
from bench.work import Work, check
from mics_kernels.backend import INTERPRETED

LARGE = 16 * MB
"""A flat buffer that does not fit into most caches."""


def progress(outcome: Outcome) -> None:
    """One line for a case, where it does not mix with the table."""
    if outcome.error:
        print(f"{outcome.name}: FAILED: {outcome.error.splitlines()[0][:200]}", file=sys.stderr, flush=True)
        return
    view = next(iter(outcome.views.values()))
    said = f"{outcome.gb_per_s:.4g} GB/s, {view.speedup.value:.2f}x as fast as {view.idiom}"
    print("; ".join([f"{outcome.name}: {said}", *outcome.missed]), file=sys.stderr, flush=True)


def kernels_table(found: Sequence[Mapping[str, Any]]) -> str:
    """The cases of a record as a table; a speedup is the fastest idiom's time over ours, and between what it lies."""
    names = list(dict.fromkeys(name for case in found for name in case["views"]))
    header = ["op", "scene", "size", "us", "GB/s", "of copy", "fastest idiom", *names, "missed"]
    rows = []
    place = {op: number for number, op in enumerate(OPS)}
    for case in sorted(found, key=lambda each: (place[each["op"]], each["scene"], each["size"])):
        start = [case["op"], case["scene"], size_text(case["size"])]
        if case["error"]:
            rows.append([*start, *[""] * (len(names) + 4), case["error"].splitlines()[0][:80]])
            continue
        main = next(iter(case["views"].values()))
        speedups = [Ratio(**view["speedup"]).told() if view else "" for view in map(case["views"].get, names)]
        took, share = main["times"][OURS]["median"], case["of_copy"]["value"]
        figures = [f"{took * 1e6:.4g}", f"{case['gb_per_s']:.4g}", f"{share:.2f}"]
        rows.append([*start, *figures, main["idiom"], *speedups, "; ".join(case["missed"])])
    return table(header, rows)


def kernels_note(found: Sequence[Mapping[str, Any]]) -> str:
    """How many cases are faster than their fastest idiom, and slower, of all sizes and of large ones."""
    large = [case for case in found if case["size"] >= LARGE]
    return f"{_counted(found)} Of buffers of {size_text(LARGE)} and more: {_counted(large)}"


def _counted(found: Sequence[Mapping[str, Any]]) -> str:
    speedups = [next(iter(case["views"].values()))["speedup"] for case in found if case["views"]]
    faster = sum(each["value"] > 1 + NOISE and each["low"] > 1 for each in speedups)
    slower = sum(each["value"] < 1 - NOISE and each["high"] < 1 for each in speedups)
    return (
        f"{len(speedups)} cases, {faster} faster than the fastest torch idiom for the same work, {slower} slower, the "
        f"others alike within {NOISE:.0%} or the noise."
    )


def default_device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def chosen_ops(text: str) -> list[str]:
    """An argument such as `pack,adamw`."""
    ops = [op for op in text.split(",") if op]
    if not ops or not set(ops) <= set(OPS):
        raise argparse.ArgumentTypeError(f"got {text}, expected some of {','.join(OPS)}")
    return ops


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write a record; missed goals are no failure, wrong results are."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--ops", type=chosen_ops, default=list(OPS), help="some of them, as pack,adamw")
    parser.add_argument("--threads", type=int, help="of torch on a CPU: 1 where other programs want the cores, too")
    parser.add_argument(
        "--seconds", type=float, help="for the rounds of one case; default 0.8, on a GPU 0.4, quick 0.1"
    )
    parser.add_argument("--out", help="name of the record under bench/results/; default kernels, or kernels-quick")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        print("TRITON_INTERPRET=1 is set: unset it, for the interpreter's speed says nothing", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    device = default_device()
    usual = (0.1 if options.quick else 0.8) if device.type == "cpu" else 0.4
    bench = Bench(device, seconds=usual if options.seconds is None else options.seconds)
    words = ["python", "-m", "bench.kernels", *(sys.argv[1:] if arguments is None else arguments)]
    record = stamp(words, device)
    if device.type == "cpu" and record["load"] > 0.5:
        print(f"others use this machine (load {record['load']:.1f}): --threads 1 is less noisy", file=sys.stderr)
    outcomes: list[Outcome] = []

    def report(outcome: Outcome) -> None:
        outcomes.append(outcome)
        progress(outcome)

    ceiling = bench.ceiling()
    print(f"copy: {ceiling['gb_per_s']:.4g} GB/s", file=sys.stderr)
    run_all(bench, cases(device, options.ops, quick=options.quick), report)
    print(kernels_table(plain(outcomes)))
    name = options.out or ("kernels-quick" if options.quick else "kernels")
    path = RESULTS / folder(device) / f"{name}.json"
    save(path, record | {"ceiling": ceiling, "cases": outcomes})
    print(f"\nwritten to {path}", file=sys.stderr)
    return 1 if any(outcome.error for outcome in outcomes) else 0


# pytest-benchmark's entrance to the same cases ------------------------------------------------------------------------


@lru_cache(maxsize=1)  # the variants of a case come one after the other
def _checked(case: Case, device: torch.device) -> tuple[Work, dict[str, str]]:
    work = case.build(device)
    return work, check(work)


def pytest_generate_tests(metafunc: Any) -> None:
    """A test for each case and variant. Names are asked of the smallest size, which costs next to nothing."""
    device = default_device()
    chosen = cases(device)
    idioms = {line: list(Case(line, 4 * KB).build(device).idioms) for line in {case.line for case in chosen}}
    pairs = [(case, variant) for case in chosen for variant in (OURS, *idioms[case.line])]
    metafunc.parametrize(("case", "variant"), pairs, ids=[f"{case.name}, {variant}" for case, variant in pairs])


def test_kernel(benchmark: Any, case: Case, variant: str) -> None:
    device = default_device()
    work, unable = _checked(case, device)
    if variant in unable:
        import pytest

        pytest.skip(unable[variant])
    candidate = work.ours if variant == OURS else work.idioms[variant]

    def call() -> None:
        candidate.call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def restore() -> None:  # what a set-up returns would become the call's arguments
        candidate.restore()

    benchmark.group = case.name
    benchmark.extra_info["bytes"] = work.bytes
    benchmark.pedantic(call, setup=restore, rounds=20, warmup_rounds=3)


if __name__ == "__main__":
    sys.exit(main())
