"""Tests of networks in channels_last: the same scores, kept so inside, and no needless copies."""

import copy
import json
import time
from collections import OrderedDict
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from small_models import fitted, make_images, options
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchdnr import DNR
from torchdnr.cli import predict
from torchdnr.cli.classifiers import make_classifiers
from torchdnr.cli.console import Console
from torchdnr.cli.options import train_parser
from torchdnr.cli.predict import predict_parser
from torchdnr.cli.run_folder import prepare
from torchdnr.features.layers import LayerFeatures
from torchdnr.models import MNISTNet, load_network, save_network
from torchdnr.models.backbones import build_backbone

CHANNELS_LAST = torch.channels_last
LAYERS = {"relu1": "flatten", "relu2": ("grid", 2), "conv3": "avg", "relu3": ("project", 40)}


def network():
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 8, 3),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(8, 16, 3),
            relu2=nn.ReLU(inplace=True),
            conv3=nn.Conv2d(16, 24, 3),
            relu3=nn.ReLU(inplace=True),
            flatten=nn.Flatten(),
            logits=nn.Linear(24 * 36, 3),
        )
    ).eval()


@pytest.fixture(scope="module")
def images():
    return make_images(30, 3, 12)


@pytest.fixture(scope="module")
def model(images):
    torch.manual_seed(0)
    return fitted(DNR(network(), LAYERS, **options(*LAYERS, "combiner")), images)


def in_channels_last(model):
    twin = copy.deepcopy(model)
    assert twin.net.to(memory_format=CHANNELS_LAST) is twin.net
    return twin


def scores_and_gradient(model, images):
    leaf = images.clone().requires_grad_()
    output = model(leaf)
    weight = torch.linspace(1, 2, output.shape[1])
    return output.detach(), torch.autograd.grad((output * weight).sum(), leaf)[0]


def assert_same(got, expected):
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-4 * e.abs().max().item())


@pytest.mark.parametrize("image_format", [torch.contiguous_format, CHANNELS_LAST])
def test_scores_and_gradients_are_the_same(model, images, image_format):
    twin, few = in_channels_last(model), images[:8]
    expected = scores_and_gradient(model, few)
    assert expected[1].abs().max() > 0
    assert_same(scores_and_gradient(twin, few.contiguous(memory_format=image_format)), expected)
    assert torch.equal(twin.predict(images), model.predict(images))


def test_a_backbone_of_torchvision_is_the_same_too():
    layers = {"network.features.8": "avg", "network.features.10": ("grid", 2)}
    images = make_images(12, 3, 48)
    net = build_backbone("squeezenet1_1", 3).eval()
    model = fitted(DNR(net, layers, **options(*layers, "combiner")), images)
    expected = scores_and_gradient(model, images[:4])
    assert_same(scores_and_gradient(in_channels_last(model), images[:4]), expected)


def test_the_network_stays_as_it_is_and_so_do_its_maps(model, images):
    twin, seen = in_channels_last(model), {}
    convolutions = {n: m for n, m in twin.net.named_modules() if isinstance(m, nn.Conv2d)}
    for name, module in twin.net.named_modules():
        if isinstance(module, nn.Conv2d | nn.ReLU):
            module.register_forward_hook(lambda *given, name=name: seen.update({name: given[2]}))
    twin.predict(images)
    scores_and_gradient(twin, images)
    assert len(seen) == 6
    for tensor in (*seen.values(), *(m.weight for m in convolutions.values())):
        assert tensor.is_contiguous(memory_format=CHANNELS_LAST) and not tensor.is_contiguous()


class Copies(TorchDispatchMode):
    """Count what is written anew of at least some values, by the copying operations."""

    def __init__(self, values):
        super().__init__()
        self.values, self.seen = values, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        copying = name in ("clone", "copy_", "_to_copy", "contiguous", "cat", "index_select")
        if copying and result.numel() >= self.values:
            self.seen.append(name)
        return result


@pytest.mark.parametrize("layer", ["conv1", "logits"])
@pytest.mark.parametrize("reduction", ["flatten", "avg", ("grid", 2), ("project", 20)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST])
def test_a_layer_is_copied_once_whatever_its_reduction(layer, reduction, memory_format):
    net = nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, 8, 3), other=nn.Flatten()))
    net.add_module("logits", nn.Linear(8 * 100, 30))
    net = net.to(memory_format=memory_format)
    features = LayerFeatures(net, {layer: reduction})
    images = torch.rand(5, 3, 12, 12).to(memory_format=memory_format)
    features(images)  # makes the reduction ready
    with torch.no_grad():
        size = net.conv1(images).numel() if layer == "conv1" else 5 * 30
        with Copies(size) as plain:
            net(images)
        with Copies(size) as counted:
            features(images)
    assert len(counted.seen) - len(plain.seen) == 1
    expected = LayerFeatures(copy.deepcopy(net).to(memory_format=torch.contiguous_format), [layer])
    if reduction == "flatten":
        torch.testing.assert_close(features(images), expected(images))


def test_a_map_is_averaged_in_the_format_that_it_has(model, images):
    outputs = in_channels_last(model).features.outputs(images[:4])
    formats = {name: output.is_contiguous() for name, output in outputs.items()}
    # What is flattened lies in the order of its features; the others are as the network made them.
    assert formats == {"relu1": True, "relu2": False, "conv3": False, "relu3": True}
    assert all(
        outputs[name].is_contiguous(memory_format=CHANNELS_LAST) for name in ("relu2", "conv3")
    )


def test_files_do_not_depend_on_the_format(model, images, tmp_path):
    twin = in_channels_last(model)
    save_network(twin.net, tmp_path / "network.safetensors")
    twin.save(tmp_path / "dnr.safetensors")
    net = network()
    load_network(net, tmp_path / "network.safetensors")
    assert net.conv2.weight.is_contiguous()
    loaded = DNR.load(tmp_path / "dnr.safetensors", net)
    assert_same([loaded(images)], [model(images)])
    again = DNR.load(
        tmp_path / "dnr.safetensors", network().to(memory_format=CHANNELS_LAST), strict=False
    )
    load_network(again.net, tmp_path / "network.safetensors")
    assert again.net.conv2.weight.is_contiguous(memory_format=CHANNELS_LAST)
    assert_same([again(images)], [model(images)])


def test_the_option_of_the_scripts(tmp_path):
    source = tmp_path / "toy.npz"
    write_images(source)
    asked = ["--dataset", f"npz:{source}", "--run", str(tmp_path / "run"), "--quiet"]
    for extra, wanted in ((["--channels-last"], True), ([], False)):
        job = prepare(train_parser().parse_args(asked + extra), Console(quiet=True))
        weight = job.build_network().conv2.weight
        assert weight.is_contiguous(memory_format=CHANNELS_LAST) == wanted
        assert "channels_last" not in job.settings.to_json()
    for word, wanted in (("--channels-last", True), ("--no-channels-last", False)):
        assert predict_parser().parse_args(["x.png", "--run", "run", word]).channels_last is wanted


class Slow(MNISTNet):
    """The network of Table I, slow in one of the memory formats."""

    slow_format = CHANNELS_LAST
    trained: ClassVar[set[bool]] = set()  # whether in channels_last

    def forward(self, inputs):
        if self.training:
            self.trained.add(is_last(self))
        if self.conv2.weight.is_contiguous(memory_format=self.slow_format):
            time.sleep(0.05)
        return super().forward(inputs)


class SlowInTheUsualFormat(Slow):
    slow_format = torch.contiguous_format


def formats_in(run, build, *extra):
    """Make the classifiers of a run folder; whether the network is in channels_last.

    In the training, and in DNN, NR and DNR.
    """
    Slow.trained.clear()
    source = run.parent / "toy.npz"
    write_images(source)
    asked = ["--dataset", f"npz:{source}", "--run", str(run), "--quiet", "--epochs", "1"]
    asked += ["--C-grid", "1", "--gamma-grid", "1", "--layers", "relu_fc1", *extra]
    job = prepare(train_parser().parse_args(asked), Console(quiet=True))
    job = replace(job, preset=replace(job.preset, build=lambda: build(num_classes=2)))
    dnn, nr, dnr = make_classifiers(job, Console(quiet=True)).values()
    return set(Slow.trained), is_last(dnn), is_last(nr.net), is_last(dnr.net)


def is_last(net):
    return net.conv2.weight.is_contiguous(memory_format=CHANNELS_LAST)


def remembered(run):
    return json.loads((run / "settings.json").read_text()).get("channels_last")


def test_a_run_takes_the_faster_format_and_stays_with_it(tmp_path):
    run = tmp_path / "run"
    # The weights do not depend on what was faster: the network is trained in the usual format.
    assert formats_in(run, SlowInTheUsualFormat) == ({False}, True, True, True)
    assert remembered(run) is True
    assert formats_in(run, Slow) == (set(), True, True, True)  # it is there, and not timed again
    assert predict.load_classifier(run, "DNR", torch.device("cpu")).net.conv2.weight.is_contiguous(
        memory_format=CHANNELS_LAST
    )
    assert formats_in(run, Slow, "--no-channels-last") == (set(), False, False, False)
    assert remembered(run) is False
    assert formats_in(run, SlowInTheUsualFormat) == (set(), False, False, False)


def test_a_run_stays_in_the_usual_format_where_that_is_faster(tmp_path):
    assert formats_in(tmp_path / "run", Slow) == ({False}, False, False, False)
    assert remembered(tmp_path / "run") is False


def test_a_format_that_is_asked_for_is_that_of_the_training_too(tmp_path):
    assert formats_in(tmp_path / "run", Slow, "--channels-last") == ({True}, True, True, True)
    assert remembered(tmp_path / "run") is True


def write_images(path):
    import numpy as np

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (120, 28, 28), dtype=np.uint8)
    labels = np.arange(120) % 2
    np.savez(path, x_train=images, y_train=labels, x_test=images[:10], y_test=labels[:10])
