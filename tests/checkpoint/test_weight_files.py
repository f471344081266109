"""Files of weights, ours and others': what they hold is found in them, and what is damaged is told."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import mics_core as mics
import weights_work as work
from mics_core import ConfigError
from mics_core.checkpoint.safetensors import NAMES, Entry, write


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    """Of every dtype and some odd shapes."""
    found = {}
    for dtype in draw(st.lists(st.sampled_from([*NAMES]), min_size=1, max_size=6)):
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        raw = torch.randint(0, 2, (torch.Size(shape).numel() * dtype.itemsize,), dtype=torch.uint8)
        found[draw(st.text(min_size=1))] = (
            raw.view(dtype).view(shape) if raw.numel() else torch.empty(shape, dtype=dtype)
        )
    return found


@given(tensors())
def test_files_are_those_of_the_library(tmp_path_factory: pytest.TempPathFactory, given: dict[str, Tensor]) -> None:
    folder = tmp_path_factory.mktemp("files")
    ours, theirs = folder / "ours.safetensors", folder / "theirs.safetensors"
    entries = [Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in given.items()]
    write(ours, entries, iter(given.values()))
    save_file(given, theirs)
    for found in (load_file(ours), mics.open_weights(ours), mics.open_weights(theirs)):
        assert set(found) == given.keys()
        for name, tensor in given.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert bytes_of(found[name]) == bytes_of(tensor)
    assert sorted(path.name for path in folder.iterdir()) == ["ours.safetensors", "theirs.safetensors"]


def bytes_of(tensor: Tensor) -> list[int]:
    numbers: list[int] = tensor.contiguous().view(-1).view(torch.uint8).tolist() if tensor.numel() else []
    return numbers


def test_tensors_may_begin_at_odd_places(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    save_file({"a": torch.tensor([1.0, 2.0])}, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    path.write_bytes((length + 3).to_bytes(8, "little") + content[8 : 8 + length] + b"   " + content[8 + length :])
    found = mics.open_weights(path)["a"]
    assert found.tolist() == [1.0, 2.0]
    assert found.data_ptr() % found.itemsize == 0


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    entries = [Entry(name, (2,), torch.float32) for name in ("a", "b")]

    def broken() -> Iterator[Tensor]:
        yield torch.ones(2)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write(path, entries, broken())
    assert not list(tmp_path.iterdir())


def shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def header_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def header_changed(old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new, 1))

    return change


UNREAD = r"{} cannot be read \(.*\), expected a whole safetensors file"

DAMAGE = {
    "shorter": shorter,
    "longer": longer,
    "empty": empty,
    "header cut": header_cut,
    "no JSON": header_changed(b'{"', b"{ "),
    "no shape": header_changed(b'"shape"', b'"shade"'),
    "another shape": header_changed(b"[5]", b"[4]"),
    "less than nothing": header_changed(b"[3,1,3]", b"[-3,-3]"),
    "a list of dtypes": header_changed(b'"F32"', b"[1,2]"),
    "another dtype": header_changed(b'"F32"', b'"F33"'),
    "a dtype of two lines": header_changed(b'"F32"', rb'"\n2"'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    work.write(tmp_path)
    path = tmp_path / "one.safetensors"
    DAMAGE[damage](path)
    with pytest.raises(ConfigError, match=UNREAD.format(path)) as raised:
        mics.open_weights(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("second", "size"), [((16, 24), 24), ((4, 12), 12)], ids=["a hole", "bytes of two tensors"])
def test_tensors_that_do_not_lie_side_by_side_are_damage(tmp_path: Path, second: tuple[int, int], size: int) -> None:
    places = {"a": (0, 8), "b": second}
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": ends} for name, ends in places.items()}
    text = json.dumps(header).encode()
    path = tmp_path / "one.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(ConfigError, match=UNREAD.format(path)):
        mics.open_weights(path)


def test_a_dtype_that_no_weight_has_is_told_before_any_tensor_is_read(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.complex64)}, path)
    with pytest.raises(ConfigError, match=rf"b is torch.complex64 in {path}, expected one of .*: convert the file"):
        mics.open_weights(path)


def test_a_name_in_two_files_of_an_index_is_told(tmp_path: Path) -> None:
    for file, names in {"1.safetensors": "ab", "2.safetensors": "b"}.items():
        save_file({name: torch.ones(2) for name in names}, tmp_path / file)
    places = {"a": "1.safetensors", "b": "2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ConfigError, match=r"b is in .*1\.safetensors and in .*2\.safetensors, expected it once"):
        mics.open_weights(tmp_path)


@pytest.mark.parametrize("name", ["state.pt", "state.bin"])
@pytest.mark.parametrize("change", [shorter, empty])
def test_a_damaged_state_dict_is_named(tmp_path: Path, name: str, change: Callable[[Path], None]) -> None:
    work.write(tmp_path)
    change(tmp_path / name)
    with pytest.raises(ConfigError, match=rf"{name} cannot be read \(.*\), expected a state dict") as raised:
        mics.open_weights(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path) -> None:
    torch.save({"idle": Path("x")}, tmp_path / "state.pt")
    with pytest.raises(ConfigError, match=r"state\.pt cannot be read"):
        mics.open_weights(tmp_path / "state.pt")
    torch.save([1], tmp_path / "state.pt")
    with pytest.raises(ConfigError, match=r"state\.pt holds a list, expected a state dict"):
        mics.open_weights(tmp_path / "state.pt")


def test_an_index_that_its_files_contradict(tmp_path: Path) -> None:
    work.write(tmp_path)
    folder = tmp_path / "folder"
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    changes = {
        "idle is not where": {**places, "idle": places["scale"]},
        "more is not where": {**places, "more": places["idle"]},
        "scale is not where": {name: file for name, file in places.items() if name != "scale"},
        "part-9.safetensors is not there": {**places, "idle": "part-9.safetensors"},
        "is damaged, expected a weight_map": {**places, "idle": "../one.safetensors"},
    }
    for sentence, changed in changes.items():
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(ConfigError, match=sentence):
            mics.open_weights(folder)
    index.write_text("[]")
    with pytest.raises(ConfigError, match=r"index\.json is damaged"):
        mics.open_weights(index)
    index.unlink()
    with pytest.raises(ConfigError, match="folder has neither, expected"):
        mics.open_weights(folder)
    (tmp_path / "one.txt").touch()
    with pytest.raises(ConfigError, match=r"got .*one.txt, expected a .safetensors"):
        mics.open_weights(tmp_path / "one.txt")


def test_a_folder_of_both_is_not_guessed_at(tmp_path: Path) -> None:
    work.write(tmp_path)
    (tmp_path / "one.safetensors").rename(tmp_path / "folder" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"has model\.safetensors and model\.safetensors\.index\.json, expected"):
        mics.open_weights(tmp_path / "folder")
