"""The memory of one unit's parameters on one rank: what rests here, and what comes and goes.

    flat       [N]      compute dtype   the whole unit; its memory exists only while it is gathered, unless P = 1
    shard      [N / P]  compute dtype   my piece of it, what gathers start from
    refreshed  [N / O]  compute dtype   the part of `shard` that my `master` is rounded into, or that follows it in
                                        differences of eight bits: then it is state, too, as is all of `shard`
    master     [N / O]  master dtype    what the optimizer updates; it is `refreshed` itself where the dtypes agree
    grad_sum   [N / G]  master dtype    gradients summed over the G ranks below and over the micro-steps so far
    grad_mean  [N / O]  master dtype    the part of `grad_sum` that the optimizer reads: after hop 2 the mean

Frozen parameters have a `flat` and a `shard` of their own, and nothing else: they are slices of that `shard`.

Three buffers are two tensors each over the same memory. Autograd counts the writes through a tensor, its version, and
so tells what a user wrote from what this runtime did. What users and autograd see is `flat`, `_master_seen` and
`_grad_sum_seen`; the runtime writes through `incoming`, `master` and `grad_sum`, which leaves those versions alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mics_core.comm.ladder import Ladder
from mics_core.comm.world import World
from mics_core.errors import ConfigError, LifecycleError
from mics_core.spec.eight_bits import Forms
from mics_core.spec.sharding import Precision, Sharding
from mics_core.spec.units import Member, lay_out
from mics_core.unit.slices import slice_of


class Shards:
    """The buffers of a unit's trained or frozen parameters, and the parameters as users see them."""

    def __init__(
        self,
        members: Sequence[Member],
        sharding: Sharding,
        precision: Precision,
        ladder: Ladder,
        world: World,
        *,
        trained: bool,
    ) -> None:
        self.sites = [member.sites for member in members]
        self.is_trained = trained
        self.layout = layout = lay_out(members, ladder.rungs.degrees[-1], precision if trained else None)
        self.forms = Forms.of(precision, layout.exact)
        self.sharding = sharding
        size, p, device = layout.size, sharding.params, world.device
        o = sharding.optimizer if trained else p
        # Zeros, because the padding between parameters takes part in comparisons, and in norms of gradients.
        self.flat = torch.zeros(size, dtype=precision.compute, device=device)
        self._storage = self.flat.untyped_storage()
        self._bytes = self._storage.nbytes()
        self._streams = world.streams
        self._taken_on: Any = None  # the stream
        self.incoming = self.flat.data
        self.views = [self.flat[slot.begin : slot.end].view(slot.shape) for slot in layout.slots]
        self.shard = self.incoming if p == 1 else self.incoming.new_zeros(size // p)
        begin, end = ladder.range(size, o, within=p)
        self.refreshed = self.shard[begin:end]
        self.sends_differences = (
            trained and self.forms.refresh is not None and ladder.crosses_nodes(sharding.params, sharding.optimizer)
        )
        shared = not trained or precision.master == precision.compute
        self.master = self.refreshed if shared else torch.zeros(end - begin, dtype=precision.master, device=device)
        self._shard_at, self._master_at = ladder.range(size, p)[0], ladder.range(size, o)[0]
        self.spans = layout.within(self._master_at, self._master_at + len(self.master))
        """What of each parameter lies in `master`."""
        self._master_seen = self.master.data
        self.accept_writes()
        self.parameters = [
            slice_of(member.parameter, member.name, self._master_seen[begin:end])
            for member, (begin, end) in zip(members, self.spans, strict=True)
        ]
        if trained:
            seen = torch.zeros(size // sharding.grads, dtype=precision.master, device=device)
            begin, end = ladder.range(size, o, within=sharding.grads)
            self.grads = [seen[begin:end][first:last] for first, last in self.spans]
            self._grad_sum_seen = seen
            self.grad_sum = seen.data
            self.grad_mean = self.grad_sum[begin:end]
        self._flat_version = self.flat._version
        self.free()

    @property
    def stays_whole(self) -> bool:
        """Whether the whole unit stays in memory."""
        return self.sharding.params == 1

    @property
    def nbytes(self) -> int:
        """Of the whole unit, gathered."""
        return self._bytes

    def allocate(self) -> None:
        """Give `flat` its memory, with nothing in it."""
        if not self.stays_whole:
            # Before the memory comes: here a recording sees what was freed.
            self._taken_on = self._streams and self._streams.current_stream(self.flat.device)
            self._storage.resize_(self._bytes)

    def free(self) -> None:
        """Take the memory of `flat` away; views of it, also those that autograd saved, stay valid for the next time."""
        if not self.stays_whole:
            # The memory goes back to the stream that took it, which must not give it away before this one is done.
            if self._taken_on is not None and self._taken_on != (
                here := self._streams.current_stream(self.flat.device)
            ):
                self._taken_on.wait_stream(here)
            self._storage.resize_(0)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in `flat`."""
        if tensor.layout is not torch.strided:
            return False  # it has no storage that could be shared
        return bool(tensor.untyped_storage()._cdata == self._storage._cdata)

    def check_unchanged(self, unit: str) -> None:
        """Raise if someone wrote into the gathered parameters."""
        version, self._flat_version = self._flat_version, self.flat._version
        if version != self.flat._version:
            raise LifecycleError(
                f"{unit}: a parameter was changed in place while it was gathered, and the change would be lost: change "
                "parameters inside `with mics.full_params(model)`"
            )

    def fill(self, values: Sequence[torch.Tensor]) -> None:
        """Set `master` and `shard` from whole parameters, in the order of the members."""
        for buffer, first in ((self.master, self._master_at), (self.shard, self._shard_at)):
            for slot, value, (begin, end) in zip(
                self.layout.slots, values, self.layout.within(first, first + buffer.numel()), strict=True
            ):
                skipped = max(0, first - slot.begin)
                buffer[begin:end].copy_(value.reshape(-1)[skipped : skipped + end - begin])

    def check_shapes(self, values: Sequence[torch.Tensor]) -> None:
        """Raise if these are no values for the members."""
        for slot, value in zip(self.layout.slots, values, strict=True):
            if tuple(value.shape) != slot.shape:
                raise ConfigError(
                    f"full_params: {slot.name} was replaced by a tensor of shape {tuple(value.shape)}, expected "
                    f"{slot.shape}: change values, not shapes"
                )

    def check_in_place(self) -> None:
        """Raise if a parameter does not lie in `master` any more: what the optimizer then changes would be lost."""
        start = self.master.data_ptr()
        for slot, parameter, (begin, end) in zip(self.layout.slots, self.parameters, self.spans, strict=True):
            lies = parameter.data_ptr() == start + begin * self.master.itemsize
            if end > begin and not (lies and parameter.dtype == self.master.dtype):
                raise LifecycleError(
                    f"the memory of {slot.name} was replaced after mics.shard, as .half() or an assignment to "
                    "p.data do, so its updates would be lost: convert the model before mics.shard, and change values "
                    "with p.copy_()"
                )

    @property
    def gradient_version(self) -> int:
        """A number that changes when someone else writes into `p.grad`."""
        return self._grad_sum_seen._version

    @property
    def written(self) -> bool:
        """Whether `master` was changed through the parameters since `accept_writes`."""
        return self._master_seen._version != self._version_seen

    def accept_writes(self) -> None:
        """What was written through the parameters so far is accounted for."""
        self._version_seen = self._master_seen._version

    @property
    def to_round_into(self) -> torch.Tensor | None:
        """Where an optimizer rounds new weights to; None where nothing is to be rounded, or differences are sent."""
        return None if self.master is self.refreshed or self.sends_differences else self.refreshed

    def round_master(self) -> None:
        """Round `master` into my part of `shard`, `refreshed`."""
        self.accept_writes()
        if self.master is not self.refreshed:
            self.refreshed.copy_(self.master)

    def end_step(self) -> None:
        """An optimizer that rounds nothing has changed `master`."""
        self.accept_writes()
        if self.to_round_into is not None:
            self.to_round_into.copy_(self.master)
