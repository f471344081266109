"""What the tests of checkpoints ask ranks to do: train a little, save, load under another sharding, train on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mics_core as mics
from mics_core import registry
from seeded import seeded

ROWS, WIDTH = 24, 6
PRECISIONS = {
    "fp32": mics.Precision.fp32(),
    "bf16": mics.Precision.bf16(),
    "fp16": mics.Precision.fp16(loss_scale=mics.LossScale(initial=1024.0, patience=2)),
    "bf16, int8 between nodes": mics.Precision.bf16(between_nodes=torch.int8),
}


@dataclass(frozen=True)
class Cluster:
    """Ranks, and how a model is cut over them."""

    world: int
    per_node: int
    sharding: mics.Sharding


@dataclass(frozen=True)
class Setting:
    """What is trained, alike before and after."""

    optimizer: str = "mics.AdamW"
    precision: str = "fp32"
    dropout: float = 0.0


class Model(nn.Module):
    """Matrices, a scalar, something frozen, a tied weight, an unused parameter and buffers."""

    def __init__(self, dropout: float = 0.0, width: int = WIDTH) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv1d(1, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(3 * width, width))
            for _ in range(2)
        )
        self.blocks[1][0].weight.requires_grad_(False)
        self.last = nn.Linear(width, WIDTH, bias=False)
        self.last.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.idle = nn.Parameter(torch.ones(5))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("seen", torch.zeros(2, 2))
        self.register_buffer("passing", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        x = self.dropout(self.first(x))
        for block in self.blocks:
            x = x + self.scale * block(x[:, None])
        return self.last(x)


def build(cluster: Cluster, setting: Setting, seed: int) -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Model(setting.dropout)
    mics.shard(model, cluster.sharding, ranks_per_node=cluster.per_node, precision=PRECISIONS[setting.precision])
    # Two groups: what is saved by name must find its way back to the right one.
    matrices = [p for name, p in model.named_parameters() if name.endswith("weight") and p.requires_grad]
    others = [p for name, p in model.named_parameters() if not name.endswith("weight")]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    if setting.optimizer == "SGD":
        return model, torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    kind = mics.AdamW if setting.optimizer == "mics.AdamW" else getattr(torch.optim, setting.optimizer)
    return model, kind(groups, lr=0.02, eps=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, count: int) -> list[float]:
    """The losses of this rank's rows."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    losses = []
    for step in range(first, first + count):
        optimizer.param_groups[0]["lr"] *= 0.9
        x = torch.randn(ROWS, WIDTH, generator=seeded(step))
        rows = x[rank::world]
        loss = (model(rows).float() - rows.roll(1, -1)).square().mean()
        loss.backward()
        mics.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole(model: nn.Module) -> dict[str, Tensor]:
    with mics.full_params(model):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that a checkpoint must bring back, whole: moments are gathered as if they were weights."""
    found = {f"weight {name}": value for name, value in whole(model).items()}
    found["buffer"] = model.seen.clone()  # type: ignore[operator,union-attr]
    scaling = registry.runtime_of(model, "test").scaling
    if scaling is not None:
        found["scale"] = scaling.scale.clone()
    packed = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = {id(p): name for name, p in model.named_parameters()}
    for key in sorted({key for state in packed["state"].values() for key in state}):
        kept = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for number, p in enumerate(parameters):
                value = packed["state"].get(number, {}).get(key, torch.tensor(-1.0))
                p.copy_(value.expand(p.shape) if value.dim() == 0 else value)
        gathered = whole(model)
        found |= {f"{key} {names[id(p)]}": gathered[names[id(p)]] for p in parameters}
        with torch.no_grad():
            for p, old in zip(parameters, kept, strict=True):
                p.copy_(old)
    for number, group in enumerate(optimizer.param_groups):
        found[f"lr {number}"] = torch.tensor(group["lr"])
    return found


Life = tuple[dict[str, Tensor], list[float], dict[str, Tensor]]


def save(cluster: Cluster, setting: Setting, folder: Path, background: bool = False) -> Life:
    """Two steps and a save; what was held then, and what became of it in three steps more."""
    model, optimizer = build(cluster, setting, seed=1)
    train(model, optimizer, 0, 2)
    saving = mics.save(folder / "step-2", model, optimizer, step=2, note={"kind": "test"}, background=background)
    random = torch.get_rng_state()
    state = held(model, optimizer)
    losses = train(model, optimizer, 2, 3)
    saving.wait()
    assert not torch.equal(random, torch.get_rng_state()) or not setting.dropout
    return state, losses, whole(model)


def load(cluster: Cluster, setting: Setting, path: Path, steps: int = 1) -> Life:
    """Load into a model that has been trained otherwise, and train on."""
    model, optimizer = build(cluster, setting, seed=7)
    if steps:
        train(model, optimizer, 50, steps)
    extra = mics.load(path, model, optimizer)
    assert extra == {"step": 2, "note": {"kind": "test"}}
    mics.check_replicas(model)
    state = held(model, optimizer)
    return state, train(model, optimizer, 2, 3), whole(model)


def go_on(cluster: Cluster, setting: Setting, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Steps with a save among them, which nothing follows that would look at weights."""
    model, optimizer = build(cluster, setting, seed=1)
    train(model, optimizer, 0, 3)
    mics.save(folder / "step-3", model, optimizer)
    losses = train(model, optimizer, 3, 3)
    return losses, whole(model)


@torch.no_grad()
def write_and_save(cluster: Cluster, setting: Setting, folder: Path) -> Tensor:
    """A save right after a user's write to the parameters; what a forward gives then."""
    model, optimizer = build(cluster, setting, seed=1)
    with torch.enable_grad():
        train(model, optimizer, 0, 2)
    for parameter in model.parameters():
        parameter.clamp_(-0.05, 0.05)
    mics.save(folder / "step-2", model, optimizer)
    return model.eval()(torch.ones(ROWS, WIDTH))


@torch.no_grad()
def load_and_look(cluster: Cluster, setting: Setting, folder: Path) -> Tensor:
    """What a forward gives after that is loaded."""
    model, optimizer = build(cluster, setting, seed=2)
    mics.load(folder, model, optimizer)
    return model.eval()(torch.ones(ROWS, WIDTH))


def come_back(cluster: Cluster, setting: Setting, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """The same from the save on."""
    model, optimizer = build(cluster, setting, seed=2)
    mics.load(folder, model, optimizer)
    losses = train(model, optimizer, 3, 3)
    return losses, whole(model)
