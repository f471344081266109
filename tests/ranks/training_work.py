"""What test_training.py asks ranks to do: train beside the same model whole, and compare."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from threading import current_thread
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mics_core as mics
from mics_core import registry
from mics_core.comm import lanes
from mics_core.comm import world as comm
from mics_core.unit.unit import ShardedState
from reference import sum_gradients
from seeded import seeded

STEPS = 5
WIDTH = 8


@dataclass(frozen=True)
class Plan:
    """How to train."""

    world: int
    per_node: int
    sharding: mics.Sharding
    micro_steps: int
    marked: bool

    def batches(self, model: nn.Module) -> Iterator[int]:
        """The numbers of a step's micro-batches."""
        numbers = range(self.micro_steps)
        return iter(mics.accumulate(model, numbers) if self.marked else numbers)


# ---- whole numbers, whose sums are exact in any order


class Product(nn.Module):
    """Matrices one after another, of -1, 0 and 1."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        generator = seeded(len(widths))
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(widths))
        self.shift = nn.Parameter(torch.zeros(widths[0]))
        for parameter in self.parameters():
            with torch.no_grad():
                parameter.copy_(torch.randint(-1, 2, parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.shift
        for layer in self.layers:
            x = layer(x)
        return x


def whole_numbers(shape: tuple[int, ...], *seed: int) -> Tensor:
    generator = seeded(sum(number * 1000**place for place, number in enumerate(seed)))
    return torch.randint(-2, 3, shape, generator=generator).float()


def exact(plan: Plan, widths: list[int], rows: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Sum of gradients and new weights after a step of SGD: what differs from one process, if anything does."""
    model = mics.shard(Product(widths), plan.sharding, ranks_per_node=plan.per_node)
    alone = Product(widths)

    def loss(model: nn.Module, rank: int, number: int) -> Tensor:
        x = whole_numbers((rows, widths[0]), rank, number, 1)
        target = whole_numbers((rows, widths[-1]), rank, number, 2)
        return (model(x) * target).sum()

    for number in plan.batches(model):
        for each in (model, alone):
            loss(each, dist.get_rank(), number).backward()
    sum_gradients(alone)
    # A quarter and a mean over a power of two have few bits, so the weights are exact there.
    torch.optim.SGD(model.parameters(), lr=0.25).step()
    result = {}
    if plan.world & (plan.world - 1) == 0:
        with mics.full_params(model):
            for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
                assert theirs.grad is not None
                result[f"{name} after the step"] = ours.detach().clone(), theirs.detach() - theirs.grad / plan.world / 4
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    with mics.full_params(model):
        for (name, mean), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
            assert theirs.grad is not None
            if plan.world & (plan.world - 1) == 0:
                result[f"gradient of {name}"] = mean.detach().clone(), theirs.grad / plan.world
            else:  # a third is not exact, but rounding finds the sum again
                result[f"gradient of {name}"] = (mean.detach().double() * plan.world).round().float(), theirs.grad
    return {name: pair for name, pair in result.items() if not torch.equal(*pair)}


# ---- models of several kinds


class Mlp(nn.Module):
    """Blocks one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return x


class Convolutions(nn.Module):
    """Weights of four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv1d(channels, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.GELU()) for channels in (1, 4)
        )
        self.last = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None]
        for block in self.blocks:
            x = block(x)
        return self.last(x.flatten(1))


class Attention(nn.Module):
    """Two layers of torch's transformer, over the elements of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, activation="gelu", batch_first=True)
            for _ in range(2)
        )
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., None] * self.places
        for layer in self.layers:
            x = layer(x)
        return self.last(x)[..., 0]


class Tied(Mlp):
    """One matrix in two units."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2][1].weight = self.blocks[0][1].weight
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(super().forward(x))


class Unused(Mlp):
    """A block and a bias that no forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])
        self.offset = nn.Parameter(torch.ones(WIDTH))


MODELS = {kind.__name__: kind for kind in (Mlp, Convolutions, Attention, Tied, Unused)}
PRECISIONS = {
    "fp32": mics.Precision.fp32(),
    "bf16": mics.Precision.bf16(),
    "fp16": mics.Precision.fp16(loss_scale=mics.LossScale(initial=1024.0)),
    "fp16, float16 gradients": mics.Precision.fp16(torch.float16, mics.LossScale(initial=1024.0)),
    "bf16, int8": mics.Precision.bf16(between_nodes=torch.int8),
}


def make_optimizer(name: str, parameters: Any, fused: bool) -> torch.optim.Optimizer:
    # AdamW divides by the root of a mean square: with a small epsilon, gradients that are zero but for rounding would
    # make steps as large as any.
    if name == "SGD":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)
    kind = mics.AdamW if fused and name == "mics.AdamW" else torch.optim.AdamW
    return kind(parameters, lr=1e-2, eps=1e-2, weight_decay=0.1)


def loss(model: nn.Module, step: int, number: int, rank: int) -> Tensor:
    seed = 1 + rank + 10 * number + 100 * step
    x = torch.randn(3, WIDTH, generator=seeded(seed))
    return (model(x).float() - x.roll(1, -1)).square().mean()


def train(
    plan: Plan, kind: str, optimizer_name: str, precision_name: str, max_norm: float | None
) -> tuple[dict[str, float], float]:
    """How far each weight is from one process's in float32 at the most, and the norms, relatively."""
    torch.manual_seed(5)
    alone = MODELS[kind]()
    torch.manual_seed(5)
    precision = PRECISIONS[precision_name]
    model = mics.shard(MODELS[kind](), plan.sharding, ranks_per_node=plan.per_node, precision=precision)
    optimizer = make_optimizer(optimizer_name, model.parameters(), True)
    reference = make_optimizer(optimizer_name, alone.parameters(), False)
    worst_norm = 0.0
    for step in range(STEPS):
        for number in plan.batches(model):
            (loss(model, step, number, dist.get_rank()) / plan.micro_steps).backward()
            (loss(alone, step, number, dist.get_rank()) / plan.micro_steps / plan.world).backward()
        sum_gradients(alone)
        if max_norm is not None:
            norm = mics.clip_grad_norm_(model, max_norm)
            expected = nn.utils.clip_grad_norm_(alone.parameters(), max_norm)
            worst_norm = max(worst_norm, (abs(norm - expected) / expected).item())
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
        mics.check_replicas(model)
    with mics.full_params(model):
        pairs = zip(model.named_parameters(), alone.parameters(), strict=True)
        return {name: (ours - theirs).detach().abs().max().item() for (name, ours), theirs in pairs}, worst_norm


def steps(model: nn.Module, count: int) -> torch.optim.Optimizer:
    """Some of one micro-step; the optimizer that took them."""
    optimizer = make_optimizer("mics.AdamW", model.parameters(), True)
    for step in range(count):
        loss(model, step, 0, dist.get_rank()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


# ---- lanes that are late

LATE = 0.004  # seconds, far more than the computation between two jobs


@contextmanager
def late(word: str) -> Iterator[set[str]]:
    """Let every job begin late on lanes whose names hold this word; the names of those that were late."""
    run = lanes.HostWork.run

    def run_late(work: lanes.HostWork, failure: BaseException | None) -> BaseException | None:
        if word in current_thread().name:
            delayed.add(current_thread().name)
            time.sleep(LATE)
        return run(work, failure)

    delayed: set[str] = set()
    with patch.object(lanes.HostWork, "run", run_late):
        yield delayed


def differing_if_late(plan: Plan, precision: mics.Precision, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words whose lanes change a bit of the norms or weights when they are late, for whoever reads must wait; and
    the lanes that no word delayed.
    """

    def outcome(*, patient: bool = False) -> list[bytes]:
        torch.manual_seed(5)
        model = mics.shard(Mlp(), plan.sharding, ranks_per_node=plan.per_node, precision=precision)
        # Two share each unit: the second one changes masters while the first one's refresh is under way.
        halves: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for number, parameter in enumerate(model.parameters()):
            halves[number // 2 % 2].append(parameter)  # one matrix of a block is in each
        optimizers = [make_optimizer("mics.AdamW", half, True) for half in halves]
        seen = []
        for step in range(3):
            for number in plan.batches(model):
                (loss(model, step, number, dist.get_rank()) / plan.micro_steps).backward()
            seen.append(mics.clip_grad_norm_(model, 0.5))
            for optimizer in optimizers:
                optimizer.step()
                if patient:
                    mics.ledger(model)  # waits for the refresh
            for optimizer in optimizers:
                optimizer.zero_grad()
        with mics.full_params(model):
            return [bytes(x.detach().view(-1).view(torch.uint8).tolist()) for x in (*seen, *model.parameters())]

    prompt = outcome(patient=True)
    wrong, delayed = [], set()
    for word in words:
        with late(word) as names:
            if outcome() != prompt:
                wrong.append(word)
        delayed |= names
    used = {f"mics {name}" for name, _ in comm._lanes}
    return wrong, sorted(used - delayed)


# ---- replicas


def replicas(sharding: mics.Sharding, per_node: int) -> list[tuple[int, str, bytes]]:
    """After two steps, what this rank holds: which piece of what, and its bytes."""
    torch.manual_seed(dist.get_rank())  # what ranks draw for themselves must not be in what they compare
    model = mics.shard(Mlp(), sharding, ranks_per_node=per_node, precision=mics.Precision.bf16())
    steps(model, 2)
    mics.check_replicas(model)
    runtime = registry.runtime_of(model, "test")
    held = []
    for unit in runtime.units:
        (part,) = unit.parts
        states = (("shard", part.shard, sharding.params), ("master", part.master, sharding.optimizer))
        for state, tensor, degree in states:
            piece = runtime.ladder.rungs.piece_number(dist.get_rank(), degree)
            held.append((piece, f"{state} of {unit.name}", bytes(tensor.view(torch.uint8).tolist())))
    return held


def steps_counted(sharding: mics.Sharding) -> dict[str, float]:
    """What AdamW has counted for each parameter in two steps."""
    model = mics.shard(Mlp(), sharding, ranks_per_node=2)
    state = steps(model, 2).state_dict()["state"]
    return {name: float(state[number]["step"]) for number, (name, _) in enumerate(model.named_parameters())}


def corrupt(sharding: mics.Sharding, state: str, culprit: int) -> None:
    """One bit of one rank's memory of the second block."""
    model = mics.shard(Mlp(), sharding, ranks_per_node=2, precision=mics.Precision.bf16())
    mics.check_replicas(model)
    if dist.get_rank() == culprit:
        (part,) = registry.runtime_of(model, "test").units[2].parts
        getattr(part, state).view(torch.uint8)[5] ^= 1
    mics.check_replicas(model)


def clamped() -> bool:
    """A user writes to parameters, which have their own memory where O > P, and compares at once; and writes again:
    whether the next forward computes with that.
    """
    model = mics.shard(Mlp(), mics.Sharding(1, 1, 2), ranks_per_node=1)
    optimizer = make_optimizer("mics.AdamW", model.parameters(), True)
    loss(model, 0, 0, dist.get_rank()).backward()
    optimizer.step()

    @torch.no_grad()
    def clamp(most: float) -> None:
        for parameter in model.parameters():
            parameter.clamp_(-most, most)

    clamp(0.1)
    mics.check_replicas(model)
    clamp(0.01)
    found = loss(model, 0, 0, 0)
    mics.check_replicas(model)
    return torch.equal(found, loss(model, 0, 0, 0))


def left_early() -> nn.Module:
    """A model with units that were gathered ahead of micro-steps that did not come."""
    model = mics.shard(Mlp(), mics.Sharding(2, 2, 2), ranks_per_node=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):  # in the second one the order is known, and units are gathered ahead
        for number in mics.accumulate(model, range(3)):
            loss(model, step, number, dist.get_rank()).backward()
            if step and number == 1:
                break
        if not step:
            mics.clip_grad_norm_(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return model


def loads_after_a_loop_was_left() -> list[float]:
    """The loss with weights that are loaded then, and in a model that does nothing before."""
    losses = []
    for model in (left_early(), mics.shard(Mlp(), mics.Sharding(2, 2, 2), ranks_per_node=2)):
        mics.load_weights({name: torch.full_like(tensor, 0.01) for name, tensor in Mlp().state_dict().items()}, model)
        losses.append(loss(model, 0, 0, 0).item())
    return losses


def under_way_after_a_loop_was_left() -> list[str]:
    """The units that are whole, or on their way, once a clip has prepared the step."""
    model = left_early()
    mics.clip_grad_norm_(model, 1.0)
    units = registry.runtime_of(model, "test").units
    return [unit.name for unit in units if unit.state is not ShardedState.SHARDED]
