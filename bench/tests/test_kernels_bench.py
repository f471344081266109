"""Every case is checked against its idioms, at its smallest: here in Triton's interpreter if there is no GPU, and in a
process of its own as it is benchmarked."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench.kernel_bench as kernel_bench
import bench.kernels as kernels
from bench.harness import Ratio, Spread, Variant
from bench.kernel_bench import COPY, OURS, Bench, Outcome, View
from bench.kernel_cases import KB, LINES, MB, OPS, Case, Line, cases
from bench.record import ROOT, plain
from bench.work import FP32, Candidate, Work, WrongResult, check
from pretending import Device

CPU = torch.device("cpu")


def line(op: str, scene: str) -> Line:
    return next(line for line in LINES if (line.op, line.scene) == (op, scene))


@pytest.mark.parametrize(
    "case", [Case(each, 4 * KB) for each in LINES if "2000" not in each.scene], ids=lambda x: x.name
)
def test_ours_and_every_idiom_give_the_same(case: Case) -> None:
    assert check(case.build(CPU)) == {}


SCRIPT = """
import sys
from pathlib import Path
import torch
import bench.kernels as kernels
from bench.kernel_cases import LINES, Case
from bench.work import check
for line in LINES:
    assert check(Case(line, line.sizes[-1] if "2000" in line.scene else 4096).build(torch.device("cpu"))) == {}
kernels.RESULTS = Path(sys.argv[1])
kernels.Bench = lambda device, seconds, make=kernels.Bench: make(device, 0.0, 1 << 20)
sys.exit(kernels.main(["--quick", "--ops", "pack,square_sum", "--out", "name", "--threads", "1"]))
"""


def in_a_new_process(*words: str) -> subprocess.CompletedProcess[str]:
    ours = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")  # with the latter, benchmarks do not run
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_the_command_checks_measures_prints_and_writes(tmp_path: Path) -> None:
    ran = in_a_new_process("-c", SCRIPT, str(tmp_path / "bench" / "results"))
    assert ran.returncode == 0, ran.stderr
    record = json.loads((tmp_path / "bench" / "results" / "cpu" / "name.json").read_text())
    assert record["command"] == "python -m bench.kernels --quick --ops pack,square_sum --out name --threads 1"
    assert record["machine"]["threads"] == 1
    assert {"commit", "date", "load", "ceiling"} <= set(record)
    names = [f"{case['op']} {case['scene']}" for case in record["cases"]]
    assert set(names) == {f"{x.op} {x.scene}" for x in LINES if x.op in ("pack", "square_sum")} - {
        "pack misaligned views",
        "square_sum bf16",
    }
    for case in record["cases"]:
        assert not case["error"]
        assert case["views"]["call"]["times"]["mics"]["rounds"] >= 3
        assert case["gb_per_s"] > 0
    assert ran.stdout.count("\n| pack") == names.count("pack bf16 to fp32") + names.count("pack bf16 to bf16") + 3


def test_pytest_benchmark_times_the_same_cases() -> None:
    chosen = "dequantize and 4 and KB or adamw and flat and 4 and KB and not 64"
    ran = in_a_new_process("-m", "pytest", "bench/kernels.py", "--benchmark-only", "-k", chosen)
    assert ran.returncode == 0, ran.stdout
    assert "dequantize int8 to fp32 4 KB, copy_, mul_" in ran.stdout
    assert "adamw flat 4 KB, mics" in ran.stdout


def test_an_interpreter_is_not_timed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    assert kernels.main([]) == 2
    assert "unset it" in capsys.readouterr().err


def three(theirs: float, error: str = "") -> Line:
    """An op that makes threes; the idiom makes what it is told, or an error."""

    def build(elements: int, device: torch.device) -> Work:
        out = torch.zeros(elements, dtype=FP32, device=device)

        def idiom() -> list[torch.Tensor]:
            if error:
                raise RuntimeError(error)
            return [torch.full_like(out, theirs)]

        fair = Candidate(lambda: [torch.full_like(out, 3.0)])
        return Work(
            8 * elements,
            Candidate(lambda: out.fill_(3.0), results=lambda _: [out]),
            {"it": Candidate(idiom), "fair": fair},
        )

    return Line("pack", "test", 4, build)


def test_a_wrong_result_is_never_timed() -> None:
    for wrong in (3.0001, float("nan")):
        with pytest.raises(WrongResult, match="result 0 is not what it gives"):
            check(three(wrong).build(8, CPU))
    outcome = Bench(CPU, 0.0, MB).run(Case(three(4.0), KB))
    assert outcome.error.startswith("WrongResult")
    assert not outcome.views


def test_an_idiom_that_cannot_run_is_left_out_and_says_why() -> None:
    outcome = Bench(CPU, 0.0, MB).run(Case(three(3.0, "not on this device"), KB))
    assert not outcome.error
    assert outcome.unable == {"it": "RuntimeError: not on this device"}
    assert set(outcome.views["call"].times) == {OURS, "fair", COPY}


def test_the_share_of_a_copy_is_that_of_bandwidths() -> None:
    bench = Bench(CPU, 0.0, MB)
    bench.timers = {"call": SimpleNamespace(seconds=lambda variant: 1.0 if "copy_" in str(variant.call) else 2.0)}
    fits, cut = (bench.run(Case(three(3.0), size)) for size in (MB // 4, 4 * MB))
    assert fits.gb_per_s == pytest.approx(fits.bytes / 2e9)
    assert fits.of_copy.value == pytest.approx(0.5)  # twice the time for as many bytes
    assert cut.of_copy.value == pytest.approx(0.5 * cut.bytes / (2 * MB))


def outcome_with(
    bench: Bench, line: Line, size: int, speedup: Ratio, share: float = 1.0, view: str = "call"
) -> Outcome:
    times = {OURS: Spread(1.0, 1.0, 1.0, 1.0, 1.0, 7)}
    views = {bench.main_view: View(times, "idiom", Ratio(9.0, 9.0, 9.0)), view: View(times, "idiom", speedup)}
    blank = Outcome(line.op, line.scene, size, of_copy=Ratio(share, share, share), views=views)
    return bench._judged(Case(line, size), blank)


def test_slower_than_the_idiom_is_missed_unless_it_may_be_noise() -> None:
    bench, flat = Bench(CPU, 0.0, MB), line("adamw", "flat")
    assert outcome_with(bench, flat, KB, Ratio(0.5, 0.4, 0.6)).missed == ["call: 2.00x the time of idiom"]
    assert not outcome_with(bench, flat, KB, Ratio(0.5, 0.4, 1.1)).missed
    assert not outcome_with(bench, flat, KB, Ratio(0.99, 0.98, 0.995)).missed
    assert not outcome_with(bench, flat, KB, Ratio(0.5, 0.4, 0.6), view="launch").missed


def test_what_is_faster_and_slower_is_counted_from_the_record() -> None:
    bench, flat = Bench(CPU, 0.0, MB), line("adamw", "flat")
    speedups = [Ratio(2.0, 1.9, 2.1), Ratio(0.5, 0.4, 0.6), Ratio(0.5, 0.4, 1.1), Ratio(0.99, 0.98, 0.995)]
    found = plain(
        [outcome_with(bench, flat, size, each) for size, each in zip((KB, 16 * MB, KB, KB), speedups, strict=True)]
    )
    everything, large = kernels.kernels_note(found).split("Of buffers of 16 MB and more: ")
    assert everything.startswith(
        "4 cases, 1 faster than the fastest torch idiom for the same work, 1 slower, the others"
    )
    assert large.startswith("1 cases, 0 faster than the fastest torch idiom for the same work, 1 slower,")


def test_the_goals_of_a_hopper_hold_on_one_and_at_64_mb() -> None:
    bench = Bench(CPU, 0.0, MB)
    slow = partial(outcome_with, speedup=Ratio(1.0, 1.0, 1.0), share=0.5)
    assert not slow(bench, line("adamw", "flat"), 64 * MB).missed
    bench.hopper = True
    assert slow(bench, line("adamw", "flat"), 64 * MB).missed == [
        "0.50 of a copy's bandwidth, not 0.88",
        "1.00x as fast as idiom, not 1.5x",
    ]
    assert not slow(bench, line("adamw", "flat"), 16 * MB).missed
    assert not slow(bench, line("pack", "misaligned views"), 64 * MB).missed
    assert not slow(bench, line("quantize", "bf16 to int8"), 64 * MB).missed


def test_the_most_telling_sizes_come_first_and_quick_ones_are_small() -> None:
    everything = cases(torch.device("cuda"))
    assert everything[0].size == 64 * MB
    assert {case.line for case in everything} == set(LINES)
    assert max(case.size for case in everything) == 256 * MB
    assert min(case.size for case in everything) == 4 * KB
    assert max(case.size for case in cases(CPU, quick=True)) < 16 * MB
    assert {case.line.op for case in cases(CPU, ["adamw"])} == {"adamw"}


@pytest.fixture
def gpu_bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """All that runs on a GPU, with the CPU in its place."""
    Device(monkeypatch)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    bench = Bench(CPU, 0.0, MB)
    bench.gpu = True
    bench.timers = kernel_bench.gpu_timers(CPU)
    return bench


def test_on_a_gpu_small_cases_are_seen_in_batches_and_graphs_too(gpu_bench: Bench) -> None:
    outcome = gpu_bench.run(Case(three(3.0), KB))
    assert not outcome.error
    assert list(outcome.views) == ["device", "launch", "batch", "graph"]
    assert COPY in outcome.views["device"].times
    assert list(gpu_bench.run(Case(three(3.0), 32 * MB)).views) == ["device", "launch"]


def test_a_graph_that_cannot_be_captured_is_recorded_and_ours_is_missed(
    gpu_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Variant:
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(kernel_bench, "captured", refuse)
    outcome = gpu_bench.run(Case(three(3.0), KB))
    assert not outcome.error
    assert set(outcome.unable) == {"mics in a graph", "it in a graph", "fair in a graph"}
    assert "mics in a graph: operation not permitted" in outcome.missed


def test_nothing_more_is_asked_of_a_gpu_that_failed(gpu_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: pytest.fail("called on a dead device"))
    monkeypatch.setattr(gpu_bench, "alive", lambda: False)
    reported: list[Outcome] = []
    broken = replace(three(3.0), build=lambda *_: exec('raise RuntimeError("CUDA error: illegal address")'))
    dropped = kernel_bench.run_all(gpu_bench, [Case(broken, KB), Case(three(3.0), MB)], reported.append)
    assert len(reported) == 1
    assert "illegal address" in reported[0].error
    assert dropped == ["pack test 1 MB"]


def test_an_op_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.main(["--ops", "pack,nothing"])
    assert f"expected some of {','.join(OPS)}" in capsys.readouterr().err
