"""What users ask for: into how many pieces each state is cut, and in which dtypes the work is done."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from numbers import Real

import torch

from mics_core.errors import ConfigError

WORLD = -1
"""A degree that stands for all ranks, however many there will be."""

EIGHT_BITS = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
"""The dtypes in which sums of gradients and differences of weights may travel."""


@dataclass(frozen=True)
class Sharding:
    """Into how many pieces parameters, gradients and optimizer state are cut; each divides the next.

    A state of degree d is held once by every d ranks. `WORLD` (-1) stands for all ranks.

    >>> Sharding(params=8, grads=8, optimizer=64).resolve(128)
    Sharding(params=8, grads=8, optimizer=64)
    >>> Sharding.zero2().resolve(16)
    Sharding(params=1, grads=16, optimizer=16)
    """

    params: int
    grads: int
    optimizer: int

    @classmethod
    def mics(cls, degree: int) -> Sharding:
        """MiCS: every `degree` ranks hold one copy of everything."""
        return cls(degree, degree, degree)

    @classmethod
    def ddp(cls) -> Sharding:
        """Every rank holds everything."""
        return cls(1, 1, 1)

    @classmethod
    def zero1(cls) -> Sharding:
        """The optimizer's state is cut over all ranks."""
        return cls(1, 1, WORLD)

    @classmethod
    def zero2(cls) -> Sharding:
        """Gradients and the optimizer's state are cut over all ranks."""
        return cls(1, WORLD, WORLD)

    @classmethod
    def zero3(cls) -> Sharding:
        """Everything is cut over all ranks."""
        return cls(WORLD, WORLD, WORLD)

    def resolve(self, world: int) -> Sharding:
        """The same with `WORLD` replaced, checked for a world of so many ranks."""
        if type(world) is not int or world < 1:
            raise ConfigError(f"Sharding: the number of ranks is {world!r}, expected a count from 1 up")
        given = {"params": self.params, "grads": self.grads, "optimizer": self.optimizer}
        for name, degree in given.items():
            if type(degree) is not int or (degree < 1 and degree != WORLD):
                raise ConfigError(f"Sharding: {name} is {degree!r}, expected a count of pieces, or -1 for all ranks")
        degrees = {name: world if degree == WORLD else degree for name, degree in given.items()}
        chain = [*degrees.items(), ("the number of ranks", world)]
        for (name, degree), (above, multiple) in pairwise(chain):
            if multiple % degree:
                raise ConfigError(
                    f"Sharding: {name} is {degree}, which does not divide {above}, {multiple}: choose degrees of which "
                    f"params divides grads, grads divides optimizer, and optimizer divides the {world} ranks"
                )
        return Sharding(**degrees)

    def __str__(self) -> str:
        return f"(params={self.params}, grads={self.grads}, optimizer={self.optimizer})"


@dataclass(frozen=True)
class LossScale:
    """How fp16 keeps small gradients: the loss is scaled up, as far as gradients stay finite.

    After a step with a gradient that is not finite nothing is updated and the scale is halved; after `patience` good
    steps in a row it is doubled.
    """

    initial: float = 65536.0
    patience: int = 2000
    largest: float = 2.0**24

    def __post_init__(self) -> None:
        for name in ("initial", "largest"):
            scale = getattr(self, name)
            if not (isinstance(scale, Real) and 1 <= float(scale) < torch.finfo(torch.float32).max):
                raise ConfigError(
                    f"LossScale: {name} is {scale!r}, expected a number from 1 up that is finite in float32: gradients "
                    "are scaled up"
                )
        if self.initial > self.largest:
            raise ConfigError(
                f"LossScale: initial is {self.initial}, expected no more than largest, {self.largest}: raise largest"
            )
        if not (isinstance(self.patience, Real) and float(self.patience) >= 1):
            raise ConfigError(f"LossScale: patience is {self.patience!r}, expected a count of steps from 1 up")


@dataclass(frozen=True)
class Precision:
    """The dtypes of the work.

    compute: the gathered parameters, and so the activations. Inputs of the model are converted to it.
    reduce: gradients on their way between ranks.
    master: the weights that the optimizer updates, the gradients that micro-steps add to, the optimizer's state.
    between_nodes: torch.int8, torch.float8_e4m3fn or torch.float8_e5m2 for what travels between nodes once a step: sums
        of gradients, and how far the weights that are shown have fallen behind their masters, with a float32 scale for
        256 elements. Weights as such never do; where compute is the master's dtype they stay exact.
    hop1_between_nodes: the same for gradients of each micro-step, where grads is more than a node.
    exact: patterns of parameters' names, such as "*.router.*", that travel as without the two; so do vectors.
    """

    compute: torch.dtype = torch.float32
    reduce: torch.dtype = torch.float32
    master: torch.dtype = torch.float32
    loss_scale: LossScale | None = None
    between_nodes: torch.dtype | None = None
    hop1_between_nodes: torch.dtype | None = None
    exact: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("compute", "reduce", "master"):
            dtype = getattr(self, name)
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
                raise ConfigError(f"Precision: {name} is {dtype!r}, expected float64, float32, bfloat16 or float16")
        if self.master.itemsize < max(4, self.compute.itemsize):
            raise ConfigError(
                f"Precision: master is {self.master}, expected float32 or float64 and no narrower than compute, "
                f"{self.compute}: small updates would be lost in it"
            )

        if not isinstance(self.loss_scale, LossScale | None):
            raise ConfigError(f"Precision: loss_scale is {self.loss_scale!r}, expected a mics.LossScale, or None")
        for name in ("between_nodes", "hop1_between_nodes"):
            dtype = getattr(self, name)
            if dtype not in (None, *EIGHT_BITS):
                raise ConfigError(
                    f"Precision: {name} is {dtype!r}, expected torch.int8, torch.float8_e4m3fn, torch.float8_e5m2 or "
                    "None"
                )
            if dtype is not None and torch.float64 in (self.compute, self.reduce, self.master):
                raise ConfigError(
                    f"Precision: {name} is {dtype} beside float64, expected compute, reduce and master of 32 or 16 "
                    "bits: leave it out, or use float32"
                )
        if not isinstance(self.exact, tuple) or not all(isinstance(pattern, str) for pattern in self.exact):
            raise ConfigError(
                f"Precision: exact is {self.exact!r}, expected a tuple of patterns, such as ('*.router.*',)"
            )

    @property
    def has_eight_bits(self) -> bool:
        """Whether anything may travel in eight bits."""
        return self.between_nodes is not None or self.hop1_between_nodes is not None

    def is_exact(self, name: str, dimensions: int) -> bool:
        """Whether a parameter never travels in eight bits: by default what has one dimension or none."""
        return dimensions < 2 or any(fnmatchcase(name, pattern) for pattern in self.exact)

    @classmethod
    def fp32(cls, *, between_nodes: torch.dtype | None = None) -> Precision:
        """float32 throughout."""
        return cls(between_nodes=between_nodes)

    @classmethod
    def bf16(cls, reduce: torch.dtype = torch.bfloat16, *, between_nodes: torch.dtype | None = None) -> Precision:
        """Compute in bfloat16; keep, add and update in float32."""
        return cls(torch.bfloat16, reduce, between_nodes=between_nodes)

    @classmethod
    def fp16(
        cls,
        reduce: torch.dtype = torch.float32,
        loss_scale: LossScale | None = None,
        *,
        between_nodes: torch.dtype | None = None,
    ) -> Precision:
        """Compute in float16 with a dynamic loss scale; keep, add and update in float32.

        Gradients travel in float32 unless you choose otherwise: the sum over many ranks leaves float16's range.
        """
        return cls(torch.float16, reduce, torch.float32, loss_scale or LossScale(), between_nodes)
