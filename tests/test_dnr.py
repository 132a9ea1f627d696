import copy

import gpytorch
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.autograd import gradcheck
from torch.utils.data import DataLoader, TensorDataset

from torchdnr import DNR, NR, REJECT
from torchdnr.features.layers import LayerFeatures
from torchdnr.files import CheckpointError, DamagedFileError
from torchdnr.svm import RBFSVM, NotFittedError
from torchdnr.svm.folds import stratified_folds

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
LAYERS = ["conv", "pool", "head"]
PAIRS = {"conv": (10.0, 0.03), "pool": (10.0, 0.1), "head": (1.0, 0.02), "combiner": (1.0, 0.1)}


class TinyNet(nn.Module):
    """A convolutional network for 8 x 8 digits of four classes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AvgPool2d(2)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(128, 4)

    def forward(self, x):
        x = self.pool(self.relu(self.norm(self.conv(x))))
        return self.head(self.drop(x.flatten(1)))


def digits():
    """Return images and labels in three parts: fit, calibration, test."""
    x, y = load_digits(n_class=4, return_X_y=True)
    x, y = torch.tensor(x / 16).float().view(-1, 1, 8, 8), torch.tensor(y)
    return (x[:240], y[:240]), (x[240:440], y[240:440]), (x[440:], y[440:])


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = TinyNet()
    (x, y), _, _ = digits()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.requires_grad_(True).eval()


@pytest.fixture(scope="module")
def _fitted(net):
    (x, y), (held_out, _), _ = digits()
    dnr = DNR(copy.deepcopy(net), LAYERS, hyperparameters=PAIRS).fit(x, y).calibrate(held_out)
    nr = NR(copy.deepcopy(net), "head", hyperparameters={"head": (1.0, 0.02)}).fit(x, y)
    return {"DNR": dnr, "NR": nr.calibrate(held_out)}


@pytest.fixture
def fitted(_fitted):
    """Return fitted classifiers that a test may spoil."""
    return copy.deepcopy(_fitted)


@pytest.fixture
def dnr(fitted):
    return fitted["DNR"]


def double_images(n=2):
    x = digits()[2][0][:n].double()
    return (0.8 * x + 0.1 + 0.05 * torch.rand_like(x)).requires_grad_()


@pytest.mark.parametrize("kind", ["DNR", "NR"])
def test_output_prediction_and_scores_agree(fitted, kind):
    model, (_, _, (x, y)) = fitted[kind], digits()
    output = model(x)
    assert output.shape == (len(x), 5) and output.dtype == torch.float32
    assert torch.equal(output[:, :4], model.scores(x))
    assert (output[:, 4] == model.threshold).all()
    labels = model.predict(x)
    assert labels.dtype == torch.int64
    best, winner = output[:, :4].max(1)
    assert torch.equal(labels, torch.where(best > output[:, 4], winner, REJECT))
    assert set(labels.unique().tolist()) == {REJECT, 0, 1, 2, 3}
    accepted = labels != REJECT
    assert (labels[accepted] == y[accepted]).double().mean() > 0.97
    assert model.num_classes == model.reject_index == 4
    output.fill_(0.0)
    assert (model(x)[:, 4] == model.threshold).all()


@pytest.mark.parametrize("kind", ["DNR", "NR"])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.33])
def test_calibration_rejects_its_share_of_the_calibration_images(fitted, kind, rate):
    x = digits()[1][0]
    model = fitted[kind].calibrate(x, rejection_rate=rate)
    best = model.scores(x).max(1).values
    assert len(best.unique()) == len(x)
    assert (model.predict(x) == REJECT).sum() == int(rate * len(x) + 1e-9)


# NR sees only four logits, on which some noise lands among the digits.
@pytest.mark.parametrize(("kind", "share"), [("DNR", 0.8), ("NR", 0.6)])
def test_noise_is_rejected_and_digits_are_not(fitted, kind, share):
    model, x = fitted[kind], digits()[2][0]
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(300, 1, 8, 8, generator=generator)
    coarse = (torch.rand(300, 1, 8, 8, generator=generator) > 0.5).float()
    shuffled = x.flatten(1)[:, torch.randperm(64, generator=generator)].view_as(x)
    assert (model.predict(x) == REJECT).double().mean() < 0.25
    for strange in (noise, coarse, shuffled):
        assert (model.predict(strange) == REJECT).double().mean() > share


def test_scores_far_from_the_features_are_the_intercept(dnr):
    base, combiner = dnr.base_svms, dnr.combiner
    far = 1e4 * torch.ones(1, 1, 8, 8)  # scores() does not check: this is about the kernels
    at_intercepts = torch.cat([svm.intercept for svm in base]).unsqueeze(0)
    assert torch.equal(dnr.scores(far), combiner(at_intercepts))


@pytest.mark.parametrize("device", DEVICES)
def test_a_loader_gives_the_same_classifier_as_tensors(net, device):
    (x, y), (held_out, _), (test, _) = digits()
    net = copy.deepcopy(net).to(device)
    by_tensor = DNR(net, LAYERS, hyperparameters=PAIRS, batch_size=50)
    by_tensor.fit(x.to(device), y.to(device)).calibrate(held_out.to(device))
    by_loader = DNR(net, LAYERS, hyperparameters=PAIRS)
    by_loader.fit(DataLoader(TensorDataset(x, y), batch_size=50))
    by_loader.calibrate(DataLoader(TensorDataset(held_out), batch_size=64))
    test = test.to(device)
    torch.testing.assert_close(by_loader(test), by_tensor(test), atol=1e-5, rtol=0)
    assert by_tensor(test).device == test.device
    assert by_tensor.threshold.device == test.device
    by_list, nr = (
        NR(net, "head", hyperparameters={"head": PAIRS["head"]}).fit(x, labels)
        for labels in (y.tolist(), y)
    )
    assert torch.equal(by_list.scores(test), nr.scores(test))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_device_and_dtype_follow_the_network_and_the_inputs(net, dtype, device):
    (x, y), (held_out, _), (test, _) = digits()
    net = copy.deepcopy(net).to(device, dtype)
    model = NR(net, "head", hyperparameters={"head": (1.0, 0.02)}).fit(x.to(dtype), y)
    model.calibrate(held_out.to(dtype))
    output = model(test.to(device, dtype))
    assert output.dtype == dtype and output.device.type == device
    tensors = model.base_svms[0].state_dict().values()
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {dtype}
    assert {tensor.device.type for tensor in model.state_dict().values()} == {device}
    moved = copy.deepcopy(model).to("cpu", torch.float64)(test.double())
    torch.testing.assert_close(moved, output.cpu().double(), atol=1e-4, rtol=0)


def test_calibration_runs_where_the_network_is(dnr):
    x = digits()[1][0]
    expected = dnr.threshold.clone()
    dnr.rejection.to("meta")  # stands for any device but that of the network
    dnr.calibrate(x)
    assert dnr.threshold.device == x.device and dnr.threshold == expected


def test_gradients_from_pixels_to_all_scores_pass_gradcheck(dnr):
    dnr.double()
    x = double_images()
    assert dnr(x).dtype == torch.float64
    for k in range(4):
        (gradient,) = torch.autograd.grad(dnr.scores(x)[:, k].sum(), x)
        assert gradient.flatten(1).norm(dim=1).min() > 1e-3  # else the check would be empty
    assert gradcheck(dnr, x)
    (gradient,) = torch.autograd.grad(dnr(x)[:, 4].sum(), x, allow_unused=True)
    assert gradient is None or (gradient == 0).all()  # theta does not depend on the image


@pytest.mark.parametrize("kind", ["DNR", "NR"])
def test_nothing_leaves_the_device_between_input_and_gradient(fitted, kind, monkeypatch):
    model, x = fitted[kind], digits()[2][0][:5].requires_grad_()
    expected = model(x)

    def leave(*_, **__):
        raise AssertionError("a value was read by the host")

    readers = ["item", "cpu", "numpy", "tolist", "__array__", "__bool__", "__float__", "__int__"]
    with monkeypatch.context() as patch:
        for name in [*readers, "__index__", "nonzero"]:
            patch.setattr(torch.Tensor, name, leave)
        got = model(x)
        got[:, 0].sum().backward()
    assert torch.equal(got, expected)
    assert x.grad.abs().amax(dim=(1, 2, 3)).min() > 0


def test_the_combiner_is_trained_on_out_of_fold_scores(dnr):
    (x, y), _, (test, _) = digits()
    with torch.no_grad():
        seen, unseen = (LayerFeatures(dnr.net, LAYERS)(images) for images in (x, test))
    fold = stratified_folds(y, 3, seed=0)
    stacked, leaking, tested = [], [], []
    for name in LAYERS:
        C, gamma = PAIRS[name]
        held_out = torch.zeros(len(x), 4)
        for k in range(3):
            part = RBFSVM(C, gamma).fit(seen[name][fold != k], y[fold != k])
            held_out[fold == k] = part(seen[name][fold == k])
        whole = RBFSVM(C, gamma).fit(seen[name], y)
        stacked.append(held_out)
        leaking.append(whole(seen[name]))
        tested.append(whole(unseen[name]))
    stacked, leaking, tested = (torch.cat(parts, dim=1) for parts in (stacked, leaking, tested))
    by_hand = RBFSVM(*PAIRS["combiner"]).fit(stacked, y)(tested)
    with_leak = RBFSVM(*PAIRS["combiner"]).fit(leaking, y)(tested)
    assert (dnr.scores(test) - by_hand).abs().max() < 5e-3
    assert (dnr.scores(test) - with_leak).abs().max() > 0.05


def test_hyperparameters_are_searched_for_what_is_not_given(net):
    (x, y), _, (test, labels) = digits()
    options = {"C_grid": [0.1, 10.0], "gamma_grid": [0.25, 1.0], "folds": 2}
    model = DNR(net, ["pool", "head"], hyperparameters={"pool": (10.0, 0.1)}, **options).fit(x, y)
    assert model.selection["pool"] == {"C": 10.0, "gamma": 0.1}
    for name, svm in (("head", model.base_svms[1]), ("combiner", model.combiner)):
        found = model.selection[name]
        assert found["C"] in options["C_grid"] and found["C"] == svm.C
        assert found["gamma"] in found["gamma_grid"] and found["gamma"] == svm.gamma
        assert np.shape(found["accuracy"]) == (2, 2)
        assert 0.5 / svm.kernel.lengthscale.item() ** 2 == pytest.approx(svm.gamma, rel=1e-5)
    assert (model.scores(test).argmax(1) == labels).double().mean() > 0.95
    again = DNR(net, ["pool", "head"], hyperparameters={"pool": (10.0, 0.1)}, **options)
    assert torch.equal(again.fit(x, y).scores(test), model.scores(test))


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_left_as_found(net, training):
    (x, y), (held_out, _), (test, _) = digits()
    net = copy.deepcopy(net).train(training)
    net.drop.train(not training)
    net.conv.weight.requires_grad_(False)
    handle = net.pool.register_forward_hook(lambda *_: None)
    state = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    wanted = [parameter.requires_grad for parameter in net.parameters()]

    def check():
        assert [module.training for module in net.modules()] == modes
        assert [parameter.requires_grad for parameter in net.parameters()] == wanted
        assert sum(len(module._forward_hooks) for module in net.modules()) == 1
        assert all(parameter.grad is None for parameter in net.parameters())
        assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())

    model = DNR(net, LAYERS, hyperparameters=PAIRS).fit(x, y).calibrate(held_out)
    assert torch.equal(model(test), model(test))  # no dropout, whatever the mode
    model.predict(test)
    check()

    def failing():
        yield x, y
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        model.fit(failing())
    with pytest.raises(RuntimeError):
        model.scores(torch.rand(2, 3, 8, 8))  # three channels: the network itself objects
    check()
    handle.remove()
    names = {name for name, _ in model.named_parameters()}
    assert {f"features.net.{name}" for name, _ in net.named_parameters()} <= names


def test_what_is_missing_is_said(net, tmp_path):
    (x, y), (held_out, _), _ = digits()
    model = NR(net, "head", hyperparameters={"head": (1.0, 0.02)})
    for use in (model, model.scores, model.calibrate, lambda _: model.save(tmp_path / "nr")):
        with pytest.raises(NotFittedError, match=r"NR is not fitted: call fit\(images, labels\)"):
            use(held_out)
    model.fit(x, y)
    for use in (model, model.predict):
        with pytest.raises(NotFittedError, match="threshold is not set: call calibrate"):
            use(held_out)
    assert model.scores(held_out).shape == (200, 4)
    model.calibrate(held_out)(held_out)
    model.fit(x, y)
    with pytest.raises(NotFittedError, match="threshold is not set"):
        model(held_out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x * 2, y), r"inputs must lie in \(0.0, 1.0\), got values from 0 to 2"),
        (lambda x, y: (x - 0.01, y), "inputs must lie in"),
        (lambda x, y: (x * torch.nan, y), "inputs must lie in .* nan"),
        (lambda x, y: (x[:0], y[:0]), "inputs must be a non-empty batch"),
        (lambda x, y: ((16 * x).byte(), y), "must be floating point"),
        (lambda x, y: (x, y - 1), r"labels must be in 0\.\.2, got -1"),
        (lambda x, y: (x, y * 100), "labels must hold at least two classes and all of"),
        (lambda x, y: (x, y * 0), "at least two classes"),
        (lambda x, y: (x, y.float()), "labels must be integers"),
        (lambda x, y: (x, y[1:]), r"labels must be \(240,\)"),
        (lambda x, y: (x, None), "labels must come once.* got none"),
        (lambda x, y: ([(x, y)], y), "labels must come once.* got both"),
        (lambda x, y: ([(x,)], None), "labels must come once.* got none"),
        (lambda x, y: ([], None), "the loader yielded no batch"),
        (lambda x, y: ([{"image": x}], None), "must be images, or .*got dict"),
    ],
)
def test_wrong_training_data_is_refused_and_changes_nothing(dnr, change, message):
    (x, y), (held_out, _), _ = digits()
    before = dnr(held_out)
    with pytest.raises(ValueError, match=message):
        dnr.fit(*change(x, y))
    assert torch.equal(dnr(held_out), before)


def test_a_class_with_fewer_samples_than_folds_is_refused(net):
    (x, y), _, _ = digits()
    few = torch.cat([x[y != 3], x[y == 3][:2]]), torch.cat([y[y != 3], y[y == 3][:2]])
    with pytest.raises(ValueError, match="as many samples as folds = 5, got a class with 2"):
        NR(net, "head").fit(*few)
    with pytest.raises(ValueError, match="as many samples as folds = 3"):
        DNR(net, LAYERS, hyperparameters=PAIRS).fit(*few)


def test_a_fit_that_fails_midway_leaves_no_mixture_of_old_and_new(dnr):
    (x, y), (held_out, _), _ = digits()
    dnr.net.head.weight.data.fill_(torch.inf)  # the last layer: others are fitted before
    with pytest.raises(ValueError, match="features must be finite"):
        dnr.fit(x[:120], y[:120])
    with pytest.raises(NotFittedError, match="DNR is not fitted"):
        dnr(held_out)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net: DNR(net, ["fc9"]), "no layer 'fc9'"),
        (lambda net: DNR(net, []), "at least one layer"),
        (lambda net: DNR(net, "head"), "list of names"),
        (lambda net: NR(net, ["head"]), "NR takes the name of one layer"),
        (lambda net: DNR(net, LAYERS, hyperparameters={"fc": (1.0, 1.0)}), r"got \['fc'\]"),
        (lambda net: NR(net, "head", hyperparameters={"combiner": (1.0, 1.0)}), "'combiner'"),
        (lambda net: DNR(net, LAYERS, hyperparameters={"conv": (1.0, "scale")}), "two numbers > 0"),
        (lambda net: DNR(net, LAYERS, hyperparameters={"conv": (1.0, -1.0)}), "two numbers > 0"),
        (lambda net: DNR(net, LAYERS, hyperparameters={"conv": (1.0,)}), "two numbers > 0"),
        (lambda net: DNR(net, LAYERS, hyperparameters={"conv": 1.0}), "two numbers > 0"),
        (lambda net: DNR(net, LAYERS, folds=1), "folds must be >= 2"),
        (lambda net: DNR(net, LAYERS, stacking_folds=1), "folds must be >= 2"),
        (lambda net: DNR(net, LAYERS, batch_size=0), "batch_size must be >= 1"),
    ],
)
def test_wrong_options_are_refused_before_any_work(net, make, message):
    with pytest.raises(ValueError, match=message):
        make(net)


@pytest.mark.parametrize("kind", ["DNR", "NR"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_classifier_is_the_same_to_the_bit(fitted, kind, dtype, tmp_path):
    path, images = tmp_path / "model.safetensors", digits()[2][0].to(dtype)
    model = fitted[kind].to(dtype)
    model.calibrate(digits()[1][0].to(dtype), 0.2)
    model.save(path)
    net = copy.deepcopy(model.net)
    loaded = type(model).load(path, net)
    assert loaded.net is net
    assert torch.equal(loaded(images), model(images))
    assert torch.equal(loaded.predict(images), model.predict(images))
    assert loaded.threshold.dtype == dtype
    assert loaded.settings() == model.settings()
    for old, new in zip(model.svms.named().values(), loaded.svms.named().values(), strict=True):
        assert (new.C, new.gamma) == (old.C, old.gamma)
    # The network is not in the file.
    assert path.stat().st_size < 2**20
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_searched_classifier_can_be_saved_before_calibration(net, tmp_path):
    (x, y), (held_out, _), _ = digits()
    model = NR(net, "head", C_grid=[1.0], gamma_grid=[0.5, 1.0], folds=2).fit(x, y)
    model.save(tmp_path / "nr")
    loaded = NR.load(tmp_path / "nr", net)
    assert loaded.selection == model.selection
    assert torch.equal(loaded.scores(held_out), model.scores(held_out))
    with pytest.raises(NotFittedError, match="threshold is not set"):
        loaded(held_out)


def test_a_state_dict_carries_network_machines_and_threshold(dnr):
    images = digits()[2][0]
    fresh = DNR(TinyNet(), LAYERS)
    fresh.load_state_dict(dnr.state_dict())
    assert torch.equal(fresh(images), dnr(images))


def test_a_file_belongs_to_the_weights_of_its_network(dnr, tmp_path):
    path, images = tmp_path / "dnr", digits()[2][0]
    dnr.save(path)
    other = copy.deepcopy(dnr.net)
    with torch.no_grad():
        other.head.bias[0] += 1e-3
    with pytest.raises(CheckpointError, match=r"got one with other weights.* strict=False"):
        DNR.load(path, other)
    loaded = DNR.load(path, other, strict=False)
    assert torch.isfinite(loaded(images)).all()
    assert loaded.threshold == dnr.threshold


def test_foreign_and_damaged_files_are_refused(fitted, tmp_path):
    path, net = tmp_path / "model", fitted["NR"].net
    fitted["NR"].save(path)
    with pytest.raises(CheckpointError, match="expected a DNR file, got a NR file"):
        DNR.load(path, net)
    fitted["DNR"].save(path)
    with pytest.raises(CheckpointError, match="expected a NR file, got a DNR file"):
        NR.load(path, net)
    good = path.read_bytes()
    flipped = good[:-5] + bytes([good[-5] ^ 1]) + good[-4:]
    for bad in (good[: len(good) // 2], flipped, b"", b"PK\x03\x04 a pickle"):
        path.write_bytes(bad)
        with pytest.raises(DamagedFileError, match="model"):
            DNR.load(path, net)
    with pytest.raises(FileNotFoundError, match="no DNR file here"):
        DNR.load(tmp_path / "missing", net)


def test_a_failed_save_leaves_the_earlier_checkpoint_as_it_was(dnr, tmp_path, monkeypatch):
    path = tmp_path / "dnr"
    dnr.save(path)
    good = path.read_bytes()
    dnr.set_threshold(5.0)
    with pytest.raises(OSError, match="choose a writable folder"):
        dnr.save(path / "below_a_file")

    def full_disk(tensors, file, **_):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.serialize_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        dnr.save(path)
    assert path.read_bytes() == good
    assert [file.name for file in tmp_path.iterdir()] == ["dnr"]
    assert DNR.load(path, dnr.net).threshold != 5.0


def test_copies_are_independent_and_equal(dnr):
    (x, y), (held_out, _), _ = digits()
    before = dnr(held_out)
    twin = copy.deepcopy(dnr)
    assert torch.equal(twin(held_out), before)
    twin.fit(x[:100], y[:100]).calibrate(held_out, 0.5)
    with torch.no_grad():
        twin.net.conv.weight.zero_()
    assert torch.equal(dnr(held_out), before)
    wide = copy.deepcopy(dnr).double()
    torch.testing.assert_close(wide(held_out.double()).float(), before, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", ["DNR", "NR"])
def test_a_score_does_not_depend_on_the_rest_of_its_batch(fitted, kind):
    model, x = fitted[kind], digits()[2][0][:20]
    together = model(x)
    alone = torch.cat([model(image.unsqueeze(0)) for image in x])
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=0)
    assert model(x[:0]).shape == (0, 5)


def test_fitting_and_scoring_leave_the_random_state_alone(net):
    (x, y), _, _ = digits()
    before = torch.get_rng_state()
    DNR(net, LAYERS, hyperparameters=PAIRS).fit(x, y).calibrate(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_only_the_network_has_parameters_to_train(dnr):
    kernels = [m for m in dnr.modules() if isinstance(m, gpytorch.kernels.Kernel)]
    assert len(kernels) == 4
    trained = {name for name, p in dnr.named_parameters() if p.requires_grad}
    assert trained == {f"features.net.{name}" for name, _ in dnr.net.named_parameters()}
