from pathlib import Path

import pytest
import safetensors.torch
import torch

from torchdnr.features.layers import LayerFeatures
from torchdnr.files import CheckpointError, DamagedFileError, load_tensors
from torchdnr.models import (
    CIFAR10_LAYERS,
    MNIST_LAYERS,
    CIFAR10Net,
    MNISTNet,
    load_network,
    save_network,
)
from torchdnr.models.training import (
    CIFAR10_TRAINING,
    KIND,
    MNIST_TRAINING,
    TrainingSettings,
    train_network,
)


@pytest.fixture(autouse=True)
def _one_thread():
    """For networks this small, threads cost far more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SHORT = TrainingSettings(epochs=4, lr=0.05, momentum=0.9, batch_size=16)


def test_mnist_net_is_table_one():
    net = MNISTNet(num_classes=7)
    features = LayerFeatures(net, [*MNIST_LAYERS, "pool1", "pool2"])(torch.rand(2, 1, 28, 28))
    # Unpadded: 28 - 2 - 2 = 24, pooled 12; 12 - 2 - 2 = 8, pooled 4.
    assert [z.shape[1] for z in features.values()] == [200, 200, 7, 32 * 12 * 12, 64 * 4 * 4]
    assert features["relu_fc1"].min() >= 0
    # 9 c_in c_out + c_out per convolution, d_in d_out + d_out per fully connected layer.
    convolutions = (9 + 1) * 32 + (288 + 1) * 32 + (288 + 1) * 64 + (576 + 1) * 64
    connected = 1025 * 200 + 201 * 200 + 201 * 7
    assert sum(p.numel() for p in net.parameters()) == convolutions + connected


def test_cifar_net_is_table_two():
    net = CIFAR10Net()
    features = LayerFeatures(net, [*CIFAR10_LAYERS, "logits"])(torch.rand(2, 3, 32, 32))
    assert [z.shape[1] for z in features.values()] == [4096, 2048, 512, 10]
    assert [m.p for m in net if isinstance(m, torch.nn.Dropout)] == [0.1, 0.2, 0.3, 0.4]
    assert [m.out_channels for m in net if isinstance(m, torch.nn.Conv2d)] == [
        *(64, 64, 128, 128, 256, 256, 512)
    ]
    ends = net.normalise(torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2).expand(1, 3, 1, 2))
    assert torch.equal(ends[0, 0, 0], torch.tensor([-1.0, 1.0]))


def test_published_settings():
    assert MNIST_TRAINING == TrainingSettings(50, 0.1, 0.9, 128)
    assert CIFAR10_TRAINING == TrainingSettings(75, 0.01, 0.9, 100)
    with pytest.raises(ValueError, match="expected lr > 0"):
        TrainingSettings(1, 0.0, 0.9, 128)


def small_net():
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(16, 32),
        torch.nn.BatchNorm1d(32),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(32, 3),
    )


def small_data():
    labels = torch.arange(60) % 3
    return torch.rand(60, 1, 4, 4) * 0.3 + labels.reshape(-1, 1, 1, 1) / 3, labels


def train(net, checkpoint=None, settings=SHORT, seed=0):
    images, labels = small_data_fixed()
    return train_network(
        net, images, labels, settings, seed=seed, checkpoint=checkpoint, progress=False
    )


def small_data_fixed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return small_data()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def test_training_learns_and_leaves_the_global_generator_alone():
    images, labels = small_data_fixed()
    net = small_net()
    before = torch.get_rng_state()
    train(net, settings=TrainingSettings(epochs=20, lr=0.05, momentum=0.9, batch_size=16))
    assert torch.equal(torch.get_rng_state(), before)
    assert not net.training
    assert (net(images).argmax(1) == labels).float().mean() > 0.9


def test_first_steps_are_those_of_sgd_with_warm_up():
    images, labels = small_data_fixed()
    settings = TrainingSettings(1, lr=0.1, momentum=0.9, batch_size=60, warmup_epochs=2)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    weight = net[1].weight.detach().clone().requires_grad_()
    bias = net[1].bias.detach().clone()
    loss = torch.nn.functional.cross_entropy(images.flatten(1) @ weight.t() + bias, labels)
    (gradient,) = torch.autograd.grad(loss, weight)
    train_network(net, images, labels, settings, progress=False)
    torch.testing.assert_close(
        net[1].weight, weight - 0.05 * gradient
    )  # half of lr in epoch 1 of 2


def test_seed_decides():
    first, again, other = (train(small_net(), seed=seed).state_dict() for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("stop_at", [2, 6, 13])  # forward passes; an epoch has four
def test_stopped_run_ends_as_an_unstopped_one(tmp_path, stop_at):
    path = tmp_path / "run" / "checkpoint"
    net = small_net()
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt

    net.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        train(net, path)
    assert path.exists() == (stop_at > 4)
    torch.rand(7)  # whatever else draws numbers has no part in it
    resumed = train(small_net(), path).state_dict()
    assert same(resumed, train(small_net()).state_dict())


def test_stop_during_the_write_keeps_the_last_epoch(tmp_path, monkeypatch):
    path, whole, writes = tmp_path / "checkpoint", safetensors.torch.serialize_file, []

    def die_at_the_third(tensors, temporary, **options):
        writes.append(temporary)
        if len(writes) < 3:
            return whole(tensors, temporary, **options)
        Path(temporary).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.serialize_file", die_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            train(small_net(), path)
    assert load_tensors(path, kind=KIND)[1]["epochs_done"] == 2
    assert same(train(small_net(), path).state_dict(), train(small_net()).state_dict())


def test_finished_run_is_not_repeated(tmp_path):
    path = tmp_path / "checkpoint"
    first = train(small_net(), path).state_dict()
    net = small_net()
    net.register_forward_pre_hook(lambda *_: pytest.fail("trained again"))
    assert same(first, train(net, path).state_dict())


def test_damaged_checkpoint_is_moved_aside_with_a_warning(tmp_path):
    path = tmp_path / "checkpoint"
    expected = train(small_net(), path).state_dict()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="training starts again"):
        again = train(small_net(), path)
    assert same(expected, again.state_dict())
    assert (tmp_path / "checkpoint.damaged").exists()


def test_checkpoint_of_another_run_is_refused_and_kept(tmp_path):
    path = tmp_path / "checkpoint"
    train(small_net(), path)
    contents = path.read_bytes()
    with pytest.raises(CheckpointError, match="with other seed; repeat that run"):
        train(small_net(), path, seed=1)
    net = small_net()
    torch.nn.init.zeros_(net[1].bias)
    with pytest.raises(CheckpointError, match="with other starting weights"):
        train(net, path)
    other = TrainingSettings(5, 0.05, 0.9, 16)
    with pytest.raises(CheckpointError, match="with other settings"):
        train(small_net(), path, settings=other)
    assert path.read_bytes() == contents


def test_loss_that_is_not_finite_is_an_error():
    images, labels = small_data_fixed()
    settings = TrainingSettings(3, lr=1e38, momentum=0.9, batch_size=16)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train_network(small_net(), images, labels, settings, progress=False)


def test_data_that_does_not_fit():
    images, labels = small_data_fixed()
    with pytest.raises(ValueError, match=r"labels must be int64 \(60,\)"):
        train_network(small_net(), images, labels[:-1], SHORT)
    with pytest.raises(ValueError, match="scale uint8 images"):
        train_network(small_net(), images.to(torch.uint8), labels, SHORT)


def test_network_file_round_trip(tmp_path):
    net, other = MNISTNet(), MNISTNet()
    save_network(net, tmp_path / "net")
    assert load_network(other, tmp_path / "net") is other
    assert same(net.state_dict(), other.state_dict())
    assert other.training


def test_network_file_errors(tmp_path):
    path = tmp_path / "net"
    with pytest.raises(FileNotFoundError, match="no network file"):
        load_network(small_net(), path)
    save_network(MNISTNet(num_classes=3), path)
    with pytest.raises(CheckpointError, match=r"MNISTNet.*2 tensors differ.*\(10, 200\)"):
        load_network(MNISTNet(), path)
    path.write_bytes(b"not this")
    with pytest.raises(DamagedFileError, match="damaged"):
        load_network(MNISTNet(), path)
    with pytest.raises(NotADirectoryError, match="writable folder"):
        save_network(small_net(), path / "below" / "a")
