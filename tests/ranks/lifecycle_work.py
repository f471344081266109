"""What test_lifecycle.py asks ranks to do: train a small model, and tell at every moment what its units look like."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mics_core as mics
from mics_core import registry
from mics_core.comm.ladder import Route
from mics_core.comm.lanes import Work
from mics_core.spec.topology import Scope
from mics_core.unit.unit import Gradient, ShardedState
from seeded import seeded

WIDTH = 6
FIRST, MIDDLE, LAST = range(3)
MAX_NORM = 0.5
ADAMW = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}

Tell = Callable[[str, int], None]


class Failure(Exception):
    """What a model raises when it is told to."""


class Block(nn.Module):
    """Tells when it is in its forward and in its backward."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.up, self.down = nn.Linear(WIDTH, WIDTH + 1), nn.Linear(WIDTH + 1, WIDTH)
        self.tell: Tell = lambda *_: None

    def forward(self, x: Tensor) -> Tensor:
        self.tell("in forward", self.number)
        inside = torch.tanh(self.up(x))
        if inside.requires_grad:
            inside.register_hook(lambda _: self.tell("in backward", self.number))
        return x + self.down(inside)


class Model(nn.Module):
    """Three blocks; it tells when it is between two of them, too."""

    def __init__(self, recomputes: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(number) for number in range(3))
        self.tell: Tell = lambda *_: None
        self.recomputes = recomputes

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for number, block in enumerate(self.blocks):
            x = self.between(x, number)
            x = checkpoint(block, x, use_reentrant=False) if self.recomputes else block(x)
        return x.square().mean()

    def between(self, x: Tensor, number: int) -> Tensor:
        """A step of its own, whose backward comes after this block's and before the one's of the block before."""
        if number > 0:
            self.tell("after forward", number - 1)
        x = x * 1
        if x.requires_grad:
            x.register_hook(lambda _: self.tell("has gradients", number))
        return x


@dataclass(frozen=True)
class Seen:
    """A row of the table, as it was found: all but what happens."""

    weight: str
    unit: str
    gradient: str
    grad: str
    lane: str


class Reference:
    """The same model whole, with the gradients of all ranks."""

    def __init__(self, world: int) -> None:
        self.model = Model()
        self.sums: list[dict[str, Tensor]] = [{} for _ in range(world)]  # of each rank, over its micro-batches
        self.factor = 1.0  # what the last clip multiplied by

    def take(self, number: int) -> None:
        """Every rank's backward of a micro-batch."""
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        for rank, sums in enumerate(self.sums):
            for name, grad in zip(names, torch.autograd.grad(self.model(batch(number, rank)), parameters), strict=True):
                sums[name] = sums.get(name, 0) + grad

    def drop(self) -> None:
        """As zero_grad does."""
        for sums in self.sums:
            sums.clear()
        self.factor = 1.0

    def total(self, name: str, ranks: Iterable[int]) -> Tensor:
        """The sum over ranks."""
        return torch.stack([self.sums[rank][name] for rank in ranks]).sum(0)

    def mean(self, name: str) -> Tensor:
        """The mean over all ranks."""
        return self.total(name, range(len(self.sums))) / len(self.sums)

    def clip(self) -> float:
        """The norm before."""
        norm = torch.stack([self.mean(name).square().sum() for name, _ in self.model.named_parameters()]).sum().sqrt()
        self.factor = min(1.0, MAX_NORM / (norm.item() + 1e-6))
        return norm.item()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.grad = self.mean(name) * self.factor
        optimizer.step()


def batch(number: int, rank: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=seeded(100 * number + rank))


class Walk:
    """Trains, and notes what each moment looks like; every value is compared with the reference's."""

    def __init__(
        self, seen: dict[str, Seen], sharding: mics.Sharding, precision: mics.Precision, recomputes: bool = False
    ) -> None:
        self.seen = seen
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self.reference = Reference(self.world)
        self.tolerance = 1e-5 if precision.compute == torch.float32 else 5e-2
        self.clips_in_memory = False  # as torch.optim needs it
        self.model = mics.shard(Model(recomputes), sharding, precision=precision)
        self.runtime = registry.runtime_of(self.model, "test")
        self.parameters = dict(self.model.named_parameters())
        self.sent: list[list[str]] = [[], [], []]  # of each block: what was handed to lanes since its last moment
        self.due: list[tuple[str, int, str]] = []  # events of the model, and the moments that they are
        self._listen()

    def _listen(self) -> None:
        ladder = self.runtime.ladder
        submit = ladder.submit

        def listening(
            route: Route, scope: Scope, what: str, job: Callable[[], None], after: Sequence[Work] = ()
        ) -> Work:
            action, _, unit = what.partition(" of ")
            routes = {"gather": {Route.GATHER}, "hop 1": {Route.HOP1}, "hop 2": {Route.HOP2, Route.REFRESH}}
            routes |= {rare: {Route.REFRESH, Route.GATHER} for rare in ("norm", "comparison", "full_params")}
            assert route in routes.get(action, {Route.REFRESH}), (route, what)
            for number, sent in enumerate(self.sent):
                # Once, however many lanes it takes.
                if action not in sent and (action == "full_params" or unit == f"blocks.{number}"):
                    sent.append(action)
            return submit(route, scope, what, job, after)

        ladder.submit = listening  # type: ignore[method-assign]
        for teller in (self.model, *self.model.blocks):
            teller.tell = self.told  # type: ignore[assignment]

    def told(self, event: str, number: int) -> None:
        """The model is at this point: note the moment, if the next one that is due is here."""
        if self.due and self.due[0][:2] == (event, number):
            moment = self.due.pop(0)[2]
            if moment == "raise":
                raise Failure
            if moment:
                self.note(moment)
        if event in ("in forward", "in backward"):
            self.sent[number].clear()

    def warm_up(self) -> None:
        """A pass in which the order of units is written down; nothing is left of it."""
        self.model(batch(0, self.rank)).backward()
        self.runtime.wait()
        self.runtime.reducer.reset()

    def micro_step(self, number: int, *due: tuple[str, int, str], kept: str | None = None) -> None:
        """A forward and its backward, with what is due in them in this order; `kept` between the two."""
        for sent in self.sent:
            sent.clear()
        self.due = list(due)
        loss = self.model(batch(number, self.rank))
        if kept:
            self.note(kept, LAST)
        self.reference.take(number)
        loss.backward()
        assert not self.due, f"these did not come: {self.due}"

    # ---- what a moment looks like

    def note(self, moment: str, number: int = MIDDLE) -> None:
        assert moment not in self.seen, moment
        unit = self.runtime.units[1 + number]
        part = unit.parts[0]
        assert (part.flat.untyped_storage().nbytes() == 0) == (unit.state is ShardedState.SHARDED), moment
        state = "dropped" if unit.dropped() else unit.gradient.name
        lane = ", ".join(sorted(set(self.sent[number]))) or "-"
        self.sent[number].clear()
        self.seen[moment] = Seen(self.weight(moment, number), unit.state.name, state, self.grad(moment, number), lane)

    def weight(self, moment: str, number: int) -> str:
        """What the modules of a block find, which must have the reference's values."""
        kinds = set()
        precision = self.runtime.precision
        registered = dict(self.model.named_parameters())
        reference = dict(self.reference.model.named_parameters())
        for name in self.names(number):
            module, _, kind = name.rpartition(".")
            found = getattr(self.model.get_submodule(module), kind)
            expected = reference[name]
            if found is self.parameters[name]:
                kinds.add("slice")
                assert registered[name] is found
                expected = self.piece(number, name, expected)
            elif found is registered[name]:
                kinds.add("parameter")
                assert found.dtype == precision.master
            else:
                kinds.add("whole")
                assert registered[name] is self.parameters[name]
                assert found.dtype == precision.compute
            self.compare(moment, found, expected)
        (kind,) = kinds
        return kind

    def grad(self, moment: str, number: int) -> str:
        """What `p.grad` holds, which must have the reference's values."""
        unit = self.runtime.units[1 + number]
        grads = {name: dict(self.model.named_parameters())[name].grad for name in self.names(number)}
        if all(grad is None for grad in grads.values()):
            return "none"
        if unit.gradient is Gradient.PARTIAL:
            kind = "partial"
        elif not self.runtime.reducer.agreed:
            kind = "arriving"
        else:
            kind = "clipped" if self.clips_in_memory and self.reference.factor < 1 else "mean"
        unit.reducing.wait()
        degree = self.runtime.sharding.grads
        first = self.rank // degree * degree
        for name, grad in grads.items():
            expected = self.reference.mean(name)
            if kind == "partial" and degree < self.world:
                expected = self.reference.total(name, range(first, first + degree))
            elif kind == "clipped":
                expected = expected * self.reference.factor
            assert grad is not None
            self.compare(moment, grad, self.piece(number, name, expected))
        return kind

    def names(self, number: int) -> list[str]:
        return [name for name in self.parameters if name.startswith(f"blocks.{number}.")]

    def piece(self, number: int, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor, at the optimizer's degree."""
        layout = self.runtime.units[1 + number].trained.layout
        begin, end = self.runtime.ladder.range(layout.size, self.runtime.sharding.optimizer)
        slot = next(slot for slot in layout.slots if slot.name == name)
        return whole.reshape(-1)[max(0, begin - slot.begin) : max(0, end - slot.begin)]

    def compare(self, moment: str, found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(
            found.detach().float(),
            expected.detach(),
            rtol=self.tolerance,
            atol=self.tolerance,
            msg=lambda text: f"{moment}: {text}",
        )


def walk(sharding: mics.Sharding, precision: mics.Precision) -> dict[str, Seen]:
    """Every moment, as it was found on this rank."""
    seen: dict[str, Seen] = {}
    for part in (marked, with_torch_optim, unmarked, written, without_gradients, recomputed, raising):
        part(seen, sharding, precision)
    return seen


def marked(seen: dict[str, Seen], sharding: mics.Sharding, precision: mics.Precision) -> None:
    """A step of two micro-batches by the book, and the beginning of the next."""
    walk = Walk(seen, sharding, precision)
    assert not walk.runtime.counters.links
    walk.note("after `shard`")
    walk.warm_up()
    model, reference = walk.model, walk.reference
    optimizer = mics.AdamW(model.parameters(), **ADAMW)
    theirs = torch.optim.AdamW(reference.model.parameters(), **ADAMW)
    for number in mics.accumulate(model, [0, 1]):
        if number == 0:
            walk.micro_step(
                number,
                ("in forward", MIDDLE, "in its forward"),
                ("after forward", MIDDLE, "after its forward"),
                ("in backward", MIDDLE, "in its backward"),
                ("has gradients", MIDDLE, "its gradients are there, more follow"),
                ("in backward", FIRST, "after its backward, more follow"),
                kept="after its forward, if its backward comes next",
            )
            walk.note("after the backward, more follow, if its forward comes next", FIRST)
            walk.note("after the backward, more follow")
        else:
            walk.micro_step(
                number,
                ("has gradients", MIDDLE, "its gradients are there, the last"),
                ("in backward", FIRST, "after its backward, the last"),
            )
    walk.note("after the backward, the last")
    norm = mics.clip_grad_norm_(model, MAX_NORM)
    assert abs(norm.item() - reference.clip()) < walk.tolerance
    assert reference.factor < 1
    walk.note("after a clip, with `accumulate`")
    optimizer.step()
    reference.step(theirs)
    walk.note("after a step of `mics.AdamW`")
    optimizer.zero_grad()
    reference.drop()
    walk.note("after `zero_grad`, stepped")
    walk.micro_step(
        2,
        ("in forward", MIDDLE, "in the next forward"),
        ("has gradients", MIDDLE, "its gradients are there, the next step"),
    )


def with_torch_optim(seen: dict[str, Seen], sharding: mics.Sharding, precision: mics.Precision) -> None:
    walk = Walk(seen, sharding, precision)
    walk.clips_in_memory = True
    optimizer = torch.optim.AdamW(walk.model.parameters(), **ADAMW)
    theirs = torch.optim.AdamW(walk.reference.model.parameters(), **ADAMW)
    for number in mics.accumulate(walk.model, [0]):
        walk.micro_step(number)
    walk.sent[MIDDLE].clear()
    mics.clip_grad_norm_(walk.model, MAX_NORM)
    walk.reference.clip()
    walk.note("after a clip for `torch.optim`")
    optimizer.step()
    walk.reference.step(theirs)
    walk.note("after a step of `torch.optim`")


def unmarked(seen: dict[str, Seen], sharding: mics.Sharding, precision: mics.Precision) -> None:
    """A plain loop, a look at the whole parameters in the midst of it, and gradients that are dropped."""
    walk = Walk(seen, sharding, precision)
    walk.warm_up()
    model, reference = walk.model, walk.reference
    mics.AdamW(model.parameters(), **ADAMW)
    walk.micro_step(
        0,
        ("has gradients", MIDDLE, "its gradients are there, unmarked"),
        ("in backward", FIRST, "after its backward, unmarked"),
    )
    walk.note("after the backward, unmarked")
    with mics.full_params(model):
        walk.note("in `full_params`")
        for ours in (model, reference.model):
            with torch.no_grad():
                ours.blocks[MIDDLE].up.weight.mul_(2)  # type: ignore[union-attr,operator]
    walk.note("after `full_params`")
    mics.clip_grad_norm_(model, MAX_NORM)
    walk.note("after a clip, unmarked")
    model.zero_grad()
    reference.drop()
    walk.note("after `zero_grad`, not stepped")
    walk.micro_step(1, ("has gradients", MIDDLE, "its gradients are there, not stepped but dropped"))


def written(seen: dict[str, Seen], sharding: mics.Sharding, precision: mics.Precision) -> None:
    """Parameters halved by the user, as loading other weights would change them."""
    walk = Walk(seen, sharding, precision)
    walk.warm_up()
    for model in (walk.model, walk.reference.model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
    walk.micro_step(0, ("in forward", MIDDLE, "in the forward after a write to slices"))


def without_gradients(seen: dict[str, Seen], sharding: mics.Sharding, precision: mics.Precision) -> None:
    walk = Walk(seen, sharding, precision)
    walk.due = [
        ("in forward", MIDDLE, "in a forward without gradients"),
        ("after forward", MIDDLE, "after a forward without gradients"),
    ]
    with torch.no_grad():
        walk.model(batch(0, walk.rank))
    assert not walk.due


def recomputed(seen: dict[str, Seen], sharding: mics.Sharding, precision: mics.Precision) -> None:
    walk = Walk(seen, sharding, precision, recomputes=True)
    walk.micro_step(0, ("after forward", MIDDLE, ""), ("in forward", MIDDLE, "in a checkpoint's recomputation"))


def raising(seen: dict[str, Seen], sharding: mics.Sharding, precision: mics.Precision) -> None:
    walk = Walk(seen, sharding, precision)
    for moment, kind in (("in forward", "forward"), ("in backward", "backward")):
        try:
            walk.micro_step(0, (moment, MIDDLE, "raise"))
        except Failure:
            walk.note(f"after a {kind} that raised")
    walk.model.zero_grad()
    walk.reference.drop()
    walk.micro_step(0, ("in forward", MIDDLE, "in the forward after that"))
