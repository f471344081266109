"""Whether training gives the same bits however late streams are: a pretended rank of 8 on one GPU.

    python -m bench.gpu.order NOTES [--pretend]

Sleeping kernels go before collectives, into lanes and between modules, and memory that is given back is filled with
NaN at once. What peers would send is made of what this rank has.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor, nn

import mics_core as mics
from bench.gpu.probes import Net
from bench.gpu.stand import Stand, arguments, ask, pretended_ranks, stand
from mics_core.comm.groups import DeviceGroup, HostGroup
from mics_core.comm.ladder import Ladder
from mics_kernels import tables

SHARDINGS = (
    mics.Sharding(2, 2, 8),
    mics.Sharding(8, 8, 8),
    mics.Sharding(4, 4, 4),
    mics.Sharding(1, 2, 8),
    mics.Sharding(1, 1, 1),
)
SIZE, RANK, WIDTH = 8, 3, 512

MOST_STEPS = 20
"""Until memory must stand still."""


@dataclass
class Disturbance:
    """Who is late: chosen anew for each seed."""

    here: Stand
    seed: int

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)

    def rest(self) -> None:
        """Perhaps a while, on the current stream."""
        if self.seed and self._chance.random() < 0.3:
            self.here.sleep(self._chance.choice((1e-4, 1e-3, 5e-3)))

    def spoil(self) -> None:
        """Take memory of the current stream, fill it, and give it back."""
        if self.seed:
            for _ in range(3):
                size = self._chance.choice((1 << 10, 1 << 16, 1 << 20, WIDTH * WIDTH))
                torch.empty(size, device=self.here.device).fill_(torch.nan)

    @contextmanager
    def everywhere(self, model: nn.Module) -> Iterator[None]:
        """Inside, collectives, lanes and modules are disturbed."""

        def gather(_: object, out: Tensor, piece: Tensor) -> None:
            self.rest()
            mine = piece.clone()  # which may lie in `out`
            out.view(-1, mine.numel()).copy_(mine.expand(out.numel() // mine.numel(), -1))
            self.rest()

        def exchange(group: DeviceGroup, source: Tensor) -> list[Tensor]:
            self.rest()
            parts = source.view(len(group.membership.ranks), -1)
            mine = parts[group.membership.index]
            mine.copy_(parts.sum(0))
            self.rest()
            return [mine]

        submit = Ladder.submit

        def late(
            ladder: Ladder,
            route: object,
            scope: object,
            what: str,
            job: Callable[[], None],
            *rest: object,
            **more: object,
        ) -> object:
            def rested() -> None:
                self.rest()
                job()
                self.spoil()

            return submit(ladder, route, scope, what, rested, *rest, **more)  # type: ignore[arg-type]

        kind = HostGroup if self.here.pretends else DeviceGroup
        hooks = [
            hook
            for module in model.modules()
            for hook in (
                module.register_forward_pre_hook(lambda *_: self._between()),
                module.register_full_backward_pre_hook(lambda *_: self._between()),
            )
        ]
        with (
            patch.object(kind, "all_gather", gather),
            patch.object(kind, "exchange", exchange),
            patch.object(Ladder, "submit", late),
        ):
            yield
        for hook in hooks:
            hook.remove()

    def _between(self) -> None:
        self.rest()
        self.spoil()


def trained(here: Stand, sharding: mics.Sharding, seed: int, *, side: bool = False) -> tuple[list[Tensor], list[int]]:
    """Losses, norms and weights after some steps, and the bytes that the allocator had taken after each."""
    taken = []
    stream = here.stream() if side else None
    with pretended_ranks(SIZE, RANK):
        model = mics.shard(Net(WIDTH), sharding, ranks_per_node=2, precision=mics.Precision.bf16())
        optimizer = mics.AdamW(model.parameters(), lr=1e-2)
        chance = torch.Generator(here.device).manual_seed(1)
        said: list[Tensor] = []
        with Disturbance(here, seed).everywhere(model), here.on(stream):
            for _ in range(here.small(6, 3)):
                batches = torch.randn(2, 16, WIDTH, device=here.device, generator=chance)
                for batch in mics.accumulate(model, list(batches)):
                    loss = model(batch)
                    loss.backward()
                    said.append(loss.detach())
                said.append(mics.clip_grad_norm_(model, 1.0))
                optimizer.step()
                optimizer.zero_grad()
                taken.append(here.memory()[1])
            with mics.full_params(model):
                said += [parameter.detach().clone() for parameter in model.parameters()]
        here.join(stream)
        here.complete()
    return said, taken


def same_bits_however_late_streams_are(here: Stand) -> dict[str, object]:
    """By sharding: orders that gave other bits than the undisturbed one, and whether that one repeats itself."""
    found: dict[str, object] = {}
    seeds = range(1, here.small(6, 2) + 1)
    wrong = 0
    for sharding in SHARDINGS[: here.small(len(SHARDINGS), 2)]:
        expected, _ = trained(here, sharding, 0)
        again, taken = trained(here, sharding, 0)
        runs = {seed: trained(here, sharding, seed, side=seed % 3 == 0)[0] for seed in seeds}
        differing = [seed for seed, said in runs.items() if not _equal(said, expected)]
        finite = all(bool(each.isfinite().all()) for each in expected)
        name = f"{sharding.params},{sharding.grads},{sharding.optimizer}"
        found[name] = {
            "repeats": _equal(again, expected),
            "finite": finite,
            "orders": len(runs),
            "differ": differing,
            "taken": taken,
        }
        wrong += len(differing) + (not finite)
        here.write(f"same bits, {name}", found[name])
    if wrong:
        raise AssertionError(f"{wrong} orders gave other bits, or numbers that are none: {found}")
    return found


def no_sync_and_no_new_memory_in_steady_steps(here: Stand) -> dict[str, list[int]]:
    """By sharding: bytes taken by the allocator after steps in which a wait of the host is an error."""
    found = {}
    for sharding in SHARDINGS[: here.small(len(SHARDINGS), 2)]:
        with pretended_ranks(SIZE, RANK):
            model = mics.shard(Net(WIDTH), sharding, ranks_per_node=2, precision=mics.Precision.bf16())
            optimizer = mics.AdamW(model.parameters())
            batches = list(torch.zeros(3, 16, WIDTH, device=here.device))

            # Tables of new addresses take memory, which may move the next step's gradients, until addresses come again.
            counts: list[int] = []
            while counts[-3:] != [len(tables._SCRATCH)] * 3:
                if len(counts) == MOST_STEPS:
                    raise AssertionError(f"tables of addresses in each step, which do not stand still: {counts}")
                counts.append(len(tables._SCRATCH))
                _step(model, optimizer, batches)
            here.complete()
            rows = [here.memory()[1]]
            for _ in range(here.small(10, 1)):
                with here.without_syncs():
                    _step(model, optimizer, batches)
                rows.append(here.memory()[1])
            here.complete()
        found[str(sharding)] = rows
        if rows[-1] != rows[0]:
            raise AssertionError(f"memory grew in steady steps: {found}")
    return found


def _step(model: nn.Module, optimizer: mics.AdamW, batches: Sequence[Tensor]) -> None:
    for batch in mics.accumulate(model, batches):
        model(batch).backward()
    mics.clip_grad_norm_(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def main(words: Sequence[str] | None = None) -> int:
    """Ask all."""
    here = stand(arguments(__doc__).parse_args(words))
    return 0 if ask(here, (no_sync_and_no_new_memory_in_steady_steps, same_bits_however_late_streams_are)) else 1


if __name__ == "__main__":
    sys.exit(main())
