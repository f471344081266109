"""What test_models.py asks ranks to do: train models that are cut, and the same models in one process.

`trains_as_one_process` trains a case sharded, and whole copies of it whose gradients are summed, and compares every
parameter. The cases themselves are in model_cases_*.py.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import mics_core as mics
import model_cases_calls as calls
import model_cases_layers as layers
import model_cases_loops as loops
import model_cases_parameters as parameters
from mics_core import registry
from model_case import ROWS, WIDTH, Block, Case, Chain, distance, make_optimizer
from reference import sum_gradients
from seeded import seeded

CASES: dict[str, type[Case]] = {
    case.__doc__.rstrip("."): case
    for module in (parameters, calls, layers, loops)
    for case in vars(module).values()
    if isinstance(case, type) and issubclass(case, Case) and case is not Case and case.__doc__
}

STEPS, MICRO_STEPS = 3, 2

RELATIVE = 1e-5
"""How far a parameter may be from the reference, against the largest of its tensor or 1.

Both sum the same float32 gradients in another order, which is off by some 1e-7 of their scale, and SGD passes that on.
AdamW divides by the gradient's own size, so where a gradient is all rounding error its update would be, too: an epsilon
of 1e-4 keeps the error's share of an update below 1e-7 / 1e-4, of a learning rate of 1e-2 that is 1e-5.
"""


@dataclass(frozen=True)
class Run:
    """One way to train: a sharding, a loop, an optimizer."""

    degrees: tuple[int, int, int]
    loop: str
    optimizer: str
    zero: str = "after the step"

    @property
    def sharding(self) -> mics.Sharding:
        return mics.Sharding(*self.degrees)


# Nodes have two ranks.
RUNS = (
    Run((2, 2, 4), "accumulate", "mics.AdamW"),
    Run((4, 4, 4), "plain", "SGD", "never"),
    Run((1, 2, 4), "accumulate", "torch.AdamW"),
    Run((2, 4, 4), "plain", "mics.AdamW", "to zero"),
    Run((2, 2, 2), "accumulate", "torch.AdamW", "before the backward"),
    Run((1, 4, 4), "plain", "mics.AdamW"),
    Run((4, 4, 4), "accumulate", "mics.AdamW"),
    Run((2, 2, 4), "plain", "torch.AdamW", "never"),
    Run((1, 1, 1), "accumulate", "mics.AdamW", "before the backward"),
    Run((2, 2, 2), "plain", "mics.AdamW"),
    Run((1, 1, 4), "accumulate", "SGD", "to zero"),
)


def my_batches(case: type[Case]) -> list[list[Any]]:
    """This rank's, by step and micro-step."""
    generator, rank, world = seeded(7), dist.get_rank(), dist.get_world_size()
    return [[[case.batch(generator) for _ in range(world)][rank] for _ in range(MICRO_STEPS)] for _ in range(STEPS)]


def build(case: type[Case]) -> Case:
    torch.manual_seed(1)
    return case()


class Reference:
    """The model whole, on this rank's data and with the gradients of all."""

    def __init__(self, case: type[Case], run: Run) -> None:
        self.model = build(case)
        self.before = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.optimizer = self.model.optimizer(run.optimizer.replace("mics", "torch"))

    def train(self, batches: list[Any], step: int) -> tuple[Tensor, Sequence[Tensor]]:
        """One step; the gradients' norm, and what was seen before it."""
        model = self.model
        seen = model.between(self.optimizer, batches[0], step)
        for batch in batches:
            model.backward(model.loss(batch, step) / len(batches) / dist.get_world_size())
        sum_gradients(model)
        norm = clip(model, model.clip, nn.utils.clip_grad_norm_)
        self.optimizer.step()
        model.zero_grad()
        return norm, seen


def clip(model: nn.Module, most: float | None, by: Callable[..., Tensor]) -> Tensor:
    parameters = model if by is mics.clip_grad_norm_ else model.parameters()
    return torch.zeros(()) if most is None else by(parameters, most)


def train(model: Case, optimizer: Any, batches: list[Any], step: int, run: Run) -> tuple[Tensor, Sequence[Tensor]]:
    """One step of the sharded model; the gradients' norm, and what was seen before it."""
    seen = model.between(optimizer, batches[0], step)
    if run.zero == "before the backward":
        optimizer.zero_grad()
    for batch in mics.accumulate(model, batches) if run.loop == "accumulate" else batches:
        model.backward(model.loss(batch, step) / len(batches))
    norm = clip(model, model.clip, mics.clip_grad_norm_)
    optimizer.step()
    if run.zero in ("after the step", "to zero"):
        optimizer.zero_grad(set_to_none=run.zero != "to zero")
    return norm, seen


def trains_as_one_process(name: str, runs: Sequence[Run]) -> None:
    """The work of most tests."""
    for run in runs:
        try:
            compare_training(CASES[name], run)
        except Exception as error:
            error.add_note(f"while training {name!r} by {run}")
            raise


def compare_training(case: type[Case], run: Run) -> None:
    reference = Reference(case, run)
    model = build(case)
    model.prepare()
    names = [list(dict(model.named_parameters())), list(model.state_dict())]
    mics.shard(model, run.sharding, units=case.units)
    model.finish()
    with pytest.warns(UserWarning, match="1-D slices"):
        assert [list(dict(model.named_parameters())), list(model.state_dict())] == names
    optimizer = model.optimizer(run.optimizer)
    for step, batches in enumerate(my_batches(case)):
        expected = reference.train(batches, step)
        found = train(model, optimizer, batches, step, run)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, check_dtype=False)
    assert_same(model, reference.model)
    assert any(
        not torch.equal(old, new) for old, new in zip(reference.before, reference.model.parameters(), strict=True)
    ), "nothing was trained, so nothing was shown"


def assert_same(model: nn.Module, reference: nn.Module, relative: float = RELATIVE) -> None:
    """All parameters and buffers agree, and all replicas."""
    mics.check_replicas(model)
    with mics.full_params(model):
        for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert mine.shape == theirs.shape, f"{name} is {tuple(mine.shape)}, expected {tuple(theirs.shape)}"
            off, scale = ((x.abs().max().item() if x.numel() else 0.0) for x in (mine - theirs, theirs))
            off /= max(1.0, scale)
            assert off <= relative, f"{name} is off by {off:.1e} of its scale"
    for (name, mine), theirs in zip(model.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")


# ---- where weights come from


class Watched(nn.Linear):
    """Tells how much of the model is in memory whenever weights are drawn."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        LARGEST.append(sum(p.numel() for p in self.everything() if not p.is_meta and p.dim() > 1))

    everything: ClassVar[Callable[[], Iterable[nn.Parameter]]] = staticmethod(lambda: ())


LARGEST: list[int] = []


class Drawn(Chain):
    """A model that can be built on the meta device, with tied weights, buffers and one parameter of the root's own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(Watched(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)) for _ in range(3)])
        self.blocks.append(nn.Linear(WIDTH, WIDTH))
        self.blocks[3].weight = self.first.weight
        self.blocks[1][0].requires_grad_(False)
        self.own = nn.Parameter(torch.empty(WIDTH))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.own)


def draw(degrees: tuple[int, int, int]) -> tuple[dict[str, Tensor], int]:
    """A meta-device model's weights, and the most elements of matrices that were whole at a time."""
    dist.barrier()
    LARGEST.clear()
    torch.manual_seed(11)
    with torch.device("meta"):
        model = Drawn()
    Watched.everything = staticmethod(model.parameters)
    state = torch.get_rng_state()
    mics.shard(model, mics.Sharding(*degrees))
    assert torch.equal(state, torch.get_rng_state()), "the caller's generator was used"
    mics.check_replicas(model)
    return whole_state(model), max(LARGEST)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    with mics.full_params(model):
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def shard_unequal(degrees: tuple[int, int, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and buffers before and after, on ranks that draw different ones."""
    torch.manual_seed(dist.get_rank())
    model = Drawn()
    model.blocks[0][1].running_mean.normal_()
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    mics.shard(model, mics.Sharding(*degrees))
    mics.check_replicas(model)
    return before, whole_state(model)


# ---- precision


def train_in(
    precision: mics.Precision, optimizer: str, steps: int, case: str, degrees: tuple[int, int, int]
) -> tuple[list[float], float]:
    """The losses of a model trained on one batch, and how far its weights end from those of one process in float32."""
    run = Run(degrees, "accumulate", optimizer)
    reference = Reference(CASES[case], run)
    model = mics.shard(build(CASES[case]), run.sharding, units=CASES[case].units, precision=precision)
    trained = model.optimizer(optimizer)
    batches = my_batches(CASES[case])[0]
    losses = []
    for step in range(steps):
        with torch.no_grad():
            losses.append(model.loss(batches[0], step).item())
        reference.train(batches, step)
        train(model, trained, batches, step, run)
    mics.check_replicas(model)
    return losses, farthest(model, reference.model)


def farthest(model: nn.Module, reference: nn.Module) -> float:
    with mics.full_params(model):
        pairs = zip(model.parameters(), reference.parameters(), strict=True)
        return max((mine - theirs).abs().max().item() for mine, theirs in pairs)


class Unclipped(Chain):
    clip = None  # norms are float32


def exact_in_float64(optimizer: str) -> float:
    torch.set_default_dtype(torch.float64)
    run = Run((2, 2, 4), "accumulate", optimizer)
    reference = Reference(Unclipped, run)
    precision = mics.Precision(torch.float64, torch.float64, torch.float64)
    model = mics.shard(build(Unclipped), run.sharding, precision=precision)
    trained = model.optimizer(optimizer)
    for step, batches in enumerate(my_batches(Unclipped)):
        reference.train(batches, step)
        train(model, trained, batches, step, run)
    return farthest(model, reference.model)


def overflow(optimizer: str) -> tuple[list[float], float, float]:
    """Two steps with infinite gradients on rank 1 alone, then good ones.

    Returns the scale after each step, how far the weights moved in the bad steps, and how far they end from those of a
    process that took the good steps only.
    """
    run = Run((2, 2, 4), "accumulate", optimizer)
    reference = Reference(Chain, run)
    precision = mics.Precision.fp16(loss_scale=mics.LossScale(initial=1024.0, patience=2))
    model = mics.shard(build(Chain), run.sharding, precision=precision)
    trained = model.optimizer(optimizer)
    scaling = registry.runtime_of(model, "the test").scaling
    assert scaling
    scales = []
    for step, batches in enumerate(my_batches(Chain)):
        if step < 2:
            bad = torch.inf if dist.get_rank() == 1 else 1.0
            for micro_batch in mics.accumulate(model, batches):
                (model.loss(micro_batch, step) * bad).backward()
            if step:
                mics.clip_grad_norm_(model, 1.0)  # a step is skipped with and without
            trained.step()
            moved = farthest(model, reference.model)
        else:
            for again in range(4):
                reference.train(batches, again)
                train(model, trained, batches, again, run)
                scales.append(scaling.scale.item())
        scales.append(scaling.scale.item())
    mics.check_replicas(model)
    return scales, moved, farthest(model, reference.model)


class Fragile(Chain):
    """One weight has a gradient of its own, which no other gradient depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.weight * 1.0
        return super().forward(x)


def not_finite(
    degrees: tuple[int, int, int], precision: str, bad: float, optimizer: str, clipped: bool
) -> tuple[float, int, float]:
    """The norm of a step in which one weight's gradient is `bad` on rank 1 alone, and how many weights are lost by it.

    And how far a model that leaves the step out ends from one that never had it.
    """
    run = Run(degrees, "plain", optimizer)
    models = [mics.shard(build(Fragile), run.sharding, precision=getattr(mics.Precision, precision)()) for _ in "123"]
    taking, leaving, without = models
    optimizers = [model.optimizer(optimizer) for model in models]
    batch = Fragile.batch(seeded(dist.get_rank()))
    norm = torch.zeros(())
    for model, trained in zip((taking, leaving), optimizers, strict=False):
        loss = model.loss(batch, 0)
        (loss + model.kept * (bad if dist.get_rank() == 1 else 1.0)).backward()
        if clipped or model is leaving:
            norm = mics.clip_grad_norm_(model, 1.0)
        if model is taking:
            trained.step()
        trained.zero_grad()
    for model, trained in zip((leaving, without), optimizers[1:], strict=True):
        train(model, trained, [batch], 0, run)
    mics.check_replicas(taking)
    with mics.full_params(taking), mics.full_params(without):
        lost = sum(int((~p.isfinite()).sum()) for p in taking.parameters())
        return norm.item(), lost, farthest(leaving, without)


def two_optimizers_overflow() -> list[float]:
    """The loss scale after a step with infinite gradients and one with good ones, each taken by two optimizers."""
    torch.manual_seed(5)
    precision = mics.Precision.fp16(loss_scale=mics.LossScale(initial=1024.0, patience=1))
    model = mics.shard(build(Chain), mics.Sharding(2, 2, 2), precision=precision)
    parameters = list(model.parameters())
    optimizers = [mics.AdamW(parameters[:4]), torch.optim.SGD(parameters[4:], lr=0.1)]
    scaling = registry.runtime_of(model, "the test").scaling
    assert scaling
    scales = []
    for factor in (torch.inf, 1.0):
        (model(torch.ones(ROWS, WIDTH)).square().mean() * factor).backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        scales.append(scaling.scale.item())
    return scales


def half(case: str, loss: Callable[[Case, Tensor], Tensor]) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """The gradients' norm and the input's gradient in float16, and those of one process in float32."""
    torch.manual_seed(5)
    precision = mics.Precision.fp16(loss_scale=mics.LossScale(initial=64.0))
    model = mics.shard(build(CASES[case]), mics.Sharding(2, 2, 2), units=CASES[case].units, precision=precision)
    reference = build(CASES[case])
    x = torch.randn(ROWS, WIDTH).half()  # the same on all ranks
    ours, theirs = x.clone().requires_grad_(), x.float().requires_grad_()
    loss(model, ours).backward()
    loss(reference, theirs).backward()
    norm = nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    return mics.clip_grad_norm_(model, 1.0), ours.grad, norm, theirs.grad


def once(model: Case, x: Tensor) -> Tensor:
    return distance(model(x).float(), torch.zeros_like(x))


def chained(model: Case, x: Tensor) -> Tensor:
    return once(model, model(x))


# ---- more than one model, and what is refused


def play(generator: Case, judge: Case) -> None:
    """Two models that train each other, as in a GAN; the judge is frozen while the generator learns."""
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (generator, judge)]
    random = seeded(3)
    for _ in range(3):
        x = torch.randn(ROWS, WIDTH, generator=random)
        (judge(x).square().mean() - judge(generator(x).detach()).mean()).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        judge.requires_grad_(False)
        judge(generator(x)).mean().backward()
        judge.requires_grad_(True)
        optimizers[0].step()
        optimizers[0].zero_grad()
        (judge(generator(x)).mean() - judge(x).mean()).backward()  # both at once
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def two_models(cases: Sequence[str]) -> float:
    """How far two models end from two that were trained in one process."""
    alone, cut = ([build(CASES[case]) for case in cases] for _ in range(2))
    for model in cut:
        mics.shard(model, mics.Sharding(2, 2, 2))
    play(*alone)
    play(*cut)
    return max(farthest(model, reference) for model, reference in zip(cut, alone, strict=True))


def clip_often(most: Sequence[float]) -> float:
    """How far a step of 1 moves the weights after such clips."""
    model = mics.shard(build(Chain), mics.Sharding(2, 2, 2))
    before = whole_state(model)
    model.loss(torch.ones(ROWS, WIDTH), 0).backward()
    for norm in most:
        mics.clip_grad_norm_(model, norm)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    after = whole_state(model)
    return torch.stack([(after[name] - before[name]).norm() for name in after]).norm().item()


def into_a_dict() -> None:
    model = Case()
    model.blocks = nn.ModuleList([calls.Into()])
    mics.shard(model, mics.Sharding(2, 2, 2))
    outputs: dict[str, Tensor] = {}
    model.blocks[0](torch.ones(ROWS, WIDTH), outputs)
    outputs["x"].sum().backward()


def thaw() -> None:
    model = mics.shard(build(parameters.FrozenUnit), mics.Sharding(2, 2, 2))
    model.blocks[1].requires_grad_(True)
    optimizer = make_optimizer("SGD", model.parameters())
    model.loss(torch.ones(ROWS, WIDTH), 0).backward()
    optimizer.step()


class Clamped(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.rise.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


def change_in_forward() -> None:
    model = Case()
    model.blocks = nn.ModuleList([Clamped()])
    mics.shard(model, mics.Sharding(2, 2, 2))
    model.blocks[0](torch.ones(ROWS, WIDTH))


def sparse() -> None:
    model = mics.shard(nn.Sequential(nn.Embedding(20, WIDTH, sparse=True)), mics.Sharding(2, 2, 2))
    model(torch.arange(5)).sum().backward()


def zero_without_a_step() -> None:
    model = mics.shard(build(Chain), mics.Sharding(1, 1, 2))
    model.loss(torch.ones(ROWS, WIDTH), 0).backward()
    model.zero_grad(set_to_none=False)  # reaches this rank's part alone
    model.loss(torch.ones(ROWS, WIDTH), 0).backward()


def half_by_parts() -> None:
    case = calls.Parted
    model = mics.shard(build(case), mics.Sharding(2, 2, 2), units=case.units, precision=mics.Precision.fp16())
    model.loss(torch.ones(ROWS, WIDTH).half(), 0).backward()


def batch_norm_in_half() -> None:
    mics.shard(build(layers.Pictures), mics.Sharding(2, 2, 2), precision=mics.Precision.bf16())
