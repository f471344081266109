"""Training on one machine: tokens/s, MFU and peak memory of a GPT and a BERT under ours and under PyTorch's runtimes.

    python -m bench.training [--models gpt-1.3b bert-large --ranks 1 8 --precision bf16 --tokens 8192 --seq 2048]

On one rank against plain PyTorch, on several against DDP and FSDP2 of the same degree. All take the same micro-batches,
clip the norm and step with AdamW, in turns. With bf16 plain PyTorch and DDP keep float32 weights and compute under
autocast, which is what they offer for the same arithmetic. Peak memory is that of a step, with weights and optimizer
state: on a GPU as torch counts it, on a CPU how much more of the process was resident than before the model was made.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import mics_core as mics
from bench import ranks, record
from bench.harness import Ratio, Samples
from bench.training_work import MODELS, Job, variants
from mics_core.planner import Candidate, memory, trace
from mics_models import BERT, GPT, GPTConfig

TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
"""How far losses may differ."""

LARGEST_SHARE = 0.6
"""Of a GPU's memory, for states; activations need room, too."""

Found = dict[str, Any]


def fitting(models: Sequence[str], memory: int, ranks: int) -> str | None:
    """The first of these models whose states fit on a GPU under all runtimes at once, as they must to take turns."""
    copies = 2 if ranks == 1 else 2.5 + 4 / ranks  # of 16 bytes a parameter: two runtimes cut nothing, three do
    return next((name for name in models if 16 * MODELS[name].num_params() * copies < LARGEST_SHARE * memory), None)


def defaults(count: int) -> list[str]:
    """A GPT and a BERT that make sense on so many ranks of this machine."""
    if not torch.cuda.is_available():
        return ["gpt-small", "bert-small"]
    memory = torch.cuda.get_device_properties(0).total_memory
    chosen = [fitting(names, memory, count) for names in (("gpt-1.3b", "gpt2-350m", "gpt2-124m"), ("bert-large",))]
    return [name for name in chosen if name is not None]


def run(job: Job, count: int) -> tuple[list[Found], Found]:
    """What was found of every model on so many ranks, and what else the ranks reported."""
    told = ranks.run(count, ["bench.training_work", job.write()], timeout=600 + 10 * job.seconds * len(job.models))
    rows = [
        {"model": name, "ranks": count, "variants": judged(found, job, name, told["peak"]["flops"], count)}
        for name, found in told.pop("models").items()
    ]
    return rows, told


def judged(found: Mapping[str, Found], job: Job, model: str, peak: float, count: int) -> dict[str, Found]:
    """Speeds and ratios; AssertionError if the variants disagree on a loss."""
    losses = torch.tensor([each["losses"] for each in found.values()], dtype=torch.float64)
    if not (losses - losses[0]).abs().max() <= TOLERANCE[job.precision]:  # nor is a NaN near anything
        told = {name: each["losses"] for name, each in found.items()}
        raise AssertionError(f"training: the variants disagree on the loss of {model}, so no time counts: {told}")
    samples = Samples({name: each["seconds"] for name, each in found.items()})
    rows = {}
    for name, peer in variants(count, apart=job.apart).items():
        spread = samples.spread(name)
        speed = count * job.micro_steps * job.tokens / spread.median
        rows[name] = {
            "step": spread,
            "tokens_per_s": speed,
            "mfu": speed * MODELS[model].flops_per_token(job.shape(model)[-1]) / (count * peak),
            "memory": found[name]["memory"],
            "predicted": predicted(job, model, count, name),
            "peer": peer,
            "times_as_fast": samples.ratio(peer, name) if peer else None,
        }
    return rows


def predicted(job: Job, model: str, count: int, variant: str) -> int | None:
    """What the planner takes for the peak of one of ours."""
    if not variant.startswith("mics "):
        return None
    _, degrees, *_ = variant.split()
    config = MODELS[model]
    with torch.device("meta"):
        whole = GPT(config) if isinstance(config, GPTConfig) else BERT(replace(config, next_sentence=False))
    micro_steps, samples, seq = job.shape(model)
    tokens = torch.zeros(1, seq, dtype=torch.long)
    precision = mics.Precision.bf16() if job.precision == "bf16" else mics.Precision.fp32()
    workload = trace(whole, {"tokens": tokens, "targets": tokens}, precision=precision, ranks=count)
    sharding = mics.Sharding(*map(int, degrees.split(",")))
    candidate = Candidate(sharding, precision, samples, micro_steps, job.checkpoint_blocks)
    return memory(workload, candidate, replace(mics.Cluster.preset("this machine"), ranks_per_node=count)).total


def training_table(rows: Sequence[Found]) -> str:
    """As Markdown, from a record."""
    planned = any(each.get("predicted") for row in rows for each in row["variants"].values())
    header = [
        "",
        "ranks",
        "",
        "ms a step",
        "10-90 %",
        "tokens/s",
        "MFU",
        "peak memory, MB",
        *(["as planned"] if planned else []),
        "times as fast as",
    ]
    texts = []
    for row in rows:
        for name, each in row["variants"].items():
            step, ratio = each["step"], each["times_as_fast"]
            texts.append(
                [
                    row["model"],
                    str(row["ranks"]),
                    name,
                    f"{1e3 * step['median']:.1f}",
                    f"{1e3 * step['p10']:.1f}-{1e3 * step['p90']:.1f}",
                    f"{each['tokens_per_s']:,.0f}",
                    f"{each['mfu']:.1%}",
                    "" if each["memory"] is None else f"{each['memory'] / 1e6:,.0f}",
                    *([f"{each['predicted'] / 1e6:,.0f}" if each.get("predicted") else ""] if planned else []),
                    f"{Ratio(**ratio).told(3)} {each['peer']}" if ratio else "",
                ]
            )
    return record.table(header, texts)


def training_note(found: Mapping[str, Any]) -> str:
    """What MFU is a share of."""
    return f"MFU is of {found['peak']['flops'] / 1e12:.3g} TFLOP/s a rank, {found['peak']['source']}."


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command's words."""
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="default: by the memory of a GPU, or small")
    parser.add_argument("--ranks", type=int, nargs="+", default=sorted({1, gpus}) if gpus else [1, 2])
    parser.add_argument("--precision", choices=list(TOLERANCE), default="bf16" if gpus else "fp32")
    parser.add_argument("--micro-steps", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192 if gpus else 256, help="of a micro-step, on each rank")
    parser.add_argument("--seq", type=int, default=2048 if gpus else 128, help="at most; a model's context is less")
    parser.add_argument("--checkpoint-blocks", action="store_true")
    parser.add_argument("--apart", action="store_true", help="one runtime at a time, where not all fit; FSDP2 on one")
    parser.add_argument("--compile", default="", metavar="BACKEND", help="compile each block, as by inductor")
    parser.add_argument("--name", default="training", help="of the record")
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring, for each model and number of ranks")
    parser.add_argument("--commit", default="", help="the commit, where the tree was copied without its history")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and save."""
    options = parsed(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    words = ["python", "-m", "bench.training", *(sys.argv[1:] if arguments is None else arguments)]
    content = record.stamp(words, device, options.commit)
    content |= {"precision": options.precision, "micro_steps": options.micro_steps, "tokens": options.tokens}
    content |= {"compiled": options.compile, "apart": options.apart}
    path = options.out / record.folder(device) / f"{options.name}.json"
    rows: list[Found] = []
    for count in options.ranks:
        models = tuple(options.models or defaults(count))
        print(f"training: {', '.join(models)} on {count} ranks", file=sys.stderr, flush=True)
        job = Job(
            models,
            options.micro_steps,
            options.tokens,
            options.seq,
            options.precision,
            options.checkpoint_blocks,
            options.seconds,
            options.apart,
            options.compile,
        )
        found, told = run(job, count)
        rows += found
        content |= told | {"rows": rows}
        record.save(path, content)  # now: later ones may be killed
    print(training_table(record.plain(rows)))
    print(f"\n{training_note(content)}")
    for what, reason in content["left_out"].items():
        print(f"left out: {what}: {reason}", file=sys.stderr)
    print(f"saved {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
