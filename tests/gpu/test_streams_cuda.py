"""Which stream does what: users may have streams of their own, and each pair of writer and reader must be in order."""

import copy
import threading
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import mics_core as mics
from mics_core.comm.lanes import lane
from mics_core.lifecycle import Lifecycle
from test_runtime_cuda import WIDTH, Model, pretended_world, step

pytestmark = pytest.mark.gpu


class Slow(torch.autograd.Function):
    """A backward that begins late on its stream."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        torch.cuda._sleep(100_000_000)
        return grad


def test_a_step_on_one_stream_waits_for_a_backward_on_another() -> None:
    """As torch allows: `with stream(side): loss = model(x)`, and backward and step outside."""
    whole = Model().cuda()
    model = mics.shard(copy.deepcopy(whole), mics.Sharding.ddp())
    pairs = [
        (whole, torch.optim.AdamW(whole.parameters(), lr=1e-2, eps=1e-4)),
        (model, mics.AdamW(model.parameters(), lr=1e-2, eps=1e-4)),
    ]
    side = torch.cuda.Stream()
    for number in range(3):
        x = torch.randn(64, WIDTH, device="cuda", generator=torch.Generator("cuda").manual_seed(number))
        for each, optimizer in pairs:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                loss = Slow.apply(each(x))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.cuda.synchronize()
    with mics.full_params(model):
        for mine, expected in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


def test_a_backward_ends_on_the_stream_that_it_was_called_on(monkeypatch: pytest.MonkeyPatch) -> None:
    side, seen = torch.cuda.Stream(), Counter[tuple[bool, bool]]()
    end = Lifecycle._end_backward

    def ending(self: Lifecycle, *arguments: Any) -> None:
        seen[threading.current_thread() is threading.main_thread(), torch.cuda.current_stream() == side] += 1
        end(self, *arguments)

    monkeypatch.setattr(Lifecycle, "_end_backward", ending)
    model = mics.shard(Model(), mics.Sharding.ddp())
    with torch.cuda.stream(side):
        for _ in range(100):
            model(torch.ones(4, WIDTH, device="cuda")).backward()
            model.zero_grad()
    torch.cuda.synchronize()
    assert {on_side for _, on_side in seen} == {True}, seen


def test_urgent_lanes_go_before_others() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    urgent, other = (lane("test", device, urgent=each)._stream.priority for each in (True, False))  # type: ignore[attr-defined]
    assert urgent < other


def test_tensors_made_on_the_gpu_by_default_change_nothing() -> None:
    """`torch.set_default_device`: what the host counts with must stay on the host."""
    with pretended_world(8, 3):
        model = mics.shard(Model(), mics.Sharding(2, 2, 8), ranks_per_node=2, precision=mics.Precision.bf16())
        optimizer = mics.AdamW(model.parameters())
        with torch.device("cuda"):
            for _ in range(2):
                step(model, optimizer, torch.zeros(3, 8, WIDTH), sharded=True)
            optimizer.state_dict()
        torch.cuda.synchronize()
