import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest
import torch

from mics_models import GPTS
from mics_models.data import standard_library
from mics_models.pretrain import Settings, Training, main, parse, pretrain, rate

SMALL = {"steps": 10, "batch": 4, "seq": 64}


@pytest.fixture
def _short_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mics_models.pretrain.LAST_BATCHES", 1)
    monkeypatch.setattr("mics_models.pretrain.SAMPLED", 20)


@pytest.mark.usefixtures("_short_end")
def test_ten_steps_learn_something_and_tell_what_they_do() -> None:
    lines: list[str] = []
    begin = time.process_time()
    result = pretrain(Settings(**SMALL), say=lines.append)
    assert time.process_time() - begin < 10
    assert result.losses[0] == pytest.approx(math.log(256), abs=0.5)
    assert len(result.losses) == 10
    assert result.losses[-1] < result.losses[0] - 1
    assert result.held_out < result.losses[0] - 1
    assert result.sample.startswith("\ndef ")
    told = "\n".join(lines)
    assert lines[0] == "mics pretrain: one process, nothing sharded; sharding arrives with mics-core"
    assert f"{GPTS['byte-tiny'].num_params():,} parameters" in told
    assert f"{GPTS['byte-tiny'].flops_per_token(64):,} FLOPs per token" in told
    assert "4 samples x 64 tokens = 256 tokens per step, in 2 micro-steps" in told
    assert "weights 3.0 MB + gradients 3.0 + optimizer 6.0 = 11.9 MB" in told
    progress = r"step +10/10  loss \d\.\d+  held out \d\.\d+ nats/byte  [\d,]+ tokens/s  [\d.]+ GFLOP/s  ETA 0:00"
    assert re.search(progress, told)
    assert f"held-out loss {result.held_out:.3f} nats/byte" in lines[-1]


def test_two_runs_with_one_seed_have_the_same_losses() -> None:
    settings = Settings(**SMALL | {"steps": 2, "seq": 16})
    corpus = standard_library()
    runs = [Training(settings, corpus) for _ in range(2)]
    first, second = ([run.step(number) for number in range(2)] for run in runs)
    assert first == second
    assert runs[0].held_out_loss() == runs[1].held_out_loss()


def test_micro_steps_give_the_step_that_one_batch_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, corpus = Settings(**SMALL), standard_library()
    weights = []
    for micro_steps in (1, 4):
        monkeypatch.setattr("mics_models.pretrain.MICRO_STEPS", micro_steps)
        training = Training(settings, corpus)
        training.optimizer = torch.optim.SGD(training.model.parameters())
        training.step(0)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in training.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def test_a_step_uses_its_rate_and_no_larger_gradient_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mics_models.pretrain.LARGEST_NORM", 1e-2)
    training = Training(Settings(**SMALL | {"lr": 0.5}), standard_library())
    training.optimizer = torch.optim.SGD(training.model.parameters(), lr=123.0)
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    training.step(5)
    moved = [now.detach() - then for now, then in zip(training.model.parameters(), before, strict=True)]
    distance = torch.cat([part.flatten() for part in moved]).norm().item()
    assert distance == pytest.approx(1e-2 * rate(5, training.settings), rel=1e-2)
    assert all(parameter.grad is None for parameter in training.model.parameters())


def test_matrices_decay_and_norms_do_not() -> None:
    training = Training(Settings(**SMALL), standard_library())
    decays = {id(p): group["weight_decay"] for group in training.optimizer.param_groups for p in group["params"]}
    for name, parameter in training.model.named_parameters():
        assert decays[id(parameter)] == (0 if "norm" in name else 0.1), name


def test_the_rate_warms_up_then_falls_along_a_cosine() -> None:
    settings = Settings(steps=100, lr=1.0)
    rates = [rate(step, settings) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[5 + 95 // 2] == pytest.approx((1 + 0.05) / 2, abs=0.02)
    assert rates[-1] == pytest.approx(0.05, abs=0.01)


@pytest.mark.usefixtures("_short_end")
def test_the_minutes_end_a_run_early_and_cleanly() -> None:
    lines: list[str] = []
    result = pretrain(Settings(**SMALL | {"steps": 100_000, "minutes": 0.01}), say=lines.append)
    assert len(result.losses) < 1000
    told = "\n".join(lines)
    assert f"the 0.01 minutes are over: stopped after {len(result.losses)} of 100000 steps" in told
    assert "held-out loss" in lines[-1]


def test_a_loss_that_is_not_finite_names_its_batch() -> None:
    training = Training(Settings(**SMALL), standard_library())
    with torch.no_grad():
        training.model.norm.weight.fill_(math.inf)
    with pytest.raises(
        RuntimeError, match=r"loss of step 3 is nan, expected .* samples 12 to 15 of seed 0: lower --lr"
    ):
        training.step(3)


def test_an_interrupt_leaves_with_one_sentence() -> None:
    # A child of a background job ignores SIGINT, unless it is told not to.
    listen = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    module = "runpy.run_module('mics_models.pretrain', run_name='__main__')"  # what python -m does
    command = [sys.executable, "-c", listen + module, "--batch", "2", "--seq", "16", "--steps", "2000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while not process.stdout.readline().startswith("step "):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        rest, errors = process.stdout.read(), process.stderr.read()
    assert process.returncode == 130
    assert "pretrain: interrupted; nothing is saved, because checkpoints arrive with mics-core" in rest
    assert not errors


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--batch", "3"], "--batch is 3, expected a multiple of the 2 micro-steps: make it even"),
        (["--seq", "512"], "--seq is 512, expected at most 128, the context of byte-tiny: lower it"),
        (["--lr", "nan"], "--lr is nan, expected more than 0: raise it"),
        (["--config", "gpt-5"], "argument --config: invalid choice: 'gpt-5'"),
    ],
    ids=str,
)
def test_a_wrong_flag_is_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_every_setting_has_its_flag() -> None:
    chosen = Settings("gpt2-124m", 7, 6, 32, 0.5, 9, 1.5)
    flags = [f"--{field.name}={getattr(chosen, field.name)}" for field in fields(chosen)]
    assert parse(flags) == chosen
