"""A checkpoint's weights for others: as safetensors, written tensor by tensor, or as one file of torch.save.

Others have names and layouts of their own. Plug-ins know them, so that the runtime knows no model: entry points of the
group `mics.names`, each a `Naming`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mics_core.checkpoint.folder import write_durably
from mics_core.checkpoint.reading import Stored
from mics_core.checkpoint.safetensors import NAMES, Entry, write
from mics_core.checkpoint.saving import EXTRA
from mics_core.errors import ConfigError

Rename = Callable[[str, Tensor], Mapping[str, Tensor]]
"""From one of our names and its tensor to theirs; also given tensors on the meta device."""

Naming = Callable[[Mapping[str, Any]], tuple[Rename, Mapping[str, str]]]
"""What a plug-in is: from the `extra` of a checkpoint to how its tensors are renamed, and the texts of files to write
beside them, by name. A ValueError if the checkpoint is none that it knows."""

GROUP = "mics.names"


def export(
    checkpoint: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
    names: str | None = None,
) -> list[Path]:
    """Write the model's weights and buffers to `out`, in this dtype if they are floating point; the files of tensors.

    A .safetensors file is written tensor by tensor. With `shard_bytes` they are spread over files of at most so many
    bytes of tensors, and an index names them: model.safetensors becomes model-00001-of-00003.safetensors and so on, and
    model.safetensors.index.json. A .pt file is a state dict of torch.save: the whole model is in memory meanwhile.

    names: a plug-in, which gives the tensors other names, and may write files beside `out`, such as config.json.
    """
    if out.suffix not in (".safetensors", ".pt"):
        raise ConfigError(f"export: the output is {out}, expected a name that ends in .safetensors or .pt")
    if out.suffix == ".pt" and shard_bytes is not None:
        raise ConfigError(f"export: {out} is one file, expected no shard_bytes: leave it out, or write .safetensors")
    naming = None if names is None else _installed(names)
    stored = Stored(checkpoint)
    stored.verify(0, 1)
    rename, beside = (_as_ours, {}) if naming is None else naming(_extra(stored))
    model = _Model(stored, dtype, rename)
    entries = model.entries()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".pt":
            _write_state_dict(out, dict(zip((entry.name for entry in entries), model.tensors(), strict=True)))
            paths = [out]
        else:
            paths = _write_safetensors(out, entries, model.tensors(), shard_bytes)
        for name, text in beside.items():
            write_durably(out.with_name(name), text.encode())
    except OSError as error:
        raise ConfigError(
            f"export: {error.filename or out} cannot be written: {error.strerror}: choose another output, or make room"
        ) from error
    return paths


def _installed(names: str) -> Naming:
    installed = {point.name: point for point in entry_points(group=GROUP)}
    if names not in installed:
        raise ConfigError(
            f"export: the names {names!r} are unknown, expected one of those installed, which are "
            f"{', '.join(sorted(installed)) or 'none'}: choose one, or install the package that has it"
        )
    found: Naming = installed[names].load()
    return found


def _as_ours(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
    return {name: tensor}


def _extra(stored: Stored) -> Mapping[str, Any]:
    extra: Mapping[str, Any] = stored.read_object(EXTRA)
    return extra


class _Model:
    """What is exported, tensor by tensor, always in the same order."""

    def __init__(self, stored: Stored, dtype: torch.dtype | None, rename: Rename) -> None:
        self._stored = stored
        self._rename = rename
        self._dtypes: dict[str, torch.dtype] = {}
        for full, entry in sorted(stored.tensors.items()):
            if full.startswith("model."):
                given = entry.properties.dtype
                self._dtypes[full] = dtype if dtype is not None and given.is_floating_point else given

    def entries(self) -> list[Entry]:
        """What there will be, without reading it."""
        found: dict[str, Entry] = {}
        for full, dtype in self._dtypes.items():
            whole = torch.empty(self._stored.tensors[full].size, dtype=dtype, device="meta")
            for name, tensor in self._rename(full.removeprefix("model."), whole).items():
                if name in found:
                    raise ConfigError(
                        f"export: {name} comes twice, again from {full}, expected it once: mend the plug-in"
                    )
                found[name] = Entry(name, tuple(tensor.shape), tensor.dtype)
        return list(found.values())

    def tensors(self) -> Iterator[Tensor]:
        """One after another; no more than one is in memory if the caller forgets it."""
        for full, dtype in self._dtypes.items():
            yield from self._rename(full.removeprefix("model."), self._stored.whole(full).to(dtype)).values()


def _write_state_dict(path: Path, state: dict[str, Tensor]) -> None:
    unfinished = path.with_name(f".{path.name}.part")
    try:
        torch.save(state, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_safetensors(out: Path, entries: list[Entry], tensors: Iterator[Tensor], limit: int | None) -> list[Path]:
    for entry in entries:
        if entry.dtype not in NAMES:
            raise ConfigError(f"export: {entry.name} is {entry.dtype}, which safetensors has not: write a .pt file")
    parts = _spread(entries, limit)
    if len(parts) == 1:
        write(out, entries, tensors)
        return [out]
    paths = [out.with_stem(f"{out.stem}-{number:05}-of-{len(parts):05}") for number in range(1, len(parts) + 1)]
    for path, part in zip(paths, parts, strict=True):
        write(path, part, tensors)
    where = {entry.name: path.name for path, part in zip(paths, parts, strict=True) for entry in part}
    index = {"metadata": {"total_size": sum(entry.bytes for entry in entries)}, "weight_map": where}
    write_durably(out.with_name(f"{out.name}.index.json"), (json.dumps(index, indent=2) + "\n").encode())
    return paths


def _spread(entries: list[Entry], limit: int | None) -> list[list[Entry]]:
    """In order, as many to a file as fit; one that is larger has a file of its own."""
    parts: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if limit is not None and parts[-1] and size + entry.bytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += entry.bytes
    return parts
