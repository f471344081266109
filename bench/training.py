"""What the runtime costs a whole training step on one rank: tokens/s and MFU of a GPT, against plain PyTorch.

    python -m bench.training [--model gpt-1.3b --precision bf16 --samples 4 --seq 2048]

Both take the same micro-batches, with AdamW and a clipped norm; the steps are interleaved. With bf16 plain PyTorch
keeps float32 weights and computes under autocast, which is what it offers for the same arithmetic.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mics_core as mics
from bench import record
from bench.harness import HostTimer, Samples, Variant, measure
from mics_models import GPT, GPTConfig
from mics_models.configs import GPTS
from mics_models.training.peak import Peak, peak

SMALL = GPTConfig(vocab=512, context=256, layers=6, width=256, heads=4, kv_heads=4, hidden=1024)
"""For a CPU."""

Step = Callable[[], torch.Tensor]


def plain(config: GPTConfig, batches: Sequence[torch.Tensor], precision: str, device: torch.device) -> Step:
    """PyTorch alone."""
    torch.manual_seed(0)
    with device:
        model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    compute = nullcontext() if precision == "fp32" else torch.autocast(device.type, torch.bfloat16)

    def step() -> torch.Tensor:
        for tokens in batches:
            with compute:
                loss = model(tokens[:, :-1], tokens[:, 1:])
            (loss / len(batches)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def ours(config: GPTConfig, batches: Sequence[torch.Tensor], precision: str, device: torch.device) -> Step:
    """The runtime, in a world of one rank."""
    torch.manual_seed(0)
    with device:
        model = mics.shard(GPT(config), mics.Sharding.ddp(), precision=getattr(mics.Precision, precision)())
    optimizer = mics.AdamW(model.parameters(), lr=1e-4)

    def step() -> torch.Tensor:
        for tokens in mics.accumulate(model, batches):
            loss = model(tokens[:, :-1], tokens[:, 1:])
            (loss / len(batches)).backward()
        mics.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


VARIANTS = {"plain PyTorch": plain, "mics": ours}


def run(
    config: GPTConfig, shape: tuple[int, int, int], precision: str, device: torch.device, seconds: float
) -> tuple[Samples, dict[str, int]]:
    """Seconds of a step of each, and the bytes of GPU memory that each needed; they must agree on the loss."""
    micro_steps, samples, seq = shape
    random = torch.Generator(device).manual_seed(1)
    size = (micro_steps, samples, seq + 1)
    batches = list(torch.randint(config.vocab, size, device=device, generator=random).unbind())
    on_gpu = device.type == "cuda"
    steps, losses, memory = {}, {}, {}
    for name, make in VARIANTS.items():
        before = torch.cuda.memory_allocated(device) if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        steps[name] = make(config, batches, precision, device)
        losses[name] = [steps[name]().item() for _ in range(3)]
        memory[name] = torch.cuda.max_memory_allocated(device) - before if on_gpu else 0
    first, second = (torch.tensor(found) for found in losses.values())
    if (first - second).abs().max() > (1e-4 if precision == "fp32" else 3e-2):
        raise AssertionError(f"training: the variants disagree on the loss: {losses}")
    timer = HostTimer(after=(lambda: torch.cuda.synchronize(device)) if on_gpu else lambda: None)
    return measure({name: Variant(step) for name, step in steps.items()}, timer, seconds), memory


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=["small", *GPTS], default="small")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--micro-steps", type=int, default=2)
    parser.add_argument("--samples", type=int, default=4, help="of a micro-step")
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--checkpoint-blocks", action="store_true")
    parser.add_argument("--seconds", type=float, default=30.0, help="to spend on measuring")
    parser.add_argument("--commit", default="", help="the commit, where the tree was copied without its history")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args(arguments)
    device = mics.init()
    if device.type == "cpu":
        torch.set_num_threads(1)
    config = SMALL if options.model == "small" else GPTS[options.model]
    config = replace(config, checkpoint_blocks=options.checkpoint_blocks)
    shape = (options.micro_steps, options.samples, options.seq)
    samples, memory = run(config, shape, options.precision, device, options.seconds)
    top: Peak = peak(device, torch.bfloat16 if options.precision == "bf16" else torch.float32, 0.0)
    tokens = options.micro_steps * options.samples * options.seq
    rows, found = [], {}
    for name in VARIANTS:
        seconds = samples.spread(name).median
        mfu = tokens * config.flops_per_token(options.seq) / seconds / top.flops
        found[name] = {
            "step": samples.spread(name),
            "tokens_per_s": tokens / seconds,
            "mfu": mfu,
            "memory": memory[name],
        }
        rows.append(
            [name, f"{1e3 * seconds:.1f}", f"{tokens / seconds:,.0f}", f"{mfu:.1%}", f"{memory[name] / 1e9:.1f}"]
        )
    ratio = samples.ratio("mics", "plain PyTorch")
    print(record.table(["", "ms a step", "tokens/s", "MFU", "GPU memory, GB"], rows))
    print(f"\nmics takes {ratio.value:.3f} ({ratio.low:.3f}-{ratio.high:.3f}) of plain PyTorch's time")
    print(f"MFU is of {top.flops / 1e12:.3g} TFLOP/s: {top.source}")
    words = ["python", "-m", "bench.training", *(sys.argv[1:] if arguments is None else arguments)]
    content: dict[str, Any] = record.stamp(words, device, options.commit)
    content |= {"model": options.model, "shape": shape, "precision": options.precision, "peak": top}
    content |= {"variants": found, "mics_over_plain": ratio}
    print(f"saved {record.save(options.out / record.folder(device) / 'training.json', content)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
