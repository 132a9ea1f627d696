"""Tests of saving classifiers of any network: whatever it holds, in a wrapper or not."""

import copy
import threading
import warnings

import pytest
import torch
from small_models import LAYERS, fitted, make_images, options, small_network
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from torchdnr import DNR, NR
from torchdnr.files import CheckpointError, digest
from torchdnr.models import TrainingSettings, train_network


@pytest.fixture
def images():
    torch.manual_seed(0)
    return make_images(30)


class Labelled(nn.Module):
    """Any layer, with state that is no tensor."""

    def __init__(self, layer, state):
        super().__init__()
        self.layer, self.state = layer, state

    def forward(self, x):
        return self.layer(x)

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


class Version:
    def __init__(self, number):
        self.number = number


def network_with(state):
    net = small_network()
    net.logits = Labelled(net.logits, state)
    return net


def quantised(seed):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(
            small_network().eval(), {nn.Linear}, dtype=torch.qint8
        )


def assert_saved_for(model, images, same, other, path):
    """Save, load onto the same network, and be refused by the other."""
    model.save(path)
    loaded = type(model).load(path, same)
    assert torch.equal(loaded(images), model(images))
    with pytest.raises(CheckpointError, match="other weights"):
        type(model).load(path, other)
    assert type(model).load(path, other, strict=False).layers == model.layers


def test_a_quantised_network_is_saved_and_known_again(images, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = fitted(DNR(quantised(0), LAYERS, **options(*LAYERS, "combiner")), images)
    assert_saved_for(model, images, quantised(0), quantised(1), tmp_path / "dnr")


STATES = [
    ({"version": 1, "names": ("a", "b")}, {"version": 2, "names": ("a", "b")}),
    ({"table": torch.ones(2)}, {"table": torch.zeros(2)}),
    (Version(1), Version(2)),
    ([1, 2], (1, 2, 3)),
    ({1, 2}, {1, 3}),
    (torch.float32, torch.float64),
    (b"1", b"2"),
    (torch.ones(2).numpy(), torch.zeros(2).numpy()),
    tuple(torch.quantize_per_tensor(torch.ones(3), s, 0, torch.qint8) for s in (0.1, 0.2)),
    (torch.eye(3).to_sparse(), (2 * torch.eye(3)).to_sparse()),
    (TwoTensor(torch.ones(2), torch.ones(2)), TwoTensor(torch.ones(2), torch.zeros(2))),
]


@pytest.mark.parametrize(("state", "other"), STATES, ids=lambda s: type(s).__name__)
def test_extra_state_belongs_to_the_network(images, tmp_path, state, other):
    torch.manual_seed(1)
    net = network_with(state)
    different = copy.deepcopy(net)
    different.logits.state = other
    model = fitted(NR(net, "logits", **options("logits")), images)
    assert_saved_for(model, images, copy.deepcopy(net), different, tmp_path / "dnr")


class Unwilling:
    def __getstate__(self):
        raise RuntimeError("no state")


def holds_itself():
    state = {}
    state["itself"] = state
    return state


@pytest.mark.parametrize("state", [Unwilling(), holds_itself()], ids=["unwilling", "itself"])
def test_state_without_a_fingerprint_is_warned_of_and_no_fit_is_lost(images, tmp_path, state):
    net = network_with(state)
    with pytest.warns(UserWarning, match="fit goes on, but save will raise this"):
        model = fitted(NR(net, "conv", **options("conv")), images)
    with pytest.raises(TypeError, match="fingerprint"):
        model.save(tmp_path / "nr")


def test_tensors_of_odd_kinds_have_fingerprints():
    values = torch.tensor([1 + 2j, 3 - 4j])
    assert digest({"a": values.conj()}) == digest({"a": values.conj().resolve_conj()})
    assert digest({"a": values.conj()}) != digest({"a": values})
    with pytest.raises(TypeError, match="without values"):
        digest({"a": torch.empty(2, device="meta")})


def test_the_fingerprint_of_a_set_is_that_of_its_members():
    assert digest({"a": {digest, fitted}}) == digest({"a": {fitted, digest}})
    assert digest({"a": {digest}}) != digest({"a": {fitted}})


def test_old_fingerprints_of_tensors_stay():
    # Written by version 0.1, whose files must still load.
    state = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.tensor(3), "empty": torch.zeros(0, 4)}
    expected = "3d00596f4d92ecc0f436637295a5487291e1fdd7b986ffa83fb31e9e4daee394"
    assert digest(state) == digest(dict(reversed(state.items()))) == expected


def test_what_cannot_be_saved_is_said_before_the_fit(images, tmp_path):
    model = NR(network_with(threading.Lock()), "logits", **options("logits"))
    with pytest.warns(UserWarning, match="'logits._extra_state' .* no fingerprint"):
        fitted(model, images)
    with pytest.raises(TypeError, match="no fingerprint"):
        model.save(tmp_path / "nr")
    reduction = Labelled(nn.Flatten(), {"version": 1})
    model = NR(small_network(), "conv", reduction=reduction, **options("conv"))
    with pytest.warns(UserWarning, match="got dict for .*_extra_state"):
        fitted(model, images)
    with pytest.raises(TypeError, match="got dict for"):
        model.save(tmp_path / "nr")
    assert not list(tmp_path.iterdir()) and model.predict(images).shape == (30,)


def test_training_says_before_the_first_epoch_what_a_checkpoint_cannot_hold(images, tmp_path):
    net = nn.Sequential(network_with("text"), nn.Flatten())
    before = copy.deepcopy(net[0].conv.weight)
    settings = TrainingSettings(epochs=1, lr=0.1, momentum=0.0, batch_size=8)
    labels = torch.arange(30) % 3
    with pytest.raises(TypeError, match="got str for"):
        train_network(net, images, labels, settings, checkpoint=tmp_path / "c", progress=False)
    assert torch.equal(net[0].conv.weight, before)


WRAPPERS = {
    "bare": lambda net: net,
    "DataParallel": nn.DataParallel,
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "both": lambda net: torch.compile(nn.DataParallel(net), backend="eager"),
}
PREFIX = {
    "bare": "",
    "DataParallel": "module.",
    "compiled": "_orig_mod.",
    "both": "_orig_mod.module.",
}


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("bare", "DataParallel"),
        ("DataParallel", "bare"),
        ("DataParallel", "DataParallel"),
        pytest.param("compiled", "bare", marks=pytest.mark.slow),
        pytest.param("bare", "compiled", marks=pytest.mark.slow),
        pytest.param("both", "DataParallel", marks=pytest.mark.slow),
    ],
)
def test_a_classifier_moves_between_wrappers_of_its_network(images, tmp_path, saved, loaded):
    torch.compiler.reset()
    net = small_network().eval()
    layers = [PREFIX[saved] + name for name in LAYERS]
    model = DNR(WRAPPERS[saved](net), layers, **options(*layers, "combiner"))
    model = fitted(model, images)
    model.save(tmp_path / "dnr")
    expected = model(images)
    again = DNR.load(tmp_path / "dnr", WRAPPERS[loaded](copy.deepcopy(net)))
    assert again.layers == tuple(PREFIX[loaded] + name for name in LAYERS)
    assert torch.equal(again(images), expected)
    assert set(again.selection) == {*again.layers, "combiner"} and again.features.sizes
    assert again.svm_options.hyperparameters.keys() == again.selection.keys()
    other = small_network()
    with pytest.raises(CheckpointError, match="other weights"):
        DNR.load(tmp_path / "dnr", WRAPPERS[loaded](other))
    again.save(tmp_path / "again")
    back = DNR.load(tmp_path / "again", WRAPPERS[saved](net))
    assert back.layers == model.layers and torch.equal(back(images), expected)


def test_a_wrapper_inside_a_network_and_a_layer_called_module(images, tmp_path):
    plain = small_network().eval()
    net = nn.Sequential(nn.Identity(), plain)
    model = fitted(NR(net, "1.logits", **options("1.logits")), images)
    model.save(tmp_path / "nr")
    inside = nn.Sequential(nn.Identity(), nn.DataParallel(plain))
    assert NR.load(tmp_path / "nr", inside).layers == ("1.module.logits",)

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits, self.module = nn.Linear(64, 3), nn.Module()
            self.module.logits = nn.Linear(64, 3)

        def forward(self, x):
            return self.module.logits(x.flatten(1)) + self.logits(x.flatten(1))

    net = Holder()
    model = fitted(NR(net, "module.logits", **options("module.logits")), images)
    model.save(tmp_path / "nr")
    assert NR.load(tmp_path / "nr", copy.deepcopy(net)).layers == ("module.logits",)
    swapped = copy.deepcopy(net)
    swapped.logits, swapped.module.logits = swapped.module.logits, swapped.logits
    with pytest.raises(CheckpointError, match="other weights"):
        NR.load(tmp_path / "nr", swapped)


def test_a_file_of_a_wrapped_network_from_an_earlier_version_loads(images, tmp_path):
    from torchdnr.files import load_tensors, save_tensors

    net = nn.DataParallel(small_network().eval())
    model = fitted(NR(net, "module.logits", **options("module.logits")), images)
    model.save(tmp_path / "nr")
    tensors, metadata = load_tensors(tmp_path / "nr", kind="NR")
    metadata["network_digest"] = digest(net.state_dict())  # with the names of the wrapper
    save_tensors(tmp_path / "old", tensors, metadata, kind="NR")
    assert torch.equal(NR.load(tmp_path / "old", net)(images), model(images))
