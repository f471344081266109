"""Prepare data for training: `python -m mics_models.data prepare FILES... --out FOLDER`, and look at what was made."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from mics_models.data.corpus import VOCAB
from mics_models.data.prepare import LISTED, Settings, prepare
from mics_models.data.prepared import SIDES, Manifest, load, verify
from mics_models.sentences import sentence

SHOWN = 200  # tokens


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """A command line."""
    default = Settings()
    parser = argparse.ArgumentParser(prog="python -m mics_models.data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser(
        "prepare",
        help="make files of tokens from files of text",
        description="Make a folder of tokens. Interrupted, the same command goes on where it was.",
    )
    making.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        metavar="FILES",
        help=".txt, .md: a document a file; .jsonl: a document a line; .parquet: a document a row; folders of such",
    )
    making.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where to make it")
    source = making.add_mutually_exclusive_group()
    source.add_argument(
        "--vocab",
        default=default.vocab,
        type=int,
        help=f"tokens of the tokenizer that is trained (%(default)s); {VOCAB}: none is, a token is a byte",
    )
    source.add_argument("--tokenizer", type=Path, metavar="FILE", help="use this tokenizer.json and train none")
    making.add_argument(
        "--start-token", default=default.start_token, help="of FILE, begins each document (%(default)s)"
    )
    making.add_argument("--field", default=default.field, help="the text in a .jsonl or .parquet (%(default)s)")
    making.add_argument(
        "--held-out",
        default=default.held_out,
        type=int,
        help="one document in so many (%(default)s); of too few documents the end of each",
    )
    making.add_argument("--skip-bad", action="store_true", help="list what cannot be read, and go on")
    for name, what in (("verify", "read all of a folder and compare checksums"), ("show", "say what a folder holds")):
        commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.").add_argument(
            "folder", type=Path, help="what prepare made"
        )
    return parser.parse_args(arguments)


def run_prepare(chosen: argparse.Namespace) -> int:
    """Prepare, and say what came of it."""
    settings = Settings(
        chosen.field, chosen.held_out, chosen.vocab, chosen.tokenizer, chosen.start_token, chosen.skip_bad
    )
    manifest = prepare(chosen.inputs, chosen.out, settings)
    _count(manifest)
    listed = [place for part in manifest.parts.values() for place in part.listed]
    if bad := sum(part.bad for part in manifest.parts.values()):
        print(f"skipped {bad} bad documents, of which the first:", *listed[:LISTED], sep="\n  ")
    vocab = load(chosen.out).vocab
    told = [f"data.folder={chosen.out}", *[f"model.config.vocab={vocab}"] * (vocab > VOCAB)]
    print(f"{vocab:,} tokens in the vocabulary; a small GPT learns them with")
    print(f"    torchrun --nproc-per-node 4 -m mics_models.pretrain {shlex.join(told)}")
    return 0


def run_verify(folder: Path) -> int:
    """Say of what is damaged, or that nothing is."""
    damages = list(verify(folder))
    for damage in damages:
        print(damage, file=sys.stderr)
    print(f"{folder}: {len(damages)} damaged files" if damages else f"{folder}: everything is as it was written")
    return 1 if damages else 0


def run_show(folder: Path) -> int:
    """Say what a folder holds."""
    corpus, manifest = load(folder), Manifest.read(folder)
    settings = [f"{flag} {value}" for flag, value in manifest.settings.items() if value is not None]
    print(f"{corpus.vocab:,} tokens in the vocabulary, made with {' '.join(settings)}")
    _count(manifest)
    print(f"The first {SHOWN} tokens:\n{corpus.decode(corpus.train[:SHOWN])}")
    return 0


def _count(manifest: Manifest) -> None:
    for side in SIDES:
        count = manifest.total(side)
        print(f"{side:<8}  {count.tokens:,} tokens in {count.documents:,} documents")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    chosen = parse(arguments)
    try:
        if chosen.command == "prepare":
            return run_prepare(chosen)
        return {"verify": run_verify, "show": run_show}[chosen.command](chosen.folder)
    except KeyboardInterrupt:
        print("data: interrupted; the same prepare goes on where this one was", file=sys.stderr)
        return 130
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(sentence(error), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
