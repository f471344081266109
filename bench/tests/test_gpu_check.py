"""The check of a GPU: its parts run on a CPU that pretends to be one, keep to their time, and leave what they had."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_check
from bench.gpu import bandwidth, pytests
from bench.gpu.stand import Stand, ask
from bench.gpu.steps import NOTES, Outcome, Step, findings, run, steps
from bench.kernel_bench import Bench
from bench.kernels import kernels_table

CPU = torch.device("cpu")


def outcome(step: Step, status: str = "passed", findings: Sequence[Any] = ()) -> Outcome:
    return Outcome(step.part, step.name, "it", {}, status, 1.0, 2.0, findings, "")


def checked(path: Path, given: dict[str, Outcome], seconds: float = 600.0) -> tuple[bool, dict[str, Any]]:
    chosen = [Step(number, name, 1.0, []) for number, name in enumerate(given)]
    right = gpu_check.check(chosen, path, {"command": "it"}, seconds, lambda step, _: given[step.name])
    return right, json.loads(path.read_text())


def test_a_check_is_right_only_if_every_step_passes(tmp_path: Path) -> None:
    one, two = (Step(number, name, 1.0, []) for number, name in enumerate(("one", "two")))
    right, record = checked(tmp_path / "record.json", {"one": outcome(one), "two": outcome(two)})
    assert right
    assert [(each["step"], each["status"]) for each in record["steps"]] == [("one", "passed"), ("two", "passed")]
    assert record["command"] == "it"
    assert record["finished"]
    for status in ("failed", "out of time"):
        right, record = checked(tmp_path / "record.json", {"one": outcome(one, status), "two": outcome(two)})
        assert not right
        assert len(record["steps"]) == 2


def test_steps_share_the_time_that_is_left(tmp_path: Path) -> None:
    limits = []

    def perform(step: Step, limit: float) -> Outcome:
        limits.append(limit)
        return outcome(step)

    chosen = [Step(0, "a", 30.0, []), Step(1, "b", 10.0, []), Step(2, "c", 20.0, [])]
    gpu_check.check(chosen, tmp_path / "record.json", {}, 120.0, perform)
    assert limits == pytest.approx([60.0, 40.0, 120.0], rel=0.05)  # what one leaves, the next ones have
    right = gpu_check.check(chosen, tmp_path / "record.json", {}, 0.0, perform)
    record = json.loads((tmp_path / "record.json").read_text())
    assert not right
    assert record["left"] == ["a", "b", "c"]
    assert "a: no time was left" in gpu_check.summary(record)


def test_a_killed_check_leaves_what_it_had(tmp_path: Path) -> None:
    def perform(step: Step, _: float) -> Outcome:
        if step.name == "b":
            raise KeyboardInterrupt
        return outcome(step)

    chosen = [Step(0, "a", 1.0, []), Step(1, "b", 1.0, [])]
    with pytest.raises(KeyboardInterrupt):
        gpu_check.check(chosen, tmp_path / "record.json", {}, 60.0, perform)
    record = json.loads((tmp_path / "record.json").read_text())
    assert [each["step"] for each in record["steps"]] == ["a"]
    assert record["left"] == ["b"]
    assert not record["finished"]


def test_an_error_about_one_step_is_a_failed_outcome_and_the_next_step_runs(tmp_path: Path) -> None:
    def perform(step: Step, _: float) -> Outcome:
        if step.name == "a":
            raise OSError("no such luck")
        return outcome(step)

    chosen = [Step(0, "a", 1.0, []), Step(1, "b", 1.0, [])]
    assert not gpu_check.check(chosen, tmp_path / "record.json", {}, 60.0, perform)
    first, second = json.loads((tmp_path / "record.json").read_text())["steps"]
    assert (first["status"], second["status"]) == ("failed", "passed")
    assert "no such luck" in first["output"]


def test_a_finding_that_is_half_written_is_left_out() -> None:
    assert findings('{"name": "first"}\n{"name": "sec') == [{"name": "first"}]


HANGS = """
import sys, time
from bench.gpu.stand import arguments, stand
here = stand(arguments("").parse_args())
here.write("first", 1)
print("it has begun", flush=True)
time.sleep(1000)
"""


def test_a_step_that_hangs_is_ended_and_its_findings_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hanging_step.py").write_text(HANGS)
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *sys.path]))
    for seconds in (5.0, 30.0, 120.0):  # until it has begun before its time is over
        found = run(Step(0, "hangs", 1.0, ["hanging_step", NOTES]), seconds, [], pretend=True)
        if found.findings:
            break
    assert found.status == "out of time"
    assert found.findings == [{"name": "first", "found": 1}]
    assert "it has begun" in found.output


def test_a_question_that_raises_is_a_finding_and_the_next_is_asked(tmp_path: Path) -> None:
    def fails(_: Stand) -> None:
        raise RuntimeError("no such thing")

    def answers(_: Stand) -> int:
        return 5

    notes = tmp_path / "notes"
    assert not ask(Stand(CPU, notes), [fails, answers])
    first, second = (json.loads(line) for line in notes.read_text().splitlines())
    assert "no such thing" in first["found"]["answer"]["raised"]
    assert (second["name"], second["found"]["answer"]) == ("answers", 5)


def test_every_step_names_a_module_that_exists() -> None:
    for pretend in (False, True):
        for step in steps(8, pretend=pretend):
            assert callable(importlib.import_module(step.words[0]).main)


def test_each_of_two_calls_takes_nine_minutes_on_one_gpu() -> None:
    for parts in (range(3), range(3, 9)):
        assert sum(step.seconds for step in steps(1, pretend=False) if step.part in parts) <= 9 * 60
    assert {step.part for step in steps(8, pretend=False)} == set(range(9))


@pytest.mark.parametrize("part", [0, 2, 3, 4, 5, 6, 7, 8])
def test_a_part_runs_from_end_to_end_where_a_cpu_pretends(part: int, tmp_path: Path) -> None:
    words = ["--pretend", "--part", str(part), "--minutes", "60", "--out", str(tmp_path)]
    assert gpu_check.main(words) == 0
    record = json.loads((tmp_path / "cpu" / f"gpu-check-{part}.json").read_text())
    assert record["pretended"]
    assert {each["status"] for each in record["steps"]} == {"passed"}
    assert record["left"] == []
    if part == 4:
        assert kernels_table(record["cases"]).count("\n") > 10
    if part == 5:
        training = json.loads((tmp_path / "cpu" / "training-350m.json").read_text())
        (row,) = training["rows"]
        assert list(row["variants"]) == ["plain PyTorch", "FSDP2 full", "mics 1,1,1"]
        assert row["variants"]["mics 1,1,1"]["predicted"] > 0


def test_kernels_that_time_does_not_allow_are_named(tmp_path: Path) -> None:
    assert bandwidth.main([str(tmp_path / "notes"), "--pretend", "--seconds", "0", "--ops", "pack"]) == 0
    last = json.loads((tmp_path / "notes").read_text().splitlines()[-1])
    assert last["name"] == bandwidth.DROPPED
    assert "pack bf16 to fp32 4 KB" in last["found"]


def test_a_wrong_result_of_a_kernel_fails_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "_run", lambda *_: exec('raise AssertionError("wrong")'))
    assert bandwidth.main([str(tmp_path / "notes"), "--pretend", "--ops", "square_sum"]) == 1


TESTS = """
import os, pytest
def test_compiled(): assert "TRITON_INTERPRET" not in os.environ
@pytest.mark.skip
def test_skipped(): pass
@pytest.mark.parametrize("what", ["a name", "b"])
def test_wrong(what): assert what == "b", "this is wrong"
"""


def outcome_of(tmp_path: Path, text: str, seconds: float = 1200.0) -> pytests.TestOutcome:
    path = tmp_path / "test_it.py"
    path.write_text(text)
    return pytests.run_tests([str(path)], seconds)


def test_failing_tests_are_counted_and_told(tmp_path: Path) -> None:
    found = outcome_of(tmp_path, TESTS)
    assert found.status == "failed"
    assert found.counts == {"PASSED": 2, "SKIPPED": 1, "FAILED": 1}
    assert "this is wrong" in found.failures
    assert outcome_of(tmp_path, "def test_it(): pass").status == "passed"


def test_tests_that_hang_are_ended_and_what_passed_is_counted(tmp_path: Path) -> None:
    for seconds in (2, 20, 200):  # until the first test has passed before its time is over
        found = outcome_of(
            tmp_path, "import time\ndef test_first(): pass\ndef test_hangs(): time.sleep(1000)\n", seconds
        )
        if found.counts:
            break
    assert found.status == "out of time"
    assert found.counts == {"PASSED": 1}


def test_counts_are_read_from_one_process_and_from_several() -> None:
    one = "tests/a.py::test_x[a b] PASSED    [  5%]\ntests/a.py::test_y FAILED [100%]\nFAILED tests/a.py::test_y - no\n"
    several = "[gw0] [  5%] PASSED tests/a.py::test_x[a b]\n[gw1] [100%] FAILED tests/a.py::test_y \n"
    assert pytests.counts(one) == pytests.counts(several) == {"PASSED": 1, "FAILED": 1}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_check_says_so_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 1
    assert capsys.readouterr().err.count("\n") == 1
