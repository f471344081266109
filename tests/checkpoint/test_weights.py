"""Weights from elsewhere: every way they come in, what each rank reads of them, and what does not fit."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import mics_core as mics
import pretraining_work
import weights_work as work
from checkpoint_work import Cluster, Model
from depth import is_deep
from mics_core import ConfigError, LifecycleError, Sharding
from mics_core.cli import main
from mics_models.hf import from_hf_lazily, open_safetensors, save_safetensors, to_hf
from mics_models.training.batches import build, configure
from mics_models.training.settings import ModelSettings, Settings, flatten
from mics_models.training.together import Refused
from pool import Pool

BEGINNINGS = [((2, 2, 4), "bf16"), ((4, 4, 4), "fp32")]
if is_deep():
    shardings = [(1, 1, 1), (2, 2, 2), (4, 4, 4), (1, 2, 4), (2, 2, 4)]
    BEGINNINGS = [(degrees, precision) for degrees in shardings for precision in ("fp32", "bf16")]


@pytest.mark.parametrize(("degrees", "precision"), BEGINNINGS, ids=str)
def test_training_that_begins_with_loaded_weights_is_that_of_a_model_that_had_them(
    pool: Pool, tmp_path: Path, degrees: tuple[int, int, int], precision: str
) -> None:
    work.write(tmp_path)
    for found in pool.run(4, work.begin, Cluster(4, 2, Sharding(*degrees)), precision, tmp_path):
        assert found == {kind: ([], []) for kind in (*work.FILES, "dict", "on demand", "telling")}


def test_what_is_loaded_is_what_was_given() -> None:
    """The rest is compared with what a sharded model says of itself."""
    model = mics.shard(Model(), Sharding.ddp())
    mics.load_weights(work.state(), model)
    with mics.full_params(model):
        for name, tensor in work.state().items():
            assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("tells", [False, True], ids=["asked for shapes, too", "knows shapes"])
def test_a_rank_asks_for_what_it_holds_a_part_of_and_for_one_at_a_time(pool: Pool, tells: bool) -> None:
    answers = pool.run(4, work.ask, tells)
    for held, looked, read, most in answers:
        assert read == held
        assert looked == ([] if tells else held)
        assert most == 1
    assert max(len(held) for held, *_ in answers) < 12  # of 32
    assert {name for held, *_ in answers for name in held} == set(dict(work.stack().named_parameters()))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's account of memory")
def test_a_rank_reads_its_part_of_a_file(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "stack.safetensors"
    work.write_stack(path)
    for bytes_read in pool.run(4, work.mapped, path):
        assert 0.2 < bytes_read / path.stat().st_size < 0.5  # a quarter, and the pages around


MISTAKES = {
    "missing": "scale is missing in the mapping",
    "tied, all missing": "first.weight or last.weight is missing in the mapping",
    "unknown": "more is in the mapping and not in this model",
    "shape": "blocks.1.3.weight has the shape (6, 17) in the mapping, expected (6, 18)",
    "transposed": "blocks.1.3.weight has the shape (18, 6) in the mapping",
    "integers": "idle is torch.int32 in the mapping, expected floating point",
    "buffer": "seen is torch.bool in the mapping, expected floating point",
    "no tensor": "idle is no dense tensor in the mapping",
    "untied": "first.weight and last.weight differ in the mapping",
    "missing on rank 1": "ranks [1] are given other names than rank 0",
    "shape of what rank 1 holds": "on rank 1: load_weights: blocks.1.3.bias has the shape (7,) in the mapping",
    "file on rank 1": "file on rank 1 is not there, expected a file or folder",
}


def test_what_does_not_fit_is_told_on_every_rank_before_memory_is_touched(pool: Pool, tmp_path: Path) -> None:
    for rank, found in enumerate(pool.run(2, work.refuse, tmp_path, list(MISTAKES))):
        for (kind, sentence), (said, changed) in zip(MISTAKES.items(), found, strict=True):
            assert sentence in said or (rank == 1 and sentence.removeprefix("on rank 1: ") in said), kind
            assert "\n" not in said
            assert not changed, kind


def test_loading_drops_gradients_and_leaves_the_optimizer_alone(pool: Pool) -> None:
    for trained, kept, grads in pool.run(2, work.keeps_the_optimizer):
        assert trained
        assert all(kept)
        assert not grads


def test_weights_cannot_change_inside_a_forward(pool: Pool) -> None:
    for error in pool.errors(2, work.load_inside):
        assert type(error) is LifecycleError
        assert "load_weights: called inside the model's forward" in str(error)


SHAPES = {
    "llama": ModelSettings("byte-tiny", config={"layers": 2, "width": 32, "hidden": 64, "context": 32}),
    "gpt2": ModelSettings(
        "gpt2-124m",
        config={"vocab": 61, "layers": 2, "width": 32, "hidden": 64, "heads": 4, "kv_heads": 4, "context": 32},
    ),
    "roberta": ModelSettings("bert-tiny", config={"layers": 2, "width": 32, "hidden": 64, "context": 32}),
    "bert": ModelSettings(
        "bert-base", config={"vocab": 61, "layers": 2, "width": 32, "hidden": 64, "heads": 4, "context": 32}
    ),
}


@pytest.mark.parametrize("shard_bytes", [None, 20_000])
@pytest.mark.parametrize("family", SHAPES)
def test_what_is_exported_for_hugging_face_computes_the_same_there_and_comes_back(
    tmp_path: Path, family: str, shard_bytes: int | None
) -> None:
    config = configure(SHAPES[family])
    plain = build(config)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.3)
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    extra = {"step": 1, "settings": dict(flatten(Settings(model=SHAPES[family]))), "losses": []}
    model = mics.shard(build(config), Sharding.ddp())
    mics.load_weights(state, model)
    mics.save(tmp_path / "step-1", model, None, **extra)
    limit = [] if shard_bytes is None else ["--shard-bytes", str(shard_bytes)]
    out = tmp_path / "hf" / "model.safetensors"
    assert main(["export", str(tmp_path), str(out), "--names", "hf", *limit]) == 0
    assert out.exists() is (shard_bytes is None)

    (architecture,) = json.loads((out.parent / "config.json").read_text())["architectures"]
    theirs, info = getattr(transformers, architecture).from_pretrained(out.parent, output_loading_info=True)
    assert not any(info.values()), info
    tokens = torch.randint(2, config.vocab, (2, 24))
    got = plain(tokens)
    logits = got if isinstance(got, Tensor) else got.tokens
    torch.testing.assert_close(logits, theirs.eval()(tokens)[0], rtol=1e-4, atol=1e-4)

    back = mics.shard(build(config), Sharding.ddp())
    for weights in (open_safetensors(out.parent, config), from_hf_lazily(mics.open_weights(out.parent), config)):
        mics.load_weights(weights, back)
        with mics.full_params(back):
            for name, tensor in back.state_dict().items():
                assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("name", ["gpt", "bert"])
def test_pretraining_begins_with_weights_of_either_names(pool: Pool, tmp_path: Path, name: str) -> None:
    config = configure(pretraining_work.SMALL[name])
    state = build(config).state_dict()
    save_file(state, tmp_path / "ours.safetensors")
    torch.save(state, tmp_path / "ours.pt")
    (tmp_path / "theirs").mkdir()
    save_safetensors(state, tmp_path / "theirs" / "model.safetensors", config)
    torch.save(to_hf(state, config), tmp_path / "theirs.bin")
    for source in ("ours.safetensors", "ours.pt", "theirs", "theirs.bin"):
        for found in pool.run(2, work.pretrain_with, tmp_path / source, (2, 2, 2), name):
            assert found.keys() == state.keys()
            for parameter, value in found.items():
                assert torch.equal(value, state[parameter]), (source, parameter)


def test_pretraining_refuses_weights_of_another_model_in_one_sentence(pool: Pool, tmp_path: Path) -> None:
    state = build(configure(pretraining_work.SMALL["bert"])).state_dict()
    save_file(state, tmp_path / "ours.safetensors")
    save_file({"wte.weight": torch.ones(1)}, tmp_path / "theirs.safetensors")
    for source, sentence in {
        "ours.safetensors": "is in .*ours.safetensors and not in this model|is missing in the mapping",
        "theirs.safetensors": "from_hf: got wte.weight too many and .* too few",
        "none.safetensors": "none.safetensors is not there, expected a file or folder",
    }.items():
        for error in pool.errors(2, work.refuse_to_pretrain, tmp_path / source):
            assert type(error) is Refused
            assert re.search(sentence, str(error))
            assert "\n" not in str(error)


def test_empty_parameters_are_checked_too() -> None:
    class Odd(nn.Module):
        def __init__(self, rows: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.nothing = nn.Parameter(torch.ones(rows, 2))

    model = mics.shard(Odd(0), Sharding.ddp())
    mics.load_weights(Odd(0).state_dict(), model)
    with pytest.raises(ConfigError, match=r"nothing has the shape \(1, 2\) in the mapping, expected \(0, 2\)"):
        mics.load_weights(Odd(1).state_dict(), model)
