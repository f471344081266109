"""Each benchmark of the runtime runs from end to end, small, and writes what it measured."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import checkpoints, checkpoints_work, links, planner, training, wires
from bench.checkpoints import PEERS, checkpoints_note, checkpoints_table
from bench.cluster import unavailable
from bench.links import links_table, shares
from bench.planner import Case, planner_note, planner_table
from bench.record import ROOT
from bench.training import fitting, judged, training_note, training_table
from bench.training_work import MODELS, Job, Loss, micro_batches, variants
from bench.wires import MBIT, MEASUREMENTS, in_the_last, wires_table
from mics_models import BERT, BERTConfig, GPTConfig


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the kernels' tests, collected in the same session, set it


needs_nodes = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


def test_host_cost_is_compared_with_plain_pytorch_and_fsdp2(tmp_path: Path) -> None:
    out = tmp_path / "host.json"
    # In a process of its own: it starts a process group, and FSDP2 leaves its streams and hooks behind.
    subprocess.run([sys.executable, "-m", "bench.host", "--seconds", "0.1", "--out", str(out)], check=True, cwd=ROOT)
    found = json.loads(out.read_text())
    assert set(found["microseconds"]) == {"plain PyTorch", "mics", "FSDP2"}
    assert {"cost_per_unit", "mics_over_fsdp2"} <= set(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs, which the command would take")
def test_training_is_compared_with_every_peer_on_one_rank_and_on_two(tmp_path: Path) -> None:
    small = ["--models", "byte-tiny", "--seconds", "0.01", "--tokens", "8", "--seq", "8", "--out", str(tmp_path)]
    assert training.main(small) == 0
    found = json.loads((tmp_path / "cpu" / "training.json").read_text())
    assert [(row["ranks"], list(row["variants"])) for row in found["rows"]] == [
        (1, ["plain PyTorch", "mics 1,1,1"]),
        (2, ["DDP", "FSDP2 full", "mics 1,1,2", "mics 1,1,1", "mics 2,2,2"]),
    ]
    for row in found["rows"]:
        for figures in row["variants"].values():
            assert figures["step"]["p10"] <= figures["step"]["median"] <= figures["step"]["p90"]
            assert figures["step"]["rounds"] >= 5
            assert figures["memory"] > 0
            assert figures["mfu"] > 0
    assert len(training_table(found["rows"]).splitlines()) == 2 + 7
    assert training_note(found).startswith("MFU is of ")


def test_a_berts_loss_is_of_masked_tokens_alone_and_a_gpts_of_all() -> None:
    bert = BERTConfig(vocab=50, context=16, layers=1, width=8, heads=2, hidden=8, next_sentence=True)
    (batch,) = micro_batches(bert, (1, 2, 16), 0, torch.device("cpu"))
    inputs, targets = batch
    masked = targets != -100
    assert 2 <= masked.sum() < masked.numel() / 2
    assert (inputs[masked] == 49).all()
    assert (targets[masked] < 49).all()
    (other,) = micro_batches(bert, (1, 2, 16), 1, torch.device("cpu"))
    assert not torch.equal(batch, other)
    model = Loss(bert)
    assert isinstance(model.model, BERT)
    model(batch).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())  # DDP waits for each
    gpt = GPTConfig(vocab=50, context=16, layers=1, width=8, heads=2, kv_heads=2, hidden=8)
    (batch,) = micro_batches(gpt, (1, 2, 16), 0, torch.device("cpu"))
    assert torch.equal(batch[0, :, 1:], batch[1, :, :-1])


def test_a_gpu_gets_the_largest_model_that_fits_under_all_runtimes_at_once() -> None:
    models = ("gpt-1.3b", "gpt2-350m", "gpt2-124m")
    assert fitting(models, 141 * 10**9, 1) == fitting(models, 141 * 10**9, 8) == "gpt-1.3b"
    assert fitting(models, 80 * 10**9, 1) == "gpt-1.3b"
    assert fitting(models, 80 * 10**9, 8) == "gpt2-350m"
    assert fitting(models, 10**9, 1) is None


def test_a_context_bounds_the_sequences_of_a_job() -> None:
    job = Job(("gpt-1.3b", "bert-large"), 2, 8192, 2048, "bf16", False, 1.0)
    assert job.shape("gpt-1.3b") == (2, 4, 2048)
    assert job.shape("bert-large") == (2, 16, 512)
    assert Job.read(job.write()) == job


def test_training_is_judged_on_medians_and_not_at_all_if_losses_differ() -> None:
    job = Job(("byte-tiny",), 2, 64, 32, "fp32", False, 1.0)
    found = {name: {"seconds": [0.5, 0.5, 9.0], "losses": [2.0, 1.0], "memory": None} for name in variants(2)}
    found["mics 2,2,2"]["seconds"] = [0.25, 0.25, 0.25]
    flops = 4.0 * MODELS["byte-tiny"].flops_per_token(32)
    rows = judged(found, job, "byte-tiny", flops, 2)
    assert rows["DDP"]["tokens_per_s"] == 2 * 2 * 64 / 0.5
    assert rows["DDP"]["mfu"] == pytest.approx(2 * 64 / 0.5 / 4.0)
    assert rows["DDP"]["times_as_fast"] is None
    assert rows["mics 2,2,2"]["times_as_fast"].value == 2.0
    assert rows["mics 2,2,2"]["peer"] == "FSDP2 full"
    for wrong in (1.001, float("nan")):
        found["DDP"]["losses"] = [2.0, wrong]
        with pytest.raises(AssertionError, match="disagree on the loss of byte-tiny"):
            judged(found, job, "byte-tiny", flops, 2)


def test_checkpoints_are_set_against_plain_writes_and_reads_of_as_many_bytes(tmp_path: Path) -> None:
    out = tmp_path / "checkpoints.json"
    small = ["--megabytes", "13", "--rounds", "1", "--steps-megabytes", "13", "--steps-rounds", "1", "--ranks", "2"]
    assert checkpoints.main([*small, "--folder", str(tmp_path), "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["bytes"] == 12 * 1024**2
    assert set(PEERS) | set(PEERS.values()) == set(row["actions"])
    assert all(row["actions"][name]["share"]["value"] > 0 for name in PEERS)
    assert list(tmp_path.iterdir()) == [out]  # what was written to the disk is gone
    assert len(checkpoints_table([row]).splitlines()) == 2 + len(row["actions"])
    assert "with a background save of 13 MB in the first" in checkpoints_note([row])


def test_a_plain_write_makes_a_new_file_and_a_plain_read_reads_all_of_it(tmp_path: Path) -> None:
    path, content, weights = tmp_path / "plain", os.urandom(3000), bytearray(1000)
    checkpoints_work.write_plainly(path, memoryview(content))
    assert path.read_bytes() == content
    checkpoints_work.read_plainly(path, memoryview(weights))
    assert weights == content[:1000]
    with pytest.raises(FileExistsError):
        checkpoints_work.write_plainly(path, memoryview(content))
    with pytest.raises(RuntimeError, match="plain ended early, expected at least 3001 bytes"):
        checkpoints_work.read_plainly(path, memoryview(bytearray(3001)))


def test_a_share_of_the_disk_is_one_of_speeds() -> None:
    seconds = {name: [1.0] for name in PEERS.values()} | {name: [2.0] for name in PEERS}
    steps = {"seconds": {"without": [1.0], "with": [1.5], "beyond": [0.25]}, "bytes": 1}
    row = checkpoints.judged({"seconds": seconds, "bytes": 3e9, "background": steps}, 2)
    assert row["actions"]["save"]["share"].value == 0.5
    assert row["actions"]["save"]["gb_per_s"] == 1.5
    assert row["background"]["ratio"].value == 1.5
    assert row["background"]["beyond"].median == 0.25


@needs_nodes
def test_transfers_between_nodes_are_set_against_their_link(tmp_path: Path) -> None:
    out = tmp_path / "links.json"
    assert links.main(["--nodes", "2", "--rates", "400", "--sizes", "0.5", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["megabytes"] for row in rows] == [0.5, 1.0]
    for row in rows:
        assert all(0 < share["least"] <= share["median"] <= share["most"] for share in row["share"].values()), row


def test_a_link_that_is_busy_half_of_the_time_has_a_share_of_one_half() -> None:
    found = {"sent_by_node": {"hop 2": 1_000_000}, "seconds": {"hop 2": [0.2, 0.08, 0.16]}}
    share = shares(found, "hop 2", rate=100.0)
    assert share == pytest.approx({"least": 0.4, "median": 0.5, "most": 1.0, "rounds": 3})
    row = {"rate_mbit": 100.0, "megabytes": 1.0, "share": dict.fromkeys(links.ACTIONS, share)}
    assert "0.500 (0.400-1.000)" in links_table([row])


@needs_nodes
def test_wires_are_set_against_what_they_were_asked_to_be(tmp_path: Path) -> None:
    out = tmp_path / "wires.json"
    assert wires.main(["--rounds", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    asked = [asked.what for each in MEASUREMENTS for asked in each.asked]
    assert [row["asked"]["what"] for row in found["rows"]] == asked
    assert all(len(row["got"]) == 1 for row in found["rows"])
    assert found["switch"]["dropped"] == 0
    assert len(wires_table(found).splitlines()) == 2 + len(asked)


def test_a_wire_is_as_asked_if_the_median_of_its_rounds_is() -> None:
    def judged(asked: wires.Asked, *got: float) -> str:
        return wires_table({"rows": [{"asked": vars(asked), "got": got}]}).splitlines()[-1]

    rate, shares, trip = wires.rate("one", 100), wires.shares("three"), wires.trip("there", 2)
    assert judged(rate, 50, 95, 200) == "| one, Mbit/s |   100 | 95.00 (50.00-200.00) | 95-105 | kept |"
    for asked, got in ((rate, 94.9), (rate, 105.1), (shares, 1.11), (trip, 1.4), (trip, 2.6)):
        assert judged(asked, got, got, 100 * got).endswith("| missed |"), got
    for asked, got in ((rate, 105), (shares, 1.0), (shares, 1.1), (trip, 1.5), (trip, 2.5)):
        assert judged(asked, got, got, 100 * got).endswith("| kept |"), got


def test_a_rate_is_of_the_last_seconds_in_which_all_connections_were_open() -> None:
    slow_start = [(0.0, 0), (1.0, 1), (2.0, 1 + 3 * MBIT), (3.0, 1 + 6 * MBIT)]
    longer = [(1.0, 5), (2.0, 5 + 2 * MBIT), (3.0, 5 + 4 * MBIT), (4.0, 1e9)]
    assert in_the_last(2.0, [slow_start, longer]) == pytest.approx([3.0, 2.0])
    for nothing in ([], [(3.0, 1)]):
        with pytest.raises(RuntimeError, match=r"less than twice in 2.0 s: ask for more --seconds"):
            in_the_last(2.0, [slow_start, nothing])


def test_planning_is_timed_and_set_against_its_goals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Case("byte-tiny", "p4d.24xlarge:1", 64, 128)
    monkeypatch.setattr(planner, "PUBLISHED", (small,))
    monkeypatch.setattr(planner, "TRACED", small)
    monkeypatch.setattr(planner, "MANY", Case("byte-tiny", "p4d.24xlarge:4", 512, 128))
    monkeypatch.setattr(planner, "FEW", Case("byte-tiny", "p4d.24xlarge:1", 128, 128))
    out = tmp_path / "planner.json"
    assert planner.main(["--seconds", "0", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert {name: case["goal"] for name, case in found["cases"].items()} == {
        "plan byte-tiny for p4d.24xlarge:1": 5,
        "trace byte-tiny": 4,
        "simulate a step of byte-tiny on 32 ranks": 2,
        "simulate a step of byte-tiny on 8 ranks": None,
    }
    assert all(case["cpu_seconds"]["rounds"] >= 3 for case in found["cases"].values())
    assert len(planner_table(found).splitlines()) == 2 + 4
    assert planner_note(found).startswith("A step on 32 ranks takes ")


def test_a_plan_is_judged_on_its_median() -> None:
    def case(median: float, goal: float | None) -> dict[str, Any]:
        return {"cpu_seconds": {"median": median, "p10": 0.0, "p90": 9.0}, "goal": goal}

    found = {"cases": {"a": case(5.0, 5.0), "b": case(5.1, 5.0), "c": case(5.1, None)}}
    assert [line.split("|")[-2].strip() for line in planner_table(found).splitlines()[2:]] == ["kept", "missed", ""]
