"""What is in a checkpoint, in words."""

from __future__ import annotations

from math import prod
from pathlib import Path

from mics_core.checkpoint.optimizer_state import GROUPS
from mics_core.checkpoint.reading import Stored


def describe(path: Path, *, verify: bool = False) -> str:
    """A text of several lines: what wrote it, the tensors of the model, the optimizer, extra names, files."""
    stored = Stored(path)
    if verify:
        stored.verify(0, 1)
    about = stored.manifest.about
    sharding, precision = about["sharding"], about["precision"]
    lines = [
        f"{stored.path}: written by {about['ranks']} ranks, {about['ranks_per_node']} a node, torch {about['torch']}",
        f"sharding: params {sharding['params']}, grads {sharding['grads']}, optimizer {sharding['optimizer']}; "
        + ", ".join(f"{name} {dtype.removeprefix('torch.')}" for name, dtype in sorted(precision.items())),
    ]
    if about["loss_scale"]:
        lines.append(f"loss scale: {about['loss_scale']['scale']:g}")
    tensors = [(name, entry) for name, entry in sorted(stored.tensors.items()) if name.startswith("model.")]
    elements = sum(prod(entry.size) for _, entry in tensors)
    lines.append(f"model: {len(tensors)} tensors, {elements:,} elements")
    for name, entry in tensors:
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        lines.append(f"  {name.removeprefix('model.')}  {tuple(entry.size)}  {dtype}")
    if about["optimizer"]:
        lines.append(f"optimizer: {about['optimizer']}")
        lines += _groups(stored)
    lines.append(f"extra: {', '.join(about['extra']) or 'nothing'}")
    files = stored.manifest.files
    checked = "lengths and checksums are right" if verify else "lengths are right; --verify compares checksums"
    lines.append(f"files: {len(files)}, {sum(entry.bytes for entry in files.values()):,} bytes; {checked}")
    return "\n".join(lines)


def _groups(stored: Stored) -> list[str]:
    try:
        groups = stored.read_object(GROUPS)
    except RuntimeError as error:  # of classes, so it was written when that was allowed
        return [f"  {error}"]
    return [
        f"  group {number}: {len(group['params'])} parameters, "
        + ", ".join(f"{key} {value}" for key, value in group.items() if key != "params")
        for number, group in enumerate(groups)
    ]
