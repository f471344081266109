"""What the runtime costs the host: a forward and backward through many tiny units, against plain PyTorch and FSDP2.

    python -m bench.host

One rank, so that nothing travels: what is left is hooks, bookkeeping and launches. Variants are interleaved and
compared by their medians; the cost of a unit is the difference to plain PyTorch, divided by the units.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed import destroy_process_group, init_process_group, is_initialized
from torch.distributed.fsdp import fully_shard

import mics_core as mics
from bench import record
from bench.harness import HostTimer, Samples, Variant, measure

UNITS, WIDTH, ROWS = 48, 16, 4


class Block(nn.Module):
    """As many parameters as a small transformer block has in its MLP half, and next to no arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return out


class Model(nn.Module):
    """A row of blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(UNITS))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x).square().mean()
        return out


def plain() -> nn.Module:
    return Model()


def ours() -> nn.Module:
    return mics.shard(Model(), mics.Sharding.mics(1))


def fsdp2() -> nn.Module:
    model = Model()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


VARIANTS: dict[str, Callable[[], nn.Module]] = {"plain PyTorch": plain, "mics": ours, "FSDP2": fsdp2}


def run(seconds: float) -> Samples:
    """Time all variants; they must give the same loss."""
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    models = {name: make() for name, make in VARIANTS.items()}
    losses = {name: model(x).item() for name, model in models.items()}
    if max(losses.values()) - min(losses.values()) > 1e-6:
        raise AssertionError(f"host: the variants disagree on the loss: {losses}")

    def variant(model: nn.Module) -> Variant:
        return Variant(lambda: model(x).backward(), restore=model.zero_grad)

    return measure({name: variant(model) for name, model in models.items()}, HostTimer(), seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="to spend on measuring")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "cpu" / "host.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    started = not is_initialized()
    if started:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ.get("MASTER_PORT", "29599")}
        init_process_group("gloo", rank=0, world_size=1)
    try:
        samples = run(options.seconds)
    finally:
        if started:
            destroy_process_group()
    microseconds = {name: 1e6 * samples.spread(name).median for name in VARIANTS}
    cost = {name: (total - microseconds["plain PyTorch"]) / (UNITS + 1) for name, total in microseconds.items()}
    share = cost["mics"] / cost["FSDP2"]
    print("| | forward + backward, us | cost of a unit, us |\n|---|---|---|")
    for name in VARIANTS:
        print(f"| {name} | {microseconds[name]:.0f} | {cost[name]:.0f} |")
    rounds = samples.spread("mics").rounds
    print(f"\nmics costs {share:.2f} of what FSDP2 does, for {UNITS + 1} units; medians of {rounds} rounds")
    words = ["python", "-m", "bench.host", *(sys.argv[1:] if arguments is None else arguments)]
    content = record.stamp(words, "cpu") | {
        "units": UNITS + 1,
        "microseconds": {name: samples.spread(name) for name in VARIANTS},
        "cost_per_unit": cost,
        "mics_over_fsdp2": share,
    }
    print(f"saved {record.save(options.out, content)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
