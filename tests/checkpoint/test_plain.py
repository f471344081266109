"""What is saved beside weights is plain data: it comes back as it was, and nothing runs where it is read."""

import io
import os
import random
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils

import mics_core as mics
from mics_core import ConfigError
from mics_core.checkpoint import plain
from mics_core.checkpoint.description import describe
from mics_core.checkpoint.export import export
from mics_core.cli import main


class Evil:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class Colour(IntEnum):
    RED = 1


class Curve:
    """What LambdaLR keeps the attributes of."""

    def __init__(self) -> None:
        self.slope = 2.0

    def __call__(self, epoch: int) -> float:
        return self.slope / (1 + epoch)


def trained(kind: Any = mics.AdamW) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = mics.shard(nn.Linear(3, 3), mics.Sharding.ddp())
    optimizer = kind(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


@contextmanager
def as_before() -> Iterator[None]:
    """Saves what can be pickled, as mics did."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "plain", lambda value, _: value)
        yield


DATA = {
    "nothing": None,
    "numbers": [True, 0, -(2**63), 2**2000, 0.1, float("inf"), 1j],
    "texts": ["", "é\n", "x" * 300],
    "bytes": (b"\xff" * 300, bytearray()),
    "sets": {1, "a"},
    "dictionaries": {1: {(2, "b"): None}, "ordered": OrderedDict(b=1, a=2), "counted": Counter("aab")},
    "torch": [torch.Size([2]), torch.bfloat16, torch.device("cuda", 1)],
    "random": random.getstate(),
}


def test_plain_data_comes_back_as_it_was(tmp_path: Path) -> None:
    model, optimizer = trained()
    weights = {"bf16": torch.ones(3, dtype=torch.bfloat16), "parameter": nn.Parameter(torch.zeros(2))}
    mics.save(tmp_path / "step-1", model, optimizer, **DATA, weights=weights)
    loaded = mics.load(tmp_path, model, optimizer)
    held = loaded.pop("weights")
    assert loaded == DATA
    assert repr(loaded) == repr(DATA)  # with the same types
    for name, value in weights.items():
        assert torch.equal(held[name], value)
        assert (type(held[name]), held[name].dtype) == (type(value), value.dtype)


def chained(kind: Any) -> Callable[[torch.optim.Optimizer], Any]:
    def make(optimizer: torch.optim.Optimizer) -> Any:
        parts = [lr_scheduler.LinearLR(optimizer), lr_scheduler.CosineAnnealingLR(optimizer, 5)]
        return kind(optimizer, parts, [2]) if kind is lr_scheduler.SequentialLR else kind(parts)

    return make


SCHEDULERS: list[Any] = [
    partial(lr_scheduler.StepLR, step_size=2),
    partial(lr_scheduler.MultiStepLR, milestones=[2, 3]),
    partial(lr_scheduler.CosineAnnealingLR, T_max=5),
    partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=9),
    partial(lr_scheduler.CyclicLR, base_lr=0.1, max_lr=0.2, cycle_momentum=False),
    partial(lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 1 / (1 + epoch)),
    partial(lr_scheduler.LambdaLR, lr_lambda=Curve()),
    partial(lr_scheduler.LambdaLR, lr_lambda=partial(pow, 0.5)),
    partial(lr_scheduler.PolynomialLR),
    partial(swa_utils.SWALR, swa_lr=0.1),
    chained(lr_scheduler.SequentialLR),
    chained(lr_scheduler.ChainedScheduler),
]


@pytest.mark.parametrize("make", SCHEDULERS)
def test_schedulers_of_torch_go_on(tmp_path: Path, make: Any) -> None:
    model, optimizer = trained()
    scheduler = make(optimizer)
    rates = []
    for step in range(6):
        if step == 3:
            mics.save(tmp_path / "step-3", model, optimizer, scheduler=scheduler.state_dict())
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    model, optimizer = trained()
    scheduler = make(optimizer)
    scheduler.load_state_dict(mics.load(tmp_path, model, optimizer)["scheduler"])
    for rate in rates[3:]:
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == rate


def test_a_plateau_and_what_numpy_computed_are_saved_as_pythons(tmp_path: Path) -> None:
    model, optimizer = trained(partial(torch.optim.AdamW, fused=None))
    optimizer.param_groups[0]["lr"] = np.cos(np.float64(0.5))
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer)
    scheduler.step(np.float32(2.5))
    mics.save(tmp_path / "step-1", model, optimizer, scheduler=scheduler.state_dict(), best=np.float32(0.5))
    loaded = mics.load(tmp_path, model, optimizer)
    assert (type(loaded["best"]), loaded["best"]) == (float, 0.5)
    assert type(loaded["scheduler"]["best"]) is float
    assert optimizer.param_groups[0]["lr"] == np.cos(0.5)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"lr_lambdas": [lambda epoch: epoch]}, 'extra["given"]["lr_lambdas"][0] is a function'),
        ((1, Path("x")), 'extra["given"][1] is a pathlib.PosixPath'),
        (defaultdict(int), 'extra["given"] is a collections.defaultdict'),
        (np.zeros(2), 'extra["given"] is a numpy.ndarray'),
        ({7: Colour.RED}, 'extra["given"][7] is a test_plain.Colour'),
        ({Colour.RED: 7}, 'a key of extra["given"] is a test_plain.Colour'),
        ({frozenset()}, 'extra["given"][0] is a frozenset'),
        (b"", 'extra["given"] is empty bytes'),
        (2**2033, 'extra["given"] is a number of more than 2032 bits'),
        (np.datetime64("2026-01-01"), 'extra["given"] is a datetime.date'),
    ],
    ids=lambda part: part if isinstance(part, str) else type(part).__name__,
)
def test_what_is_not_plain_is_refused_by_its_place(tmp_path: Path, value: Any, said: str) -> None:
    model, optimizer = trained()
    with pytest.raises(ConfigError) as caught:
        mics.save(tmp_path / "step-1", model, optimizer, given=value)
    assert f"save: {said}, expected tensors, numbers, texts" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_tensors_attributes_and_the_settings_of_an_optimizer_are_plain_too(tmp_path: Path) -> None:
    model, optimizer = trained(torch.optim.SGD)
    tensor = torch.ones(2)
    tensor.maker = Path("x")  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r'extra\["given"\].maker is a pathlib.PosixPath'):
        mics.save(tmp_path / "step-1", model, optimizer, given=tensor)
    optimizer.param_groups[0]["note"] = Path("x")
    with pytest.raises(ConfigError, match=r'optimizer.param_groups\[0\]\["note"\] is a pathlib.PosixPath'):
        mics.save(tmp_path / "step-1", model, optimizer)


@pytest.mark.parametrize("where", ["extra", "settings", "state"])
def test_what_an_attacker_hides_is_named_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    model, optimizer = trained(torch.optim.SGD)
    made = tmp_path / "made"
    with as_before():
        if where == "state":
            monkeypatch.setattr("mics_core.checkpoint.saving.random_state", lambda _: Evil(made))
        if where == "settings":
            optimizer.param_groups[0]["note"] = Evil(made)
        mics.save(tmp_path / "step-1", model, optimizer, given=Evil(made) if where == "extra" else 7)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        model.weight.add_(1)  # type: ignore[operator]
    changed = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match=r"holds posix.mkdir, expected plain data and tensors") as caught:
        mics.load(tmp_path, model, optimizer)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(*pair) for pair in zip(changed, model.parameters(), strict=True))
    assert not torch.equal(before[0], changed[0])
    text = describe(tmp_path, verify=True)
    assert "extra: given" in text
    assert ("holds posix.mkdir" in text) == (where == "settings")
    export(tmp_path, tmp_path / "out.safetensors")
    assert main(["export", str(tmp_path), str(tmp_path / "hf.safetensors"), "--names", "hf"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not made.exists()


def test_one_that_was_saved_before_loads_if_it_is_plain_or_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numpy's own state was saved as an array, which is allowed; a path is, where the caller allows it."""
    model, optimizer = trained()
    np.random.seed(5)
    with as_before():
        monkeypatch.setattr("mics_core.checkpoint.random_numbers._without_arrays", lambda state: state)
        mics.save(tmp_path / "step-1", model, optimizer, step=1)
        mics.save(tmp_path / "step-2", model, optimizer, lr=np.float64(0.5))
    drawn = np.random.rand()
    allowed = torch.serialization.get_safe_globals()
    assert mics.load(tmp_path / "step-1", model, optimizer) == {"step": 1}
    assert np.random.rand() == drawn
    with pytest.raises(RuntimeError, match=r"the extra of .*step-2 holds numpy\S+scalar, expected plain data"):
        mics.load(tmp_path / "step-2", model, optimizer)
    scalar = np.float64(0).__reduce__()[0]
    with torch.serialization.safe_globals([scalar, np.dtype, np.dtypes.Float64DType]):
        assert mics.load(tmp_path / "step-2", model, optimizer) == {"lr": 0.5}
        assert np.dtype in torch.serialization.get_safe_globals()
    assert set(torch.serialization.get_safe_globals()) == set(allowed)


def test_what_is_read_is_what_torch_reads_with_weights_only(tmp_path: Path) -> None:
    """So that other tools need not run what it holds, either."""
    model, optimizer = trained()
    mics.save(tmp_path / "step-1", model, optimizer, **DATA)
    packed = plain.packed({"random": random.getstate(), "data": DATA}, "all")
    assert torch.load(io.BytesIO(packed), weights_only=True)["data"] == DATA


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": [1.0]}, {"a": 1, "b": [1.5]}),
        (torch.ones(2), torch.zeros(2)),
        (torch.ones(2), torch.ones(3)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        ("1", 1),
        (None, 0),
    ],
    ids=repr,
)
def test_a_digest_tells_data_apart(one: Any, other: Any) -> None:
    assert plain.digest(one) != plain.digest(other)


def test_a_digest_takes_alike_for_alike() -> None:
    text = "".join(["a", "b"])
    assert plain.digest({"x": text, "y": text}) == plain.digest({"y": "ab", "x": "ab"})
    assert plain.digest(torch.ones(4)[::2]) == plain.digest(torch.ones(2))
    assert plain.digest([np.float64(0.5)]) == plain.digest([0.5])
    assert plain.digest({3, 1, "a"}) == plain.digest({"a", 1, 3})
