"""What is no index of a checkpoint is told in a sentence, whoever wrote it, and nothing is run or changed."""

import pickle
import pickletools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import metadata

import mics_core as mics
from mics_core.checkpoint.description import describe
from mics_core.checkpoint.index import read_index
from mics_core.checkpoint.manifest import Manifest, measure
from mics_core.cli import main

METADATA = "torch.distributed.checkpoint.metadata"


def saved(folder: Path) -> Path:
    mics.save(folder / "step-1", mics.shard(nn.Linear(3, 3), mics.Sharding.ddp()), None)
    return folder / "step-1"


def forge(step: Path, index: bytes) -> None:
    """Put another index in, with its right length and checksum: whoever writes an index writes a manifest, too."""
    (step / ".metadata").write_bytes(index)
    manifest = Manifest.read(step)
    files = manifest.files | {".metadata": measure(step / ".metadata")}
    (step / "manifest.json").write_bytes(replace(manifest, files=files).render())


def named(module: str, name: str) -> bytes:
    """What pushes an object by its name, by protocol 4, which follows names through dots."""

    def text(word: str) -> bytes:
        return b"X" + len(word.encode()).to_bytes(4, "little") + word.encode()

    return text(module) + text(name) + b"\x93"


def value(thing: object) -> bytes:
    return pickle.dumps(thing, 2)[2:-1]


def called(module: str, name: str, *args: object) -> bytes:
    return b"\x80\x04" + named(module, name) + value(args) + b"R."


def changed(module: str, name: str, attribute: str) -> bytes:
    """What sets an attribute of a class, which would stay."""
    return b"\x80\x04" + named(module, name) + value((None, {attribute: 7})) + b"b0N."


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "mkdir"),
        ("torch.distributed.checkpoint.filesystem", "os.mkdir"),
        (METADATA, "torch._strobelight.cli_function_profiler.subprocess.Popen"),
        (METADATA, "Metadata.__init__"),
        ("torch", "Size.__class__"),
        ("torch", "load"),
    ],
)
def test_what_an_attacker_calls_is_not_run_and_told_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], module: str, name: str
) -> None:
    step, made = saved(tmp_path), tmp_path / "made"
    forge(step, called(module, name, ["mkdir", str(made)] if "Popen" in name else str(made)))
    for command in (["inspect", str(step)], ["inspect", "--verify", str(step)], ["export", str(step), "x.safetensors"]):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert f"the index holds {module}.{name}, which no index holds" in said
        assert said.count("\n") == 1
    model = mics.shard(nn.Linear(3, 3), mics.Sharding.ddp())
    loads: list[Callable[[], object]] = [lambda: mics.load(step, model, None), lambda: describe(step)]
    for load in loads:
        with pytest.raises(RuntimeError, match="which no index holds"):
            load()
    assert not made.exists()


@pytest.mark.parametrize("attribute", ["__init__", "a_new_one"])
def test_a_class_that_an_attacker_changes_is_as_it_was(tmp_path: Path, attribute: str) -> None:
    step, before = saved(tmp_path), dict(vars(metadata.MetadataIndex))
    forge(step, changed(METADATA, "MetadataIndex", attribute))
    with pytest.raises(RuntimeError, match="the index changes MetadataIndex, which no index does"):
        describe(step)
    assert dict(vars(metadata.MetadataIndex)) == before


@pytest.mark.parametrize("index", [b"", b"junk", pickle.dumps(7), pickle.dumps({})[:-2]], ids=repr)
def test_what_is_no_index_is_a_sentence(tmp_path: Path, index: bytes) -> None:
    step = saved(tmp_path)
    forge(step, index)
    with pytest.raises(RuntimeError, match=r"\.metadata (is no index of a checkpoint|holds a int)") as caught:
        describe(step)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "args", [(metadata.Metadata, "TORCH_CHANNELS_LAST"), (metadata._MEM_FORMAT_ENCODING, "mro"), ([], "pop")]
)
def test_attributes_are_members_of_one_enum_or_refused(tmp_path: Path, args: tuple[object, str]) -> None:
    step = saved(tmp_path)
    forge(step, called("builtins", "getattr", *args))
    with pytest.raises(RuntimeError, match=r"holds builtins\.getattr of another object, which no index holds"):
        describe(step)


def test_an_index_that_an_early_python_3_11_wrote_is_read(tmp_path: Path) -> None:
    """Before 3.11.4 a member of an enum is pickled as an attribute of its class."""

    def reduce(member: metadata._MEM_FORMAT_ENCODING, _: int) -> tuple[object, ...]:
        return getattr, (type(member), member.name)

    with patch.object(metadata._MEM_FORMAT_ENCODING, "__reduce_ex__", reduce):
        path = saved(tmp_path) / ".metadata"
    assert b"getattr" in path.read_bytes()
    properties = read_index(path.read_bytes(), path).state_dict_metadata["model.weight"].properties
    assert properties.memory_format is torch.contiguous_format


def test_an_index_that_a_later_python_wrote_is_read(tmp_path: Path) -> None:
    """Python 3.13 says `pathlib._local` where others say `pathlib`."""
    path = saved(tmp_path) / ".metadata"
    before = read_index(path.read_bytes(), path)
    names = [arg for _, arg, _ in pickletools.genops(path.read_bytes()) if arg == "pathlib"]
    assert names, "the index names no path, so nothing is shown"
    old, new = (b"\x8c" + bytes([len(name)]) + name for name in (b"pathlib", b"pathlib._local"))
    content = path.read_bytes()
    framed = content.find(old)
    begin = content.rfind(b"\x95", 0, framed)  # the frame that holds it, whose length grows
    length = int.from_bytes(content[begin + 1 : begin + 9], "little") + len(new) - len(old)
    grown = content[: begin + 1] + length.to_bytes(8, "little") + content[begin + 9 :]
    after = read_index(grown.replace(old, new, 1), path)
    assert after.state_dict_metadata == before.state_dict_metadata
    assert after.storage_data == before.storage_data
    assert isinstance(after.state_dict_metadata["model.weight"], metadata.TensorStorageMetadata)
    assert after.state_dict_metadata["model.weight"].properties.dtype is torch.float32
