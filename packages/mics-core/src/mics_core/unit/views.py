"""Where a unit's parameters are found by the code of its modules, and how whole views stand there for a while.

`module.weight` looks into the module's own attributes before its parameters. So a whole view is set as an attribute for
the time of a forward or backward, and the Parameter itself, this rank's slice, stays registered all the while: whoever
lists parameters, at any time, sees the same objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mics_core.unit.shards import Shards


class ParamViews:
    """The attributes under which a unit's parameters are used: of its trained ones first, then of its frozen ones."""

    def __init__(self, parts: Sequence[Shards]) -> None:
        self._sites = [sites for part in parts for sites in part.sites]
        self._parameters = [parameter for part in parts for parameter in part.parameters]
        self._attributes: list[tuple[dict[str, Any], str, int]] = [
            (site.module.__dict__, site.name, index) for index, sites in enumerate(self._sites) for site in sites
        ]
        self._shown: list[Sequence[torch.Tensor]] = []  # a unit may be entered again before it was left

    @property
    def shown(self) -> Sequence[torch.Tensor]:
        """What the modules see now, if not their Parameters."""
        return self._shown[-1] if self._shown else ()

    def show(self, views: Sequence[torch.Tensor]) -> None:
        """Let the modules see these."""
        self._shown.append(views)
        self._set(views)

    def restore(self) -> None:
        """Let the modules see what they saw before: their Parameters, in the end."""
        if self._shown:
            self._shown.pop()
        if self._shown:
            self._set(self._shown[-1])
            return
        for attributes, name, _ in self._attributes:
            attributes.pop(name, None)

    def reset(self) -> None:
        """Let the modules see their Parameters, whatever was under way."""
        self._shown.clear()
        self.restore()

    def register(self, parameters: Sequence[nn.Parameter] | None = None) -> None:
        """Make these the Parameters of the modules; by default this rank's slices."""
        for sites, parameter in zip(self._sites, parameters or self._parameters, strict=True):
            for site in sites:
                setattr(site.module, site.name, parameter)  # recurrent layers take note, and let go of what they had

    def registered(self) -> list[torch.Tensor]:
        """The Parameters that the modules have now."""
        found = {index: attributes["_parameters"][name] for attributes, name, index in reversed(self._attributes)}
        return [found[index] for index in range(len(self._parameters))]

    def _set(self, views: Sequence[torch.Tensor]) -> None:
        for attributes, name, index in self._attributes:
            attributes[name] = views[index]
