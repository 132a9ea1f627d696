import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchdnr import DNR, NR
from torchdnr.features.extraction import ProjectionWarning
from torchdnr.features.layers import LayerFeatures
from torchdnr.files import CheckpointError, load_tensors, save_tensors

PAIR = (10.0, 0.05)


def make_net():
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2))
    return nn.Sequential(conv, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16 * 49, 3))


def images(n=36):
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(n) % 3
    patterns = torch.rand(3, 1, 16, 16, generator=generator)[labels]
    noise = torch.rand(patterns.shape, generator=generator)
    return 0.7 * patterns + 0.3 * noise, labels


def pairs(layers):
    return dict.fromkeys([*layers, "combiner"], PAIR)


class Own(nn.Module):
    """A reduction with a state, and a setting that shows in how it prints."""

    def __init__(self, width=20, scale=1.0):
        super().__init__()
        self.linear = nn.Linear(16 * 49, width)
        self.scale = scale

    def extra_repr(self):
        return f"scale={self.scale}"

    def forward(self, output):
        return self.scale * self.linear(output.flatten(1))


LAYERS = {"0.0": ("project", 256), "0": ("grid", 2), "1": "avg", "3": "flatten"}


def test_fit_score_save_and_load_with_every_built_in_reduction(tmp_path):
    x, y = images()
    net = make_net()
    model = DNR(net, LAYERS, hyperparameters=pairs(LAYERS), seed=3).fit(x, y).calibrate(x)
    widths = [svm.support_vectors.shape[1] for svm in model.base_svms]
    assert widths == [256, 64, 16, 3]
    assert [size["features"] for size in model.features.sizes.values()] == widths
    assert model.layers == tuple(LAYERS) and list(model.selection) == [*LAYERS, "combiner"]
    assert (model.scores(x).argmax(1) == y).all()

    # Each SVM sees what the reduction makes of the layer, and nothing else.
    raw = LayerFeatures(net, list(LAYERS)).outputs(x)
    torch.testing.assert_close(
        model.base_svms[2](raw["1"].mean(dim=(2, 3))), model.base_svms[2](model.features(x)["1"])
    )
    distortion = model.selection["0.0"]["distortion"]
    assert distortion["pairs"] == 36 * 35 / 2 and 0 < distortion["rms"] < 0.1
    assert distortion == model.features.reductions[0].distortion
    assert all("distortion" not in model.selection[name] for name in ("0", "1", "3", "combiner"))

    model.save(tmp_path / "dnr")
    loaded = DNR.load(tmp_path / "dnr", net)
    assert torch.equal(loaded(x), model(x))
    assert loaded.settings() == model.settings()
    assert loaded.features.describe() == model.features.describe()
    assert torch.equal(loaded.features.reductions[0].rows, model.features.reductions[0].rows)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "dnr").read_bytes()
    twin = DNR(make_net(), LAYERS, seed=9)  # another seed: the draw comes with the state
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.scores(x), model.scores(x))


def test_input_gradients_through_reductions():
    x, y = images()
    model = DNR(make_net(), LAYERS, hyperparameters=pairs(LAYERS)).fit(x, y)
    model = copy.deepcopy(model).double()
    few = x[:2].double().requires_grad_()
    assert torch.autograd.gradcheck(model.scores, few, fast_mode=True)
    assert torch.autograd.grad(model.scores(few).sum(), few)[0].abs().amax(dim=(1, 2, 3)).min() > 0


def test_a_loader_gives_the_same_reductions_as_tensors():
    x, y = images()
    fits = [
        DNR(make_net(), LAYERS, hyperparameters=pairs(LAYERS)).fit(*data)
        for data in ((x, y), (DataLoader(TensorDataset(x, y), batch_size=5),))
    ]
    torch.testing.assert_close(fits[0].scores(x), fits[1].scores(x))
    assert fits[0].selection["0.0"]["distortion"]["pairs"] == 630
    assert fits[1].selection["0.0"]["distortion"]["pairs"] == 630  # from more than one batch


def test_nr_takes_a_reduction(tmp_path):
    x, y = images()
    net = make_net()
    model = NR(net, "1", reduction="avg", hyperparameters={"1": PAIR}).fit(x, y)
    assert model.base_svms[0].support_vectors.shape[1] == 16
    model.save(tmp_path / "nr")
    assert torch.equal(NR.load(tmp_path / "nr", net).scores(x), model.scores(x))
    own = Own()
    model = NR(net, "1", reduction=own, hyperparameters={"1": PAIR}).fit(x, y)
    model.save(tmp_path / "nr")
    loaded = NR.load(tmp_path / "nr", net, layers={"1": Own()})
    assert torch.equal(loaded.scores(x), model.scores(x))


def test_a_module_of_ones_own_comes_back_with_its_state(tmp_path):
    x, y = images()
    net, own = make_net(), Own()
    layers = {"1": own, "3": "flatten"}
    model = DNR(net, layers, hyperparameters=pairs(layers)).fit(x, y)
    path = tmp_path / "dnr"
    model.save(path)
    fresh = Own()
    assert not torch.equal(fresh.linear.weight, own.linear.weight)
    loaded = DNR.load(path, net, layers={"1": fresh})
    assert torch.equal(loaded.scores(x), model.scores(x))
    assert torch.equal(fresh.linear.weight, own.linear.weight)
    with pytest.raises(
        CheckpointError, match=r"layer '1' is a module .*; pass one .* layers=\{'1'"
    ):
        DNR.load(path, net)
    for wrong in (Own(width=30), Own(scale=2.0), nn.Flatten()):
        with pytest.raises(
            CheckpointError, match=r"expected Own\(.* as the reduction of layer '1'"
        ):
            DNR.load(path, net, layers={"1": wrong})
    with pytest.raises(
        CheckpointError, match=r"for the layers \['1'\] alone, got some for \['3'\]"
    ):
        DNR.load(path, net, layers={"1": Own(), "3": nn.Flatten()})


def test_a_file_from_before_reductions_loads(tmp_path):
    x, y = images()
    net = make_net()
    model = DNR(net, ["1", "3"], hyperparameters=pairs(["1", "3"])).fit(x, y)
    model.save(tmp_path / "new")
    tensors, metadata = load_tensors(tmp_path / "new", kind="DNR")
    assert not [name for name in tensors if name.startswith("features.")]
    del metadata["reductions"], metadata["sizes"]
    save_tensors(tmp_path / "old", tensors, metadata, kind="DNR")
    old = DNR.load(tmp_path / "old", net)
    assert torch.equal(old.scores(x), model.scores(x))
    assert old.features.describe().startswith("1: (...) -> flatten -> ? features")


def test_a_fit_that_fails_leaves_the_earlier_one_to_use():
    x, y = images()
    layers = {"0.0": ("project", 256)}
    model = DNR(make_net(), layers, hyperparameters=pairs(layers)).fit(x, y)
    before = model.scores(x)
    with pytest.raises(ValueError, match="labels must be"):
        model.fit(x, y[:-1])
    with pytest.raises(RuntimeError) as failure:
        model.fit(torch.rand(6, 1, 12, 12), y[:6])  # the linear layer takes no maps of this size
    assert "given images (6, 1, 12, 12)" in failure.value.__notes__[0]
    assert torch.equal(model.scores(x), before)
    assert torch.equal(model.fit(x, y).scores(x), before)


def test_averages_take_images_of_any_size_and_projections_say_that_they_do_not():
    x, y = images()
    body = make_net()[0]  # without the linear layer
    averaged = DNR(body, {"0": "avg", "2": "avg"}, hyperparameters=pairs(["0", "2"])).fit(x, y)
    assert averaged.scores(torch.rand(2, 1, 20, 24)).shape == (2, 3)
    projected = NR(body, "0", reduction=("project", 256), hyperparameters={"0": PAIR}).fit(x, y)
    with pytest.raises(ValueError, match=r"expected the 2048 features per image.*got 3200"):
        projected.scores(torch.rand(2, 1, 20, 20))


def test_a_projection_that_spoils_distances_warns_at_fit():
    x, y = images()
    model = NR(make_net(), "0.0", reduction=("project", 4), hyperparameters={"0.0": PAIR})
    with pytest.warns(ProjectionWarning, match="project to more features"):
        model.fit(x, y)
    assert model.selection["0.0"]["distortion"]["rms"] > 0.1


def test_a_network_in_training_mode_and_wrong_names():
    x, y = images()
    net = make_net()
    net[0].append(nn.Dropout(0.5))
    model = DNR(net.train(), LAYERS, hyperparameters=pairs(LAYERS)).fit(x, y)
    assert torch.equal(model.scores(x), model.scores(x))
    assert all(m.training for m in net.modules())
    with pytest.raises(ValueError, match="no layer 'layer9'"):
        DNR(net, {"layer9": "avg"})
    with pytest.raises(ValueError, match='a reduction must be "flatten"'):
        DNR(net, {"1": "maximum"})
    with pytest.raises(ValueError, match="at least one layer"):
        DNR(net, {})
