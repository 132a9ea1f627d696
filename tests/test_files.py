import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_examples import up_to
from safetensors.torch import save_file

from torchdnr.files import (
    METADATA_KEY,
    CheckpointError,
    DamagedFileError,
    atomic_path,
    atomic_write_bytes,
    digest,
    load_tensors,
    save_tensors,
)

METADATA = {"theta": -0.5, "layers": ["fc1", "fc2"], "nested": {"none": None}}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "deep" / "file.safetensors"
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "view": base.t(),
        "shared": base[1:],
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 5),
    }
    save_tensors(path, tensors, METADATA, kind="svm")
    return path, tensors


def test_what_is_saved_comes_back(saved):
    path, tensors = saved
    loaded, metadata = load_tensors(path, kind="svm")
    assert metadata == METADATA
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].is_contiguous()
        assert torch.equal(loaded[name], tensor)
    assert os.listdir(path.parent) == [path.name]


def test_loaded_tensors_are_writable_and_apart_from_the_file(saved):
    path, tensors = saved
    load_tensors(path, kind="svm")[0]["shared"].zero_()
    assert torch.equal(load_tensors(path, kind="svm")[0]["shared"], tensors["shared"])


def test_file_mode_follows_the_umask(saved, tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    assert saved[0].stat().st_mode == plain.stat().st_mode


@up_to(30)
@given(data=st.data())
def test_no_changed_or_missing_byte_goes_unnoticed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damage") / "file"
    save_tensors(path, {"z": torch.arange(20.0)}, METADATA, kind="svm")
    contents = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(contents) - 1))
    if data.draw(st.booleans()):
        contents = contents[:place]
    else:
        contents[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(contents)
    try:
        tensors, metadata = load_tensors(path, kind="svm")
    except CheckpointError:
        return
    # What is not noticed changed nothing: whitespace between the entries of the header.
    assert torch.equal(tensors["z"], torch.arange(20.0))
    assert metadata == METADATA


def test_damaged_file_says_what_to_do(saved):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DamagedFileError, match=r"expected a svm file.*damaged.*delete it"):
        load_tensors(path, kind="svm")


def test_flipped_bit_in_the_values_is_found(saved):
    path, _ = saved
    contents = bytearray(path.read_bytes())
    contents[-5] ^= 1
    path.write_bytes(contents)
    with pytest.raises(DamagedFileError, match="checksum differs"):
        load_tensors(path, kind="svm")


def test_another_kind_is_refused(saved):
    with pytest.raises(CheckpointError, match="expected a network file, got a svm file"):
        load_tensors(saved[0], kind="network")


def test_foreign_safetensors_is_refused(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "a")
    with pytest.raises(CheckpointError, match="without its header"):
        load_tensors(tmp_path / "a", kind="svm")
    save_file({"a": torch.zeros(2)}, tmp_path / "a", metadata={METADATA_KEY: json.dumps([1])})
    with pytest.raises(CheckpointError, match="without its header"):
        load_tensors(tmp_path / "a", kind="svm")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no svm file here"):
        load_tensors(tmp_path / "none", kind="svm")


def test_metadata_must_be_json(tmp_path):
    with pytest.raises(TypeError, match="metadata must be what JSON can hold"):
        save_tensors(tmp_path / "a", {}, {"x": torch.zeros(1)}, kind="svm")
    assert not list(tmp_path.iterdir())


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="choose a writable folder"):
        save_tensors(tmp_path / "file" / "deep" / "a", {}, {}, kind="svm")
    with pytest.raises(IsADirectoryError, match="choose a writable folder"):
        atomic_write_bytes(tmp_path, b"")


def test_interrupted_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "a"
    atomic_write_bytes(path, b"old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_bytes(b"half of the n")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


def test_digest_sees_name_dtype_shape_and_value_not_layout_or_order():
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(2)
    reference = digest({"a": a, "b": b})
    assert digest({"b": b, "a": a.t().contiguous().t()}) == reference
    changed = [{"a": a.double()}, {"a": a.t()}, {"a": a + 1}, {"c": a}]
    assert len({reference, *(digest({**change, "b": b}) for change in changed)}) == 5
