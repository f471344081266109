"""Models whose parameters are tied, frozen or unused."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mics_core as mics
from model_case import ROWS, WIDTH, Block, Case, Chain, blocks, distance, make_optimizer


# ---- where parameters are
class RootOnly(Case):
    """parameters on the root only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight) * self.scale


class NoRootParameters(Case):
    """no parameters on the root."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = blocks()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Nested(Chain):
    """units inside units."""

    units = (Block, nn.Linear)


class OneInAnother(Chain):
    """a unit that is the only child of another."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.ModuleList([Block()])[0]) for _ in range(2)])

    units = (nn.Sequential, Block)


class Unseen(Chain):
    """parameters of no element and of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.empty(0))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale + self.empty.sum()


class Decaying(Chain):
    """matrices that decay and vectors that do not."""

    def optimizer(self, name: str) -> Any:
        matrices = [p for p in self.parameters() if len(mics.shape_of(p)) > 1]
        vectors = [p for p in self.parameters() if len(mics.shape_of(p)) < 2]
        return make_optimizer(name, [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])


class PenalisedBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        layers = (self.norm, self.rise, self.fall)
        self.penalty = sum(layer.weight.norm() + layer.bias.abs().sum() for layer in layers)
        return super().forward(x)


class Penalised(Chain):
    """a penalty on weights in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([PenalisedBlock() for _ in range(3)])

    def loss(self, batch: Tensor, step: int) -> Tensor:
        return super().loss(batch, step) + 0.1 * sum(block.penalty for block in self.blocks)


# ---- tied weights


class TiedInUnit(Chain):
    """weights tied within a unit."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.fall = nn.Linear(WIDTH, WIDTH)
            block.rise = nn.Linear(WIDTH, WIDTH)
            block.rise.weight = block.fall.weight


class TiedAcrossUnits(Chain):
    """weights tied across units."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].rise.weight = self.blocks[0].rise.weight
        self.blocks[2].norm = self.blocks[1].norm  # a whole module


class TiedToRoot(Case):
    """weights tied between the root and a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList([Block(), nn.Linear(WIDTH, 20, bias=False)])
        self.blocks[1].weight = self.embedding.weight

    batch = staticmethod(lambda generator: torch.randint(0, 20, (ROWS, 5), generator=generator))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return x

    def loss(self, batch: Tensor, step: int) -> Tensor:  # noqa: ARG002
        return F.cross_entropy(self(batch).flatten(0, 1), batch.roll(1, -1).flatten())


# ---- frozen parameters


class FrozenInUnit(Chain):
    """frozen parameters in a unit."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.rise.requires_grad_(False)
            block.norm.bias.requires_grad_(False)


class FrozenUnit(Chain):
    """a frozen unit between trained ones."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].requires_grad_(False)


class FrozenUnitsFirst(Chain):
    """frozen units that need no backward."""

    def __init__(self) -> None:
        super().__init__()
        for module in (self.first, *self.blocks[:2]):
            module.requires_grad_(False)


class FrozenRoot(Chain):
    """a frozen root."""

    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)
        self.last.requires_grad_(False)


class LowRank(Block):
    """A frozen matrix and its trained change of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.down = nn.Linear(WIDTH, 2, bias=False)
        self.up = nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


class LowRankOnly(Chain):
    """LoRA where all else is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.blocks = nn.ModuleList([LowRank(), Block().requires_grad_(False), LowRank()])


class FrozenInPlace(Chain):
    """a frozen unit that changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1] = nn.Sequential(nn.SiLU(inplace=True), nn.Linear(WIDTH, WIDTH)).requires_grad_(False)


class FrozenLater(Chain):
    """units frozen and thawed between steps."""

    def between(self, optimizer: Any, batch: Any, step: int) -> Sequence[Tensor]:  # noqa: ARG002
        self.blocks[1].requires_grad_(step != 1)
        self.blocks[0].rise.weight.requires_grad_(step != 1)
        return ()


# ---- parameters that take no part


class NeverUsed(Chain):
    """parameters that are never used."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(3))
        for block in self.blocks:
            block.spare = nn.Linear(WIDTH, WIDTH)
        self.blocks.append(Block())

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks[:3]:
            x = block(x)
        return self.last(x)


class Sometimes(Block):
    """A part of it is used at some steps only."""

    def __init__(self, steps: Sequence[int]) -> None:
        super().__init__()
        self.extra = nn.Linear(WIDTH, WIDTH)
        self.steps = steps

    def forward(self, x: Tensor, step: int) -> Tensor:
        x = super().forward(x)
        return x + self.extra(x) if step in self.steps else x


class UsedLater(Case):
    """parameters unused at first."""

    steps: ClassVar[Sequence[int]] = (1, 2)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Sometimes(self.steps) for _ in range(2)])
        self.root = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, step: int) -> Tensor:
        for block in self.blocks:
            x = block(x, step)
        return self.root(x) if step in self.steps else x

    def loss(self, batch: Tensor, step: int) -> Tensor:
        return distance(self(batch, step), batch)


class UsedAtFirst(UsedLater):
    """parameters unused later."""

    degrees = (2, 2, 4)  # with mics.AdamW, whose launches change
    steps = (0, 2)


class UsedByOneRank(UsedLater):
    """parameters used by some ranks only."""

    def forward(self, x: Tensor, step: int) -> Tensor:  # noqa: ARG002
        # By the data, not by the rank: the reference is one process for all ranks.
        for number, block in enumerate(self.blocks):
            x = block(x, 1 if x[0, number] > 0 else 0)
        return self.root(x)


class UnitsUsedLater(Chain):
    """units unused in some steps."""

    def loss(self, batch: Tensor, step: int) -> Tensor:
        x = self(batch, step)
        return distance(x, batch)

    def forward(self, x: Tensor, step: int) -> Tensor:  # type: ignore[override]
        x = self.first(x)
        for number in ((0, 2), (0, 1, 2), (1,))[step]:
            x = self.blocks[number](x)
        return self.last(x)


class OtherOrder(UnitsUsedLater):
    """units in another order at every micro-step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))  # each replica counts its own

    def forward(self, x: Tensor, step: int) -> Tensor:  # type: ignore[override] # noqa: ARG002
        self.calls += 1
        calls = int(self.calls)
        generator = torch.Generator().manual_seed(calls)  # the same on all ranks
        x = self.first(x)
        for number in torch.randperm(3, generator=generator, device="cpu").tolist()[: 1 + calls % 3]:
            x = self.blocks[number](x)
        return self.last(x)


class NoGradient(torch.autograd.Function):
    """A multiplication whose backward gives the weight none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


class Stubborn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return NoGradient.apply(x, self.weight)


class GradientsOfNone(Chain):
    """a unit whose backward gives its parameters no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1] = Stubborn()
