import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from torchdnr.decisions import evaluation_mode
from torchdnr.features.extraction import extract
from torchdnr.features.layers import LayerFeatures

# Network, size of its images, layers: some of each are followed by an in-place operation.
NETWORKS = {
    "resnet18": (models.resnet18, 64, ["bn1", "layer1.0.bn2", "layer4", "fc"]),
    "mobilenet_v3_small": (
        models.mobilenet_v3_small,
        64,
        ["features.0", "features.6", "classifier.0"],
    ),
    "densenet121": (models.densenet121, 32, ["features.norm0", "features.denseblock2", "features"]),
    "convnext_tiny": (models.convnext_tiny, 32, ["features.7", "avgpool"]),
}


def make_vit():
    return models.vit_b_16(weights=None, image_size=32)


def hooks_of(net):
    return sum(len(module._forward_hooks) for module in net.modules())


@pytest.mark.parametrize(
    "name", ["resnet18", *(pytest.param(n, marks=pytest.mark.slow) for n in list(NETWORKS)[1:])]
)
def test_torchvision_networks_against_its_own_feature_extractor(name):
    make, size, layers = NETWORKS[name]
    net = make(weights=None).train()
    inputs = torch.rand(2, 3, size, size, requires_grad=True)
    state = copy.deepcopy(net.state_dict())
    features = LayerFeatures(net, layers)(inputs)
    assert list(features) == layers
    assert all(module.training for module in net.modules())  # restored
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    assert hooks_of(net) == 0
    (gradient,) = torch.autograd.grad(sum(z.square().mean() for z in features.values()), inputs)
    assert gradient.isfinite().all()
    assert gradient.abs().amax(dim=(1, 2, 3)).min() > 0

    net.eval()
    for module in net.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # so that the oracle, too, sees what the layer returned
    with torch.no_grad():
        for layer in layers:
            # One at a time: its graph then ends at the layer, before what would overwrite it.
            oracle = create_feature_extractor(net, [layer])(inputs)[layer].flatten(1)
            torch.testing.assert_close(features[layer], oracle)


def test_vision_transformer_and_its_attention():
    net = make_vit().eval()
    names = ["encoder.layers.encoder_layer_0.self_attention", "encoder.ln", "heads"]
    inputs = torch.rand(2, 3, 32, 32, requires_grad=True)
    features = LayerFeatures(net, names)(inputs)
    tokens = net._process_input(inputs)
    tokens = torch.cat([net.class_token.expand(2, -1, -1), tokens], 1) + net.encoder.pos_embedding
    block = net.encoder.layers[0]
    normed = block.ln_1(tokens)
    attended = block.self_attention(normed, normed, normed, need_weights=False)[0]
    torch.testing.assert_close(features[names[0]], attended.flatten(1))
    torch.testing.assert_close(features["heads"], net(inputs))
    assert features["encoder.ln"].shape == (2, 5 * 768)
    (gradient,) = torch.autograd.grad(features["encoder.ln"].square().sum(), inputs)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.relu = nn.ReLU(inplace=True)
        self.other = nn.Linear(3, 3)
        self.unused = nn.Linear(3, 3)
        self.strange = nn.Identity()
        self.runs = 0

    def forward(self, inputs):
        self.runs += 1
        out = self.other(self.relu(self.linear(inputs)))
        out += inputs
        return out


def test_in_place_operations_after_a_layer_do_not_change_its_features():
    net = InPlace()
    inputs = torch.randn(5, 3)
    features = LayerFeatures(net, ["other", "relu", "linear"])(inputs)
    expected = inputs @ net.linear.weight.t() + net.linear.bias
    assert (expected < 0).any()
    torch.testing.assert_close(features["linear"], expected)
    torch.testing.assert_close(features["relu"], expected.clamp(min=0))
    expected = expected.clamp(min=0) @ net.other.weight.t() + net.other.bias
    torch.testing.assert_close(features["other"], expected)
    assert list(features) == ["other", "relu", "linear"]
    assert net.runs == 1


def test_gradients_are_exact_and_reach_the_parameters():
    net = InPlace().double()
    features = LayerFeatures(net, ["linear", "relu", "other"])
    inputs = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(features(x).values()), inputs)
    features(inputs)["other"].sum().backward()
    assert net.linear.weight.grad.abs().sum() > 0


def test_last_run_of_a_layer_counts_and_flat_outputs_get_a_column():
    shared = nn.Linear(3, 3)
    net = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(3, 1), nn.Flatten(0))
    inputs = torch.randn(4, 3)
    features = LayerFeatures(net, ["0", "4"])(inputs)
    torch.testing.assert_close(features["0"], shared(shared(inputs).tanh()))
    assert features["4"].shape == (4, 1)
    assert LayerFeatures(net, ["0"])(inputs[:0])["0"].shape == (0, 3)
    assert LayerFeatures(net, ["2"])(inputs)["2"].shape == (4, 3)  # its second name


def test_hooks_and_flags_are_restored_after_an_error():
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 3))
    net[1].eval()
    features = LayerFeatures(net, ["0", "2"])
    with pytest.raises(RuntimeError, match="shapes"):
        features(torch.randn(2, 4))
    assert hooks_of(net) == 0
    assert [m.training for m in (net, *net)] == [True, True, False, True]
    net[2].register_forward_hook(lambda *_: None)
    features(torch.randn(2, 3))
    assert hooks_of(net) == 1  # the user's own


def test_evaluation_mode_touches_only_what_is_training():
    net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()).eval())
    with evaluation_mode(net):
        assert not any(module.training for module in net.modules())
    assert [m.training for m in net.modules()] == [True, True, False, False]


def test_layer_names_are_checked():
    net = models.resnet18(weights=None)
    with pytest.raises(ValueError, match=r"no layer 'layer5'; did you mean: layer"):
        LayerFeatures(net, ["layer5"])
    with pytest.raises(ValueError, match=r"choose from the 67 names.*conv1, .*\.\.\., .*fc"):
        LayerFeatures(net, ["XYZ"])
    with pytest.raises(ValueError, match="choose from: linear, relu, other, unused, strange"):
        LayerFeatures(InPlace(), ["XYZ"])
    with pytest.raises(ValueError, match=r"pass \['fc'\]"):
        LayerFeatures(net, "fc")
    with pytest.raises(ValueError, match="at least one layer"):
        LayerFeatures(net, [])
    with pytest.raises(ValueError, match=r"\['fc'\] more than once"):
        LayerFeatures(net, ["fc", "avgpool", "fc"])


def test_outputs_are_checked():
    net = InPlace()
    with pytest.raises(RuntimeError, match=r"\['unused'\] did not run"):
        LayerFeatures(net, ["linear", "unused"])(torch.randn(2, 3))
    net.other.forward = lambda x: {"out": x}
    with pytest.raises(TypeError, match=r"layer 'other' must return a tensor.*got dict"):
        LayerFeatures(net, ["other"])(torch.randn(2, 3))
    turned = nn.Sequential(nn.Flatten(0))
    with pytest.raises(ValueError, match=r"layer '0' must return one row per sample.*\(6,\)"):
        LayerFeatures(turned, ["0"])(torch.randn(2, 3))
    assert hooks_of(net) == 0


def test_extract_takes_tensors_and_loaders():
    net = InPlace().train()
    features = LayerFeatures(net, ["relu", "other"])
    images, labels = torch.randn(7, 3), torch.arange(7)
    expected = features(images)
    for data in (
        images,
        DataLoader(TensorDataset(images, labels), batch_size=3),
        DataLoader(images, batch_size=3),
        (part for part in images.split(4)),
    ):
        got, got_labels = extract(features, data, batch_size=3)
        assert list(got) == ["relu", "other"]
        for name, values in got.items():
            assert not values.requires_grad
            torch.testing.assert_close(values, expected[name])
        if isinstance(data, DataLoader) and isinstance(data.dataset, TensorDataset):
            assert torch.equal(got_labels, labels)
        else:
            assert got_labels is None
    assert net.training


def test_extract_checks_its_data():
    features = LayerFeatures(InPlace(), ["relu"])
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        extract(features, torch.randn(2, 3), batch_size=0)
    for empty in (torch.empty(0, 3), []):
        with pytest.raises(ValueError, match="holds no image"):
            extract(features, empty)
    batch = torch.randn(2, 3)
    with pytest.raises(ValueError, match="got 1 of 2"):
        extract(features, [(batch, torch.zeros(2)), batch])
