"""A program with its memory: what each operator reads and writes, as bytes of blocks, and when blocks come and go."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

from mics_core import registry
from mics_core.comm.groups import Membership
from mics_core.comm.recorded import COMPUTE, Entry, Kind, Program, RecordedStream
from steps import HOST, Act, Block, Place, Step

QUESTIONS = "questions"


@dataclass
class _Known:
    block: Block
    ref: StorageWeakRef


class Recording(Program):
    """Entries of the runtime, operators and memory, in the order of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.blocks: list[Block] = []
        self.streams = [COMPUTE, HOST]
        self.events: dict[int, int] = {}  # number of an event or question -> step
        self.running = False
        self._known: dict[int, _Known] = {}  # by storage
        self._resized: dict[int, torch.UntypedStorage] = {}  # whose memory comes and goes
        self._seen_by_host: list[int] = []  # steps that the host has waited for
        self._told: dict[str, int] = {}  # stream -> how many of these its queue knows of

    @contextmanager
    def on(self, *models: torch.nn.Module) -> Iterator[None]:
        """Inside, everything is written down."""
        for model in models:
            for unit in registry.runtime_of(model, "recording").units:
                for part in unit.parts:
                    storage = part.flat.untyped_storage()
                    if not part.stays_whole:
                        self._resized[storage._cdata] = storage
        with _Reads(self), _Operators(self):
            self.running = True
            try:
                yield
            finally:
                self.look()
                self.running = False

    # ---- entries

    def note(self, entry: Entry) -> None:
        super().note(entry)
        if not self.running:
            return
        self.look()
        if entry.kind is Kind.RECORD:
            self.events[entry.count] = self.add_step(Act.RECORD, entry.stream, where(entry.what)).number
        elif entry.kind is Kind.WAIT and entry.count in self.events:
            self.add_step(Act.WAIT, entry.stream, where(), until=self.events[entry.count])
        elif entry.kind is Kind.ANSWER and entry.count in self.events:
            self._host_waits(self.events[entry.count])

    @property
    def _here(self) -> str:
        return super().current_stream().name

    def current_stream(self, device: torch.device | None = None) -> RecordedStream:
        if self.running:
            self.look()
        return super().current_stream(device)

    def add_step(self, act: Act, stream: str, what: str, **more: Any) -> Step:
        if stream not in self.streams:
            self.streams.append(stream)
        # What the host asks for after it has waited comes after what it has waited for.
        for until in self._seen_by_host[self._told.get(stream, 0) :]:
            self.steps.append(Step(len(self.steps), Act.WAIT, stream, "the host had waited", until=until))
        self._told[stream] = len(self._seen_by_host)
        job = super().current_stream().job if stream == self._here else ""
        self.steps.append(Step(len(self.steps), act, stream, what, job, **more))
        return self.steps[-1]

    def asked(self, numbers: Tensor, what: str) -> None:
        """A thread of the host's fills the numbers while the host goes on."""
        if self.running:
            place = self.place(numbers)
            place.block.of_host = True
            number = self.entries[-1].count  # of the question
            self.events[number] = self.add_step(Act.OPERATOR, QUESTIONS, what, writes=[place]).number

    def sent(self, membership: Membership, what: str, count: int) -> None:
        group = f"{membership.name} {membership.ranks}"
        if self.running:
            self.add_step(Act.SEND, self._here, where(group), group=(group, what, count))

    def _host_waits(self, step: int) -> None:
        self.add_step(Act.WAIT, HOST, where(), until=step)
        self._seen_by_host.append(step)
        self._told[HOST] = len(self._seen_by_host)

    # ---- memory

    def look(self) -> None:
        """Memory that died since the last look goes back to the stream that took it."""
        dead = [key for key, known in self._known.items() if known.ref.expired()]  # type: ignore[no-untyped-call]
        for key in dead:
            self._free(self._known.pop(key).block, "its last tensor went")
        for key, storage in self._resized.items():
            known, size = self._known.get(key), storage.nbytes()
            if known is not None and size != known.block.size:
                self._free(self._known.pop(key).block, "resize_(0)")
                known = None
            if known is None and size:
                self._take(storage, self._here, "resize_")

    def _free(self, block: Block, why: str) -> None:
        block.freed = True
        if block.stream is not None:
            self.add_step(Act.FREE, block.stream, where(why), block=block)

    def _take(self, storage: torch.UntypedStorage, stream: str | None, why: str) -> Block:
        block = Block(len(self.blocks), storage.nbytes(), stream)
        self.blocks.append(block)
        self._known[storage._cdata] = _Known(block, StorageWeakRef(storage))  # type: ignore[no-untyped-call]
        if stream is not None:
            self.add_step(Act.TAKE, stream, where(why), block=block)
        return block

    def _block(self, storage: torch.UntypedStorage) -> Block:
        if storage._cdata in self._known:
            return self._known[storage._cdata].block
        block = self._take(storage, None, "")
        with _disable_current_modes():
            block.initial = torch.empty(0, dtype=torch.uint8).set_(storage).clone()
        return block

    def place(self, tensor: Tensor) -> Place:
        block = self._block(tensor.untyped_storage())
        return Place(block, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))

    # ---- operators and reads

    def operator(self, function: Any, args: Any, kwargs: Any) -> Any:
        if function.namespace == "profiler":
            return function(*args, **kwargs)
        self.look()
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        inputs = {t.untyped_storage()._cdata for t in tensors}
        # Before the operator runs: memory that was there before the recording is copied as it is now.
        places = {id(t): self.place(t) for t in tensors if t.untyped_storage().nbytes() or not t.numel()}
        written = {id(t) for t in _written(function, args, kwargs)}
        result = function(*args, **kwargs)
        results = tree_flatten(result)[0]
        fresh = [isinstance(t, Tensor) and t.untyped_storage()._cdata not in inputs for t in results]
        name = function._schema.name.removeprefix("aten::")
        if not written and not any(fresh) and any(isinstance(t, Tensor) for t in results):
            return result  # a view
        outs: list[Place | None] = []
        for t, new in zip(results, fresh, strict=True):
            if new and t.untyped_storage()._cdata not in self._known:
                self._take(t.untyped_storage(), self._here, name)
            outs.append(self.place(t) if new else None)
        if name.startswith(("empty", "new_empty")) and not written:
            return result  # memory alone
        if name == "copy_" and (kwargs.get("non_blocking") or args[2:] == (True,)):
            places[id(args[0])].block.of_host |= where_from("loss_scaling.py", "host_memory.py")
        step = self.add_step(
            Act.OPERATOR,
            self._here,
            where(name),
            reads=[places[id(t)] for t in tensors if id(t) not in written and id(t) in places],
            writes=[places[id(t)] for t in tensors if id(t) in written] + [out for out in outs if out is not None],
            function=function,
            leaves=[places.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves],
            spec=spec,
            outs=outs,
        )
        # Kernels' references and torch's optimizers look at numbers that a GPU reads itself, or that are the host's.
        if name == "_local_scalar_dense" and not where_from("mics_kernels", "optim", parts=True):
            self._host_waits(step.number)
        return result

    def read(self, tensor: Tensor) -> None:
        """The host looks at numbers: on a device it waits for the current stream, of its own memory for nothing."""
        self.look()
        place = self.place(tensor)
        stream = HOST if place.block.of_host else self._here
        step = self.add_step(Act.READ, stream, where("tolist"), reads=[place])
        if stream is not HOST:
            self._host_waits(step.number)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recording = recording

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code runs, and its operators are seen; else torch would run the code that was compiled."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._recording.operator(func, args, kwargs or {})


class _Reads(TorchFunctionMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            self._recording.read(args[0])
        return func(*args, **(kwargs or {}))


def _written(function: Any, args: Any, kwargs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for place, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += [t for t in tree_flatten(value)[0] if isinstance(t, Tensor)]
    return found


def where(what: str = "") -> str:
    """What is done, and the two nearest lines of the runtime or of a scenario."""
    frame, found = sys._getframe(1), list[str]()
    while frame is not None and len(found) < 2:
        path = frame.f_code.co_filename
        if ("mics_core" in path and not path.endswith("recorded.py")) or path.endswith("scenarios.py"):
            found.append(f"{Path(path).name}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return f"{what} at {' < '.join(found)}"


def where_from(*names: str, parts: bool = False) -> bool:
    """Whether one of these files, or of the files in these folders, asks."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if any(name in path.parts[:-1] if parts else name == path.name for name in names):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
