"""What test_eight_bits.py asks ranks to do: train with eight bits between nodes, and tell what became of numbers."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mics_core as mics
from mics_core import registry
from seeded import seeded
from training_work import Mlp, Plan, loss, steps


@dataclass(frozen=True)
class Form:
    """What travels in eight bits, and how."""

    values: torch.dtype
    compute: torch.dtype = torch.float32
    reduce: torch.dtype = torch.float32
    hop1: bool = False
    exact: tuple[str, ...] = ()

    @property
    def precision(self) -> mics.Precision:
        hop1 = self.values if self.hop1 else None
        return mics.Precision(
            self.compute, self.reduce, between_nodes=self.values, hop1_between_nodes=hop1, exact=self.exact
        )


class Given(nn.Module):
    """Parameters whose gradients are what is given."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        for number, shape in enumerate(shapes):
            self.register_parameter(f"p{number}", nn.Parameter(torch.zeros(shape)))

    def forward(self, gradients: list[Tensor]) -> Tensor:
        return sum((p * g.to(p.dtype)).float().sum() for p, g in zip(self._values(), gradients, strict=True))

    def _values(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._parameters]


def gradients(shapes: list[tuple[int, ...]], rank: int, number: int) -> list[Tensor]:
    """Of a rank's micro-batch; some are a thousand times as large as others."""
    generator = seeded(1000 * rank + number)
    return [
        torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-2, 2, shape, generator=generator).float()
        for shape in shapes
    ]


def means(plan: Plan, shapes: list[tuple[int, ...]], form: Form) -> list[tuple[Tensor, Tensor, float]]:
    """Of each parameter: the mean gradient, that of all ranks in float64, and the largest a rank's sum can have."""
    model = mics.shard(Given(shapes), plan.sharding, ranks_per_node=plan.per_node, precision=form.precision)
    for number in plan.batches(model):
        model(gradients(shapes, dist.get_rank(), number)).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.step()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    mics.check_replicas(model)
    every = [[gradients(shapes, rank, number) for number in range(plan.micro_steps)] for rank in range(plan.world)]
    largest = sum(max(float(g.abs().max()) for g in grads) for rank in every for grads in rank)
    result = []
    with mics.full_params(model):
        for index, parameter in enumerate(model.parameters()):
            exact = torch.stack([grads[index].double() for rank in every for grads in rank]).sum(0) / plan.world
            result.append((parameter.detach().clone(), exact, largest / plan.world))
    return result


def shown_after_a_write(degrees: tuple[int, int, int]) -> tuple[bool, bool, bool, bool]:
    """Of weights after steps: whether they are near their masters, vectors are the rounded masters, and others differ
    from theirs. And whether any differ after a user's write.
    """
    precision = mics.Precision.bf16(between_nodes=torch.int8)
    model = mics.shard(Mlp(), mics.Sharding(*degrees), ranks_per_node=2, precision=precision)
    steps(model, 6)
    mics.check_replicas(model)
    near, vectors, others = _follow(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    mics.check_replicas(model)
    _, vectors_then, others_then = _follow(model)
    return near, vectors, others, others_then or not vectors_then


def _follow(model: nn.Module) -> tuple[bool, bool, bool]:
    """On all ranks, on all, on any."""
    mics.ledger(model)  # waits for what is under way
    near, vectors, differ = True, True, False
    for unit in registry.runtime_of(model, "test").units:
        part = unit.trained
        rounded = part.master.to(part.refreshed.dtype)
        blocked = min(max(part.layout.exact - part._master_at, 0), len(rounded))
        off, eps = (part.refreshed.float() - part.master).abs(), torch.finfo(rounded.dtype).eps
        near &= bool((off <= eps * (part.master.abs() + part.master.abs().max() / 100)).all())
        vectors &= torch.equal(part.refreshed[blocked:], rounded[blocked:])
        differ |= not torch.equal(part.refreshed[:blocked], rounded[:blocked])
    everyone: list[tuple[bool, bool, bool]] = [(near, vectors, differ)] * dist.get_world_size()
    dist.all_gather_object(everyone, (near, vectors, differ))
    return all(each[0] for each in everyone), all(each[1] for each in everyone), any(each[2] for each in everyone)


def norm_of(bad: float, precision: mics.Precision, degrees: tuple[int, int, int]) -> float:
    """Of gradients with one that is not finite, on one rank."""
    model = mics.shard(Mlp(), mics.Sharding(*degrees), ranks_per_node=2, precision=precision)
    factor = bad if dist.get_rank() == 1 else 1.0
    (loss(model, 0, 0, dist.get_rank()) * factor).backward()
    return float(mics.clip_grad_norm_(model, 1.0))
