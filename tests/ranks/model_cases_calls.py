"""Models whose units are called in unusual ways."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model_case import WIDTH, Block, Case, Chain, blocks, distance
from model_cases_parameters import LowRank, TiedToRoot

# ---- how units are called


class Twice(Chain):
    """a unit called twice in a forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in (*self.blocks, self.blocks[0], self.blocks[1]):
            x = block(x)
        return self.last(x)


class SameTwice(Chain):
    """the same unit twice in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.blocks[0], self.blocks[1], self.blocks[0]])


class InItself(Block):
    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        x = super().forward(x)
        return self.fall(torch.tanh(self.rise(self(x, depth - 1)))) if depth else x


class Recursive(Chain):
    """a unit that calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1] = InItself()


@dataclass
class Pair:
    new: Tensor
    old: Tensor | None = None


class Keywords(Block):
    def forward(self, *, x: Tensor, shift: Tensor | None = None) -> dict[str, Any]:  # type: ignore[override]
        y = super().forward(x)
        return {"outputs": [Pair(y, x), (y * 2, None)], "shift": shift, "name": "a block"}


class Partly(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Pair]:  # type: ignore[override]
        y = super().forward(x)
        return self.rise(x), y, Pair(y, self.norm(x))


class Shapes(Case):
    """units called by keyword that return nested outputs, some unused."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Keywords(), Partly(), Keywords().requires_grad_(False), Partly()])

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.blocks[0](x=x, shift=x)["outputs"]
        x = outputs[0].new + outputs[1][0]
        _, _, pair = self.blocks[1](x)
        outputs = self.blocks[2](shift=x, x=pair.new)["outputs"]
        x, _ = outputs[1]
        return self.blocks[3](x)[2].old


class WholeNumbers(TiedToRoot):
    """units whose inputs need no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Embedding(20, WIDTH), Block(), nn.Linear(WIDTH, 20)])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks[0](tokens) + self.blocks[0](20 - 1 - tokens)
        return self.blocks[2](self.blocks[1](x))


class Branches(Chain):
    """units side by side."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.stack([block(x) for block in self.blocks]).prod(0))


class Stash(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.extra = self.rise(x).square().mean()
        return y


class Aside(Chain):
    """a unit that leaves a second loss in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Stash() for _ in range(3)])

    def loss(self, batch: Tensor, step: int) -> Tensor:
        return super().loss(batch, step) + sum(block.extra for block in self.blocks)


def in_a_thread(call: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Autograd's order goes by threads, and what a new one did comes last."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call, *inputs).result()


class Threaded(LowRank):
    def forward(self, x: Tensor) -> Tensor:
        return in_a_thread(Block.forward, self, x) + self.up(self.down(x))


class GradientsOfInputsLast(Chain):
    """units whose inputs get gradients after their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Threaded() for _ in range(3)])


class Join(Block):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return in_a_thread(super().forward, x) * y


class FrozenJoin(Chain):
    """a frozen unit whose second input gets its gradient before the first."""

    def __init__(self) -> None:
        super().__init__()
        self.join = nn.ModuleList([Join().requires_grad_(False)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.blocks[2](self.blocks[1](x))
        return self.last(self.join[0](self.blocks[0](x), y))


class Into(Block):
    def forward(self, x: Tensor, out: dict[str, Tensor]) -> None:  # type: ignore[override]
        out["x"] = super().forward(x)


class Parted(Case):
    """a model called by its parts, never as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Block(), nn.Sequential(Block(), Block())
        self.blocks = blocks(1)

    units = staticmethod(lambda name, _: name in ("encoder", "decoder", "decoder.1", "blocks.0"))

    def loss(self, batch: Tensor, step: int) -> Tensor:  # noqa: ARG002
        return distance(self.decoder(self.blocks[0](self.encoder(batch))), batch)


class PartedCheckpoint(Parted):
    """a model called by its parts under a reentrant checkpoint."""

    def loss(self, batch: Tensor, step: int) -> Tensor:  # noqa: ARG002
        x = checkpoint(self.decoder, self.encoder(batch), use_reentrant=True)
        return distance(checkpoint(self.blocks[0], x, use_reentrant=True), batch)


# ---- checkpoints


class CheckpointedBlock(Block):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fall(checkpoint(self._inside, self.norm(x), use_reentrant=self.reentrant))

    def _inside(self, x: Tensor) -> Tensor:
        return torch.tanh(self.rise(x))


class ReentrantBlock(CheckpointedBlock):
    reentrant = True


class CheckpointAround(Chain):
    """a checkpoint around each unit."""

    reentrant: ClassVar[bool] = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.last(x)


class ReentrantAround(CheckpointAround):
    """a reentrant checkpoint around each unit."""

    reentrant = True


class CheckpointInside(Chain):
    """a checkpoint inside each unit."""

    block: ClassVar[type[Block]] = CheckpointedBlock

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.block() for _ in range(3)])


class ReentrantInside(CheckpointInside):
    """a reentrant checkpoint inside each unit."""

    block = ReentrantBlock


class CheckpointSpan(Chain):
    """a checkpoint around several units."""

    reentrant: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.blocks.append(CheckpointedBlock())  # and one in it
        self.blocks[1].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self._span, self.first(x), 0, use_reentrant=self.reentrant)
        return self.last(checkpoint(self._span, x, 2, use_reentrant=self.reentrant))

    def _span(self, x: Tensor, first: int) -> Tensor:
        for block in self.blocks[first : first + 2]:
            x = block(x)
        return x


class ReentrantSpan(CheckpointSpan):
    """a reentrant checkpoint around several units."""

    reentrant = True


class CheckpointTwice(CheckpointInside):
    """two forwards and one backward with a checkpoint inside each unit."""

    def loss(self, batch: Tensor, step: int) -> Tensor:  # noqa: ARG002
        return distance(self(batch), self(batch.flip(0)))


# ---- compiled


class Compiling(Chain):
    ignored = "The .grad attribute of a Tensor that is not a leaf"  # dynamo hides it, but not from those who raise it
    graphs = 0

    def between(self, optimizer: Any, batch: Any, step: int) -> Sequence[Tensor]:  # noqa: ARG002
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert step < 2 or compiled == self.graphs, f"{compiled - self.graphs} graphs more after step {step}"
        self.graphs = compiled
        return ()


class Compiled(Compiling):
    """units compiled in place before they are cut."""

    def prepare(self) -> None:
        for block in self.blocks:
            block.compile(backend="aot_eager")


class CompiledAfter(Compiling):
    """units compiled in place after they were cut."""

    def finish(self) -> None:
        for block in self.blocks:
            block.compile(backend="aot_eager")


class CompiledWrapper(Compiling):
    """units wrapped by torch.compile."""

    def prepare(self) -> None:
        for number, block in enumerate(self.blocks):
            self.blocks[number] = torch.compile(block, backend="aot_eager")
