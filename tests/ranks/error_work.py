"""What test_errors.py asks ranks to do wrong."""

import copy
import os
from contextlib import suppress
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import mics_core as mics
from mics_core import registry
from mics_core.comm import first_cause
from mics_core.comm.world import World
from runtime_work import WIDTH, Model


def sharded(**settings: object) -> Model:
    return mics.shard(Model(2), mics.Sharding.mics(dist.get_world_size()), **settings)  # type: ignore[arg-type]


def batch() -> Tensor:
    return torch.randn(2, WIDTH)


def shard_with(sharding: mics.Sharding, per_node: int | None) -> None:
    mics.shard(Model(2), sharding, ranks_per_node=per_node)


def shard_differently(how: str) -> None:
    rank = dist.get_rank()
    model, sharding, precision = Model(2), mics.Sharding.mics(2), mics.Precision.fp32()
    prefetch_bytes = None
    if rank == 1:
        if how == "sharding":
            sharding = mics.Sharding.ddp()
        elif how == "precision":
            precision = mics.Precision.bf16()
        elif how == "units":
            model = Model(3)
        elif how == "shapes":
            model.blocks[1].up = nn.Linear(WIDTH, 2 * WIDTH)
        elif how == "frozen":
            model.embedding.weight.requires_grad_(False)
        elif how == "prefetch_bytes":
            prefetch_bytes = 10
        elif how == "invalid":
            sharding = mics.Sharding(2, 1, 2)
    mics.shard(model, sharding, precision=precision, prefetch_bytes=prefetch_bytes)


def shard_on_mixed_nodes() -> None:
    """Ranks 0 and 2 on one node, 1 and 3 on the other."""
    os.environ["GROUP_RANK"] = str(dist.get_rank() % 2)
    mics.shard(Model(2), mics.Sharding.mics(2), ranks_per_node=2)


def bring_fewer_micro_batches(lengths: list[int]) -> None:
    model = sharded()
    for x in mics.accumulate(model, [batch() for _ in range(lengths[dist.get_rank()])]):
        model(x).backward()


def bring_micro_batches(kinds: list[str]) -> None:
    model = mics.shard(Model(2), mics.Sharding.ddp())
    kind = kinds[dist.get_rank()]
    batches = [batch()] * 2 if kind != "nothing" else []
    for x in mics.accumulate(model, (each for each in batches) if kind == "generator" else batches):
        model(x).backward()


def train_differently(sharding: mics.Sharding, how: str) -> None:
    """Three steps, of which rank 1 does the second in another way; replicas are compared at the end."""
    torch.manual_seed(0)
    model = mics.shard(Model(2), sharding)
    optimizer = (torch.optim.SGD if how == "rate of SGD" else mics.AdamW)(model.parameters(), lr=0.01)
    for step in range(3):
        odd = how if dist.get_rank() == 1 and step == 1 else ""
        for count, x in enumerate(mics.accumulate(model, [batch(), batch()])):
            if odd == "no backward":
                break
            model(x).backward()
            if odd == "break" and count == 0:
                break
        if odd == "clip":
            mics.clip_grad_norm_(model, 1.0)
        mics.clip_grad_norm_(model, 0.5 if odd == "norm" else 1.0)
        if odd.startswith("rate"):
            optimizer.param_groups[0]["lr"] = 0.02
        optimizer.step()
        optimizer.zero_grad()
        if how in ("rate of AdamW", "norm") and step == 1:
            mics.check_replicas(model)


def cannot_connect() -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("connection refused")

    world = World(None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", fails)
        world.group((0, 1), "test")


def meet_in_different_calls() -> None:
    World(None).all_gather_object(None, "save" if dist.get_rank() == 0 else "check_replicas")


def send_messages_of_different_lengths(how: str) -> None:
    """gloo would abort the process that gets more than it waits for."""
    group = World(None).group((0, 1), "test")
    group._group = Impatient(group._group)  # type: ignore[attr-defined]
    length = 4 if dist.get_rank() == 0 else 1024
    if how == "gather":
        group.all_gather(torch.empty(2 * length), torch.ones(length))
    else:
        group.exchange(torch.ones(2 * length))


def use_before_shard(what: str) -> None:
    model = Model(2)
    if what == "accumulate":
        list(mics.accumulate(model, [batch()]))
    elif what == "clip":
        mics.clip_grad_norm_(model, 1.0)
    elif what == "AdamW":
        mics.AdamW(model.parameters())
    elif what == "full_params":
        with mics.full_params(model):
            pass


def penalise_slices(degrees: tuple[int, int, int], marked: bool, kind: str, first: bool) -> str:
    """What is said; the training that follows is that of ranks that never did it."""
    plain = Model(2)
    models = [mics.shard(copy.deepcopy(plain), mics.Sharding(*degrees)) for _ in range(2)]
    optimizers: list[Any] = [
        mics.AdamW(model.parameters()) if kind == "mics.AdamW" else torch.optim.SGD(model.parameters(), lr=0.1)
        for model in models
    ]
    x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))

    def steps(model: Model, optimizer: Any, penalty: float) -> None:
        for batch in mics.accumulate(model, [x, x]) if marked else [x, x]:
            # Whether autograd comes to the penalty first or last.
            early = sum(p.square().sum() for p in model.parameters()) if first else 0
            loss = model(batch).square().mean()
            late = 0 if first else sum(p.square().sum() for p in model.parameters())
            (loss + penalty * (early + late) if penalty else loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    with pytest.raises(mics.LifecycleError) as caught:
        steps(models[0], optimizers[0], 0.1)
    optimizers[0].zero_grad()
    for model, optimizer in zip(models, optimizers, strict=True):
        for _ in range(2):
            steps(model, optimizer, 0.0)
    for mine, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine, other)
    return str(caught.value)


def step_inside_backward() -> None:
    model = sharded()
    optimizer = mics.AdamW(model.parameters())
    x = batch().requires_grad_()
    y = x * 2
    y.register_hook(lambda _: optimizer.step())
    model(y).backward()


def step_inside_forward() -> None:
    model = sharded()
    optimizer = torch.optim.SGD(model.parameters())
    model.blocks[1].up.register_forward_hook(lambda *_: optimizer.step())
    model(batch())


def change_while_gathered() -> None:
    model = sharded()

    def change(module: nn.Module, *_: object) -> None:
        with torch.no_grad():
            module.weight.mul_(2)  # type: ignore[operator]

    model.blocks[0].up.register_forward_pre_hook(change)
    model(batch())


def shard_twice() -> None:
    mics.shard(sharded(), mics.Sharding.ddp())


def shard_integers() -> None:
    model = Model(1)
    model.register_parameter("count", nn.Parameter(torch.zeros(3, dtype=torch.int32), requires_grad=False))
    mics.shard(model, mics.Sharding.ddp())


def old_optimizer(kind: str) -> None:
    model = Model(2)
    optimizer = getattr(torch.optim, kind)(model.parameters())
    mics.shard(model, mics.Sharding.ddp())
    model(batch()).backward()
    optimizer.step()


def optimize_with(kind: str) -> None:
    model = sharded()
    optimizer = getattr(torch.optim, kind)(model.parameters())
    model(batch()).backward()
    optimizer.step(lambda: 0.0) if kind == "SGD" else optimizer.step()


def backward_after_clip() -> None:
    model = sharded()
    model(batch()).backward()
    mics.clip_grad_norm_(model, 1.0)
    model(batch()).backward()


def return_nothing_to_watch() -> None:
    class Opaque:
        __slots__ = ("tensor",)

    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            opaque = Opaque()
            opaque.tensor = super().forward(x)
            return opaque  # type: ignore[return-value]

    model = mics.shard(nn.Sequential(Odd(WIDTH, WIDTH)), mics.Sharding.mics(2), units=[Odd])
    model(batch())


def run_a_copy() -> None:
    copy.deepcopy(sharded())(batch())


def optimize_a_stranger(how: str) -> None:
    model, stranger = sharded(), nn.Parameter(torch.zeros(3))
    if how == "AdamW":
        mics.AdamW([*model.parameters(), stranger])
    else:
        mics.AdamW(model.parameters()).add_param_group({"params": [stranger]})


def meddle(how: str) -> None:
    """Do to parameters or gradients what would be lost."""
    model = sharded()
    optimizer = mics.AdamW(model.parameters())
    model(batch()).backward()
    parameter = max(model.parameters(), key=torch.Tensor.numel)
    if how == "gradient early":
        parameter.grad.mul_(2)  # type: ignore[union-attr]
    elif how == "gradient replaced":
        mics.clip_grad_norm_(model, 1.0)
        parameter.grad = torch.zeros_like(parameter)
    elif how == "half":
        model.half()
    elif how == "data":
        parameter.data = parameter.data.clone()
    optimizer.step()


def misuse_full_params(how: str) -> None:
    model = sharded()
    with mics.full_params(model):
        if how == "backward":
            model(batch()).backward()
        else:
            model.blocks[0].up.weight = nn.Parameter(torch.zeros(3, 3))


class Unfilled(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


def shard_unfilled() -> None:
    with torch.device("meta"):
        model = nn.Sequential(Unfilled(WIDTH, WIDTH))
    mics.shard(model, mics.Sharding.mics(2))


class GivesItsWeight(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), self.weight


def return_a_parameter() -> None:
    model = nn.Sequential(GivesItsWeight(WIDTH, WIDTH))
    mics.shard(model, mics.Sharding.mics(2), units=[GivesItsWeight])(batch())


class Impatient:
    """A process group whose receives wait for a second."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.send = group.send

    def recv(self, *args: Any) -> Any:
        work = self._group.recv(*args)
        return SimpleNamespace(wait=lambda: work.wait(timedelta(seconds=1)))


def stay_away() -> None:
    """Rank 1 does not come to the second forward until rank 0 has given up."""
    model = sharded()
    model(batch())
    told = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 1:
        told.wait(["gave up"], timedelta(minutes=10))
        raise RuntimeError("was away")
    # Only now, when all that ranks do together is done: a busy machine may take its time for that.
    for group in registry.runtime_of(model, "test").ladder._groups.values():
        group._group = Impatient(group._group)
    try:
        model(batch())
    finally:
        told.set("gave up", "")


class Chosen(Model):
    """Blocks of equal size, used in an order that may be another one on each rank."""

    order: tuple[int, ...] = (0, 1, 2)
    raises = False  # at the end, when all is gathered

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for number in self.order:
            x = self.blocks[number](x)
        if self.raises:
            raise ValueError("no such luck")
        return x.float().square().mean()


def use_in_orders(sharding: mics.Sharding, orders: list[tuple[int, ...]], marked: bool, *, evaluate: bool) -> bool:
    """Two micro-steps and a step, or a forward alone; whether that came to an end."""
    torch.manual_seed(0)
    model = mics.shard(Chosen(3), sharding, ranks_per_node=2)
    model.order = orders[dist.get_rank()]
    if evaluate:
        with torch.no_grad():
            model(batch())
        return True
    batches = [batch(), batch()]
    for each in mics.accumulate(model, batches) if marked else batches:
        model(each).backward()
    mics.AdamW(model.parameters()).step()
    return True


def evaluate_apart(degrees: tuple[int, int, int], times: list[int], raising: list[int]) -> tuple[float, float]:
    """The loss after a step where each rank has evaluated so often, some to raise when all is gathered; and where none
    has.
    """

    def loss_after(times: int, raises: bool) -> float:
        torch.manual_seed(0)
        model = mics.shard(Chosen(3), mics.Sharding(*degrees), ranks_per_node=2)
        optimizer = mics.AdamW(model.parameters())
        for step in range(2):
            loss = model(torch.full((2, WIDTH), 0.1 * (1 + step)))
            loss.backward()
            with torch.no_grad():
                for _ in range(times):
                    model.raises = raises
                    with suppress(ValueError):
                        model(batch())
                    model.raises = False
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    rank = dist.get_rank()
    return loss_after(times[rank], rank in raising), loss_after(0, False)


def evaluate_before_a_step_in_another_order() -> None:
    """The backward has asked already when an evaluation comes, in which all agree."""
    torch.manual_seed(0)
    model = mics.shard(Chosen(3), mics.Sharding.mics(4), ranks_per_node=2)
    model.order = (2, 1, 0) if dist.get_rank() == 1 else (0, 1, 2)
    for each in mics.accumulate(model, [batch()]):
        model(each).backward()
    model.order = (0, 1, 2)
    with torch.no_grad():
        model(batch())
    mics.AdamW(model.parameters()).step()


def freeze_blocks_and_use_in_orders(orders: list[tuple[int, ...]]) -> None:
    """Frozen units have no gradients: nothing but their gathers tells another order."""
    torch.manual_seed(0)
    plain = Chosen(3)
    plain.blocks.requires_grad_(False)
    model = mics.shard(plain, mics.Sharding.mics(2), ranks_per_node=2)
    model.order = orders[dist.get_rank()]
    model(batch()).backward()
    mics.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad]).step()


def raise_in_a_forward() -> None:
    """Rank 1 ends by an error of the user's own, as an uncaught one would be told."""
    model = sharded()
    model(batch())
    told = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 1:
        first_cause.publish(ValueError("no\nsuch luck"))
        first_cause.publish(KeyError("a later one"))
        told.set("has told", "")
        told.wait([f"rank {rank} gave up" for rank in (0, 2)], timedelta(minutes=10))
        raise RuntimeError("was ended")
    told.wait(["has told"], timedelta(minutes=10))
    for group in registry.runtime_of(model, "test").ladder._groups.values():
        group._group = Impatient(group._group)
    try:
        model(batch())
    finally:
        told.set(f"rank {dist.get_rank()} gave up", "")
