"""What the tests of weights from elsewhere ask ranks to do."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import mics_core as mics
import pretraining_work
from checkpoint_work import PRECISIONS, Cluster, Model, Setting, build, train, whole

FILES = ("one.safetensors", "folder", "folder/model.safetensors.index.json", "state.pt", "state.bin")
"""What `write` writes: all ways in which weights lie on a disk."""


class OnDemand(Mapping[str, Tensor]):
    """Makes each tensor when it is asked for it, and remembers who is still there."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state
        self.made: list[str] = []
        self.most = 0
        self._alive: list[StorageWeakRef] = []

    def __getitem__(self, name: str) -> Tensor:
        made = self.state[name].clone()
        self.made.append(name)
        self._alive.append(StorageWeakRef(made.untyped_storage()))
        self.most = max(self.most, sum(not ref.expired() for ref in self._alive))
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


class Telling(OnDemand):
    """The same, and it knows shapes."""

    def meta(self, name: str) -> Tensor:
        return self.state[name].to("meta")


def state() -> dict[str, Tensor]:
    """The weights and buffers that everything here begins with, as others give them: in an order of their own."""
    torch.manual_seed(5)
    with torch.device("cpu"):  # other devices draw other numbers
        model = Model()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_()
    return dict(reversed(model.state_dict().items()))


def write(folder: Path) -> None:
    """All of `FILES`, by the tools of others."""
    apart = {name: tensor.clone() for name, tensor in state().items()}  # save_file refuses tied tensors
    save_file(apart, folder / "one.safetensors")
    torch.save(state(), folder / "state.pt")
    torch.save(state(), folder / "state.bin")
    del apart["last.weight"]  # so that a tied one is once absent
    (folder / "folder").mkdir()
    places = {}
    for number in range(3):
        part = dict(list(apart.items())[number::3])
        save_file(part, folder / "folder" / f"part-{number}.safetensors")
        places |= dict.fromkeys(part, f"part-{number}.safetensors")
    (folder / "folder" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def begin(cluster: Cluster, precision: str, folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """For every source: what is not the state's after loading, and what after training that began so.

    Compared with a model that had the weights before it was sharded.
    """
    torch.manual_seed(0)
    plain = Model()
    plain.load_state_dict(state())
    mics.shard(plain, cluster.sharding, ranks_per_node=cluster.per_node, precision=PRECISIONS[precision])
    expected, buffer = whole(plain), plain.seen.clone()
    losses, trained = train_on(plain)
    kinds: dict[str, Any] = {kind: folder / kind for kind in FILES}
    kinds |= {"dict": state(), "on demand": OnDemand(state()), "telling": Telling(state())}
    found = {}
    model, _ = build(cluster, Setting(precision=precision), seed=1)
    for kind, source in kinds.items():
        mics.load_weights(str(source) if kind == "state.pt" else source, model)
        mics.check_replicas(model)
        loaded = differing(whole(model), expected)
        loaded += [] if torch.equal(model.seen, buffer) else ["seen"]
        later, changed = train_on(model)  # so that the next source has all to do again
        found[kind] = (loaded, differing(changed, trained) + ([] if later == losses else ["losses"]))
    return found


def train_on(model: nn.Module) -> tuple[list[float], dict[str, Tensor]]:
    """The loss of a step, and the weights after it."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return train(model, mics.AdamW(parameters, lr=0.02), 0, 1), whole(model)


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name in found if not torch.equal(found[name], expected[name])]


def stack() -> nn.Sequential:
    """16 MiB in 16 matrices, with small biases; without memory."""
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(512, 512) for _ in range(16)))


def ask(tells: bool) -> tuple[list[str], list[str], list[str], int]:
    """What a rank holds a part of, what it asks for to see shapes and to read, and how many were there at a time."""
    given = {name: torch.ones(parameter.shape) for name, parameter in stack().named_parameters()}
    source = (Telling if tells else OnDemand)(given)
    model = mics.shard(stack(), mics.Sharding.zero3())
    mics.load_weights(source, model)
    held = [name for name, parameter in model.named_parameters() if parameter.numel()]
    assert all(bool((parameter == 1).all()) for parameter in model.parameters())
    half = 0 if tells else len(source.made) // 2
    return sorted(held), sorted(source.made[:half]), sorted(source.made[half:]), source.most


def write_stack(path: Path) -> None:
    save_file({name: torch.ones(parameter.shape) for name, parameter in stack().named_parameters()}, path)


def mapped(path: Path) -> int:
    """How many bytes of a file have come into this rank's memory when it has loaded its quarter."""
    model = mics.shard(stack(), mics.Sharding.zero3())
    given = mics.open_weights(path)
    mics.load_weights(given, model)
    assert all(bool((parameter == 1).all()) for parameter in model.parameters())
    return resident(path)


def resident(path: Path) -> int:
    lines = Path("/proc/self/smaps").read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if line.endswith(str(path)))
    return 1024 * next(int(line.split()[1]) for line in lines[at:] if line.startswith("Rss:"))


def refuse(folder: Path, kinds: list[str]) -> list[tuple[str, list[str]]]:
    """For each kind of mistake: what load_weights says, and what of the memory it has changed."""
    found = []
    for kind in kinds:
        model, optimizer = build(Cluster(2, 2, mics.Sharding(2, 2, 2)), Setting(), seed=1)
        train(model, optimizer, 0, 1)
        before = whole(model) | {"seen": model.seen.clone()}
        said = "nothing"
        try:
            mics.load_weights(mistaken(folder / kind, kind), model)
        except ValueError as error:
            said = str(error)
        after = whole(model) | {"seen": model.seen.clone()}
        found.append((said, differing(after, before)))
        dist.barrier()
    return found


def mistaken(path: Path, kind: str) -> Path | dict[str, Any]:
    """A source that is not the model's; on rank 1 alone, if its kind says so."""
    if kind.endswith("on rank 1") and dist.get_rank() == 0:
        return state()
    given: dict[str, Any] = state()
    match kind.removesuffix(" on rank 1"):
        case "missing":
            del given["scale"]
        case "tied, all missing":
            del given["first.weight"], given["last.weight"]
        case "unknown":
            given["more"] = torch.ones(1)
        case "shape":
            given["blocks.1.3.weight"] = torch.ones(6, 17)
        case "shape of what rank 1 holds":
            given["blocks.1.3.bias"] = torch.ones(7)
        case "transposed":
            given["blocks.1.3.weight"] = given["blocks.1.3.weight"].t()
        case "integers":
            given["idle"] = torch.ones(5, dtype=torch.int32)
        case "buffer":
            given["seen"] = torch.ones(2, 2, dtype=torch.bool)
        case "no tensor":
            given["idle"] = [1.0] * 5
        case "untied":
            given["last.weight"] = given["last.weight"] + 1
        case "file":
            return path
    return given


def pretrain_with(weights: Path, degrees: tuple[int, int, int], name: str) -> dict[str, Tensor]:
    """The weights of the pretraining program's model that begins with those of a file or folder."""
    training = pretraining_work.train(pretraining_work.settings(name, degrees))
    training.begin_with(str(weights))
    return whole(training.model)


def refuse_to_pretrain(weights: Path) -> None:
    pretrain_with(weights, (2, 2, 2), "gpt")


def keeps_the_optimizer() -> tuple[bool, list[bool], list[str]]:
    """Whether loading drops gradients, and keeps the moments and the settings."""
    model, optimizer = build(Cluster(2, 2, mics.Sharding(1, 2, 2)), Setting("AdamW"), seed=1)
    train(model, optimizer, 0, 2)
    model(torch.ones(2, 6)).sum().backward()
    before = {n: s["exp_avg"].clone() for n, s in optimizer.state_dict()["state"].items()}
    rate = optimizer.param_groups[0]["lr"]
    mics.load_weights(state(), model)
    kept = [torch.equal(s["exp_avg"], before[n]) for n, s in optimizer.state_dict()["state"].items()]
    kept.append(optimizer.param_groups[0]["lr"] == rate)
    grads = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    return bool(before), kept, grads


def load_inside() -> None:
    """In a forward."""
    model, _ = build(Cluster(2, 2, mics.Sharding(2, 2, 2)), Setting(), seed=1)
    model.blocks[1].register_forward_hook(lambda *_: mics.load_weights(state(), model))
    model(torch.ones(2, 6))
