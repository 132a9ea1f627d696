"""Features on disk: the same as in memory, resumable, tied to what they were taken from."""

import json
import subprocess
import sys
import tempfile
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchdnr import DNR
from torchdnr.features.extraction import extract
from torchdnr.features.layers import LayerFeatures
from torchdnr.features.storage import LABELS, RECORD
from torchdnr.files import CheckpointError, load_tensors

LAYERS = ["0", "2/x", "3"]


class Counted(nn.Module):
    """A network that counts its forward passes, and fails at one of them."""

    def __init__(self, seed=0, fail_at=None):
        super().__init__()
        torch.manual_seed(seed)
        self.add_module("0", nn.Linear(6, 5))
        self.add_module("2/x", nn.Linear(5, 4))
        self.add_module("3", nn.Identity())
        self.calls, self.fail_at = 0, fail_at

    def forward(self, inputs):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        z = self.get_submodule("2/x")(self.get_submodule("0")(inputs).tanh())
        self.get_submodule("3")(z.to(torch.bfloat16))
        return z


def images(n=10, seed=1):
    return torch.rand(n, 6, generator=torch.Generator().manual_seed(seed))


def loader(n=10, shuffle=False, extra=0):
    x = images(n + extra)
    return DataLoader(TensorDataset(x, torch.arange(n + extra) % 3), 3, shuffle=shuffle)


def features_of(net):
    return LayerFeatures(net, LAYERS)


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        assert torch.equal(found[name], values)


def stop_at(k, folder, data, **options):
    """Begin an extraction that is stopped in batch k."""
    net = Counted(fail_at=k)
    with pytest.raises(KeyboardInterrupt):
        extract(features_of(net), data, folder=folder, **options)


@pytest.mark.parametrize("kind", ["tensor", "loader", "iterable"])
@pytest.mark.parametrize("limit", [None, 0, 100, 10_000])
def test_on_disk_as_in_memory(tmp_path, kind, limit):
    def data():
        return {
            "tensor": lambda: images(),
            "loader": lambda: loader(),
            "iterable": lambda: iter(images().split(4)),
        }[kind]()

    features = features_of(Counted())
    expected, labels = extract(features, data(), batch_size=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        limited, same_labels = extract(features, data(), batch_size=4, memory_limit=limit)
    assert_same(limited, expected)
    assert [str(w.message)[:12] for w in caught] == ["the features"] * (limit in (0, 100))
    kept, kept_labels = extract(features, data(), batch_size=4, folder=tmp_path / "new" / "one")
    assert_same(kept, expected)
    for found in (same_labels, kept_labels):
        assert found is labels is None or torch.equal(found, labels)
    kept["0"].zero_()  # changes the tensor alone
    assert_same(
        extract(features, data(), batch_size=4, folder=tmp_path / "new" / "one")[0], expected
    )


def test_a_temporary_folder_is_gone_while_its_features_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.warns(UserWarning, match=str(tmp_path)):
        found = extract(features_of(Counted()), images(), memory_limit=100)[0]
    assert not list(tmp_path.iterdir())
    assert_same(found, extract(features_of(Counted()), images())[0])
    with pytest.warns(UserWarning), pytest.raises(KeyboardInterrupt):
        extract(features_of(Counted(fail_at=2)), loader(), memory_limit=100)
    assert not list(tmp_path.iterdir())


def test_the_files_are_safetensors(tmp_path):
    expected, labels = extract(features_of(Counted()), loader())
    extract(features_of(Counted()), loader(), folder=tmp_path)
    files = sorted(tmp_path.glob("[0-9]*.safetensors"))
    assert [file.name[:2] for file in files] == ["0-", "1-", "2-"]
    for file, name in zip(files, LAYERS, strict=True):
        with safe_open(file, "pt") as opened:
            assert list(opened.keys()) == [name]
            assert torch.equal(opened.get_tensor(name), expected[name])
    assert torch.equal(load_tensors(tmp_path / LABELS, "labels")[0]["labels"], labels)


@pytest.mark.parametrize("tensor", [True, False])
def test_a_stopped_extraction_goes_on_behind_the_last_whole_batch(tmp_path, tensor):
    data, options = (images(), {"batch_size": 3}) if tensor else (loader(), {})
    expected, labels = extract(features_of(Counted()), data, **options)
    stop_at(3, tmp_path, data, **options)
    for file in tmp_path.glob("[0-9]*.safetensors"):  # a part does not pass for the whole
        with pytest.raises(SafetensorError), safe_open(file, "pt"):
            pass
    net = Counted()
    found, found_labels = extract(features_of(net), data, folder=tmp_path, **options)
    assert net.calls == 2  # of four batches
    assert_same(found, expected)
    assert tensor or torch.equal(found_labels, labels)
    net = Counted(fail_at=1)  # complete: no pass is needed
    assert_same(extract(features_of(net), data, folder=tmp_path, **options)[0], expected)


def test_what_was_written_behind_the_record_is_written_again(tmp_path):
    stop_at(3, tmp_path, loader())
    for file in tmp_path.glob("[0-9]*.safetensors"):  # as when killed between rows and record
        with file.open("ab") as opened:
            opened.write(b"half a row")
    found = extract(features_of(Counted()), loader(), folder=tmp_path)[0]
    assert_same(found, extract(features_of(Counted()), loader())[0])


@pytest.mark.parametrize("stopped", [True, False])
def test_features_of_something_else_are_refused_and_left_alone(tmp_path, stopped):
    if stopped:
        stop_at(3, tmp_path, images(), batch_size=3)
    else:
        extract(features_of(Counted()), images(), batch_size=3, folder=tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}

    def refused(match, features=None, data=None, batch_size=3):
        with pytest.raises(CheckpointError, match=match):
            features = features_of(Counted()) if features is None else features
            data = images() if data is None else data
            extract(features, data, batch_size=batch_size, folder=tmp_path)
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before

    refused("one with other weights", features_of(Counted(seed=1)))
    refused("other modules, options", LayerFeatures(Counted(), LAYERS[:2]))
    deeper = Counted()
    deeper.add_module("more", nn.ReLU())
    refused("other modules", features_of(deeper))
    refused("other batch size", batch_size=4)
    refused("other number of images", data=images(11))
    refused("others in batch 1;", data=images(seed=2))
    changed = images()
    changed[4, 2] = 0.5
    refused("others in batch 2;", data=changed)


def test_loaders_that_changed_are_refused(tmp_path):
    extract(features_of(Counted()), loader(), folder=tmp_path)
    torch.manual_seed(0)
    with pytest.raises(CheckpointError, match="must neither shuffle nor augment"):
        extract(features_of(Counted()), loader(shuffle=True), folder=tmp_path)
    with pytest.raises(CheckpointError, match="expected 4 batches, got 3"):
        extract(features_of(Counted()), loader(9), folder=tmp_path)
    with pytest.raises(CheckpointError, match="expected 4 batches, got more"):
        extract(features_of(Counted()), [*loader(), *loader()], folder=tmp_path)


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match=r"got model.safetensors and no features.json"):
        extract(features_of(Counted()), images(), folder=tmp_path)
    (tmp_path / RECORD).write_text(json.dumps({"kind": "map", "type": "FeatureCollection"}))
    with pytest.raises(CheckpointError, match="expected the record of a feature store"):
        extract(features_of(Counted()), images(), folder=tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("damage", "stopped"),
    [
        *[(damage, stopped) for damage in ("short", "gone", "record") for stopped in (True, False)],
        ("header", False),  # before the end there is none
    ],
)
def test_damaged_files_are_made_again_with_a_warning(tmp_path, damage, stopped):
    if stopped:
        stop_at(3, tmp_path, loader())
    else:
        extract(features_of(Counted()), loader(), folder=tmp_path)
    file = next(tmp_path.glob("1-*.safetensors"))
    if damage == "short":
        file.write_bytes(file.read_bytes()[:-50])
    elif damage == "gone":
        file.unlink()
    elif damage == "record":
        (tmp_path / RECORD).write_text('{"kind": "feature st')
    else:
        file.write_bytes(b"\0" * 8 + file.read_bytes()[8:])
    net = Counted()
    with pytest.warns(UserWarning, match="extracted again from the start"):
        found = extract(features_of(net), loader(), folder=tmp_path)[0]
    assert net.calls == 4
    assert_same(found, extract(features_of(Counted()), loader())[0])


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("no folder")
    net = Counted()
    with pytest.raises(OSError, match="cannot write here; choose a writable folder"):
        extract(features_of(net), images(), folder=tmp_path / "file" / "store")
    assert net.calls == 0


def test_a_disk_without_room_is_seen_at_the_first_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=400))
    net = Counted()
    with pytest.raises(OSError, match=r"the features take .* choose another folder"):
        extract(features_of(net), images(100), batch_size=3, folder=tmp_path)
    assert net.calls == 1


FULL = """
import resource, sys, torch
from torch import nn
from torchdnr.features.extraction import extract
from torchdnr.features.layers import LayerFeatures
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
net = nn.Sequential(nn.Linear(6, 100, bias=False))
nn.init.ones_(net[0].weight)
data = iter(torch.ones(100, 6).split(10))
try:
    extract(LayerFeatures(net, ["0"]), data, folder=sys.argv[1])
except OSError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
calls = []
net.register_forward_hook(lambda *_: calls.append(1))
found = extract(LayerFeatures(net, ["0"]), torch.ones(100, 6).split(10), folder=sys.argv[1])[0]
print(len(calls), bool((found["0"] == 6).all()), tuple(found["0"].shape))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the size of files")
def test_a_full_disk_is_a_clear_error_and_loses_no_batch(tmp_path):
    lines = run_script(FULL, tmp_path).splitlines()
    assert "cannot write the features of layer '0' here after 30 images" in lines[0]
    assert lines[1] == "7 True (100, 100)"


def run_script(code, *arguments):
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_layers_that_change_their_size_are_refused(tmp_path):
    features = LayerFeatures(nn.Sequential(nn.Flatten()), ["0"])
    batches = [torch.rand(2, 3), torch.rand(2, 4)]
    for options in ({}, {"folder": tmp_path}):
        with pytest.raises(ValueError, match="same number of features in every batch, 3 of"):
            extract(features, batches, **options)


def test_a_fit_on_mapped_features_is_the_fit_in_memory(tmp_path):
    x = images(60)
    y = (3 * x[:, 0]).long()
    options = {"hyperparameters": {k: (1.0, 0.5) for k in ("0", "2/x", "combiner")}}
    expected = DNR(Counted(), LAYERS[:2], **options).fit(x, y)
    net = Counted()
    kept = DNR(net, LAYERS[:2], **options).fit(x, y, features_folder=tmp_path)
    assert net.calls == 3  # the first two try the layers on two numbers of images
    again = DNR(net, LAYERS[:2], **options).fit(x, y, features_folder=tmp_path)
    assert net.calls == 5
    for model in (kept, again):
        assert torch.equal(model.scores(x), expected.scores(x))


def test_features_of_half_precision_are_stored_as_svms_need_them(tmp_path):
    features = features_of(Counted())
    narrow = extract(features, images())[0]
    assert narrow["3"].dtype == torch.bfloat16
    for folder in (None, tmp_path):
        wide = extract(features, images(), folder=folder, widen=True)[0]
        assert_same(wide, {name: values.float() for name, values in narrow.items()})
    with pytest.raises(CheckpointError, match="one with other widened"):
        extract(features, images(), folder=tmp_path)
