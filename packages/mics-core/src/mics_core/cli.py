"""The command `mics`: what is done outside of training, with checkpoints and to plan."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from mics_core import __version__
from mics_core.checkpoint.description import describe
from mics_core.checkpoint.export import export
from mics_core.errors import ConfigError
from mics_core.planner import commands as planning

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    given = _parser().parse_args(arguments)
    try:
        _run(given)
        sys.stdout.flush()  # so that a reader that left is noticed here
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` has read enough: Python flushes again
        return 128 + signal.SIGPIPE  # as other programs end
    except (ValueError, RuntimeError, OSError) as error:
        print(f"mics {given.command} failed: {_sentence(error)}", file=sys.stderr)
        return 1
    return 0


def _run(given: argparse.Namespace) -> None:
    if given.command in planning.NAMES:
        planning.run(given)
    elif given.command == "inspect":
        print(describe(given.checkpoint, verify=given.verify))
    else:
        if given.shard_bytes is not None and given.shard_bytes < 1:
            raise ConfigError(
                f"--shard-bytes is {given.shard_bytes}, expected at least 1: the bytes of a file's tensors"
            )
        for path in export(given.checkpoint, given.out, DTYPES.get(given.dtype), given.shard_bytes, given.names):
            print(path)


def _sentence(error: Exception) -> str:
    """What the system says of a file has no remedy, and no words of ours around it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename} cannot be read or written: {error.strerror}: name another, or repair this one"
    return str(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mics", description="Plans of trainings; checkpoints of mics.save.")
    parser.add_argument("--version", action="version", version=f"mics {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    planning.add_parsers(commands)
    checkpoint = "a checkpoint's directory, or a folder whose `latest` names one"
    inspect = commands.add_parser("inspect", help="print what is inside")
    inspect.add_argument("checkpoint", type=Path, help=checkpoint)
    inspect.add_argument("--verify", action="store_true", help="read all files and compare their checksums")
    out = commands.add_parser("export", help="write the model's weights and buffers for other programs")
    out.add_argument("checkpoint", type=Path, help=checkpoint)
    out.add_argument(
        "out",
        type=Path,
        help="such as model.safetensors, written tensor by tensor; or model.pt, a state dict of torch.save, for which "
        "the whole model must fit in this machine's memory",
    )
    out.add_argument("--dtype", choices=sorted(DTYPES), help="of what is floating point; default: as it was saved")
    out.add_argument("--shard-bytes", type=int, metavar="N", help="spread over files of at most N bytes of tensors")
    out.add_argument(
        "--names",
        help="write them as others name them, with files beside them such as config.json: mics-models has hf, Hugging "
        "Face's names, for checkpoints of its pretraining",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
