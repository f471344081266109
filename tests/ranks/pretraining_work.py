"""What test_pretraining.py asks ranks to do: train reference models for some steps, and tell the losses."""

import torch
import torch.distributed as dist

import mics_core as mics
from mics_models.data import Corpus, decode, encode
from mics_models.pretrain import Training
from mics_models.training.batches import Batches, configure
from mics_models.training.news import Exchange, Stop
from mics_models.training.settings import (
    BatchSettings,
    DataSettings,
    ModelSettings,
    ScheduleSettings,
    Settings,
    ShardingSettings,
)
from mics_models.training.together import Refused, agree, together

STEPS = 20
SMALL: dict[str, ModelSettings] = {
    "gpt": ModelSettings("byte-tiny", config={"layers": 2, "width": 32, "hidden": 64, "context": 32}),
    "bert": ModelSettings("bert-tiny", config={"layers": 2, "width": 32, "hidden": 64, "heads": 4, "context": 32}),
}


def corpus() -> Corpus:
    """Words that come again and again."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 128, (40, 6), generator=generator, dtype=torch.uint8)
    words[:, -1] = 0
    text = words[torch.randint(40, (4000,), generator=generator)].flatten()
    return Corpus(text[:20000], text[20000:], 1, 1, 256, 0, 255, encode, decode)


def settings(name: str, degrees: tuple[int, int, int], *, packed: bool = False) -> Settings:
    return Settings(
        model=SMALL[name],
        data=DataSettings(packed=packed),
        sharding=ShardingSettings(*degrees, ranks_per_node=min(2, degrees[2])),
        batch=BatchSettings(samples=8, seq=32, micro_steps=2),
        schedule=ScheduleSettings(steps=STEPS),
    )


def train(told: Settings) -> Training:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = where_it_computes()
    return Training(told, Batches(told, configure(told.model), corpus(), rank, world), device)


def where_it_computes() -> torch.device:
    """This rank's device; from now on it is named, as in the program, whose data are the host's."""
    device = torch.get_default_device()
    torch.set_default_device(None)
    return device


def losses(told: Settings) -> list[float]:
    """The mean loss of each step over all ranks and micro-steps."""
    training = train(told)
    found = []
    for step in range(STEPS):
        mine, _ = training.step(step)
        mean = mine.mean()
        dist.all_reduce(mean)
        found.append(mean.item() / training.world)
    mics.check_replicas(training.model)
    return found


def start(told: Settings) -> dict[str, torch.Tensor]:
    """The weights that training begins with."""
    training = train(told)
    with mics.full_params(training.model):
        return {name: value.clone() for name, value in training.model.state_dict().items()}


def tell_news() -> tuple[object, ...]:
    """A bad loss on rank 1 in micro-step 2, a bad norm there alone, and a wish to leave on rank 0."""
    rank = dist.get_rank()
    device = where_it_computes()
    exchange = Exchange(device)
    losses = torch.tensor([1.0, 2.0, float("nan") if rank == 1 else 3.0], device=device)
    norm = torch.tensor(float("inf") if rank == 1 else 1.0, device=device)
    exchange.send(losses, norm, Stop.SIGNAL if rank == 0 else Stop.TIME)
    news = exchange.read()
    assert news is not None
    return news.bad, news.norm, news.stop


def refuse(how: str) -> str:
    """What each rank hears of a mistake that rank 1 alone makes."""

    def work() -> None:
        if dist.get_rank() == 1:
            raise FileNotFoundError("no such folder")

    try:
        together(work) if how == "work" else agree({"seed": dist.get_rank()})
    except Refused as error:
        return str(error)
    return "nothing"
