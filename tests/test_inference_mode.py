"""Tests of work under torch.inference_mode, whose tensors no gradient can ever pass."""

import pytest
import torch
from small_models import LAYERS, fitted, make_images, options, small_network

from torchdnr import DNR, NR, RBFSVM
from torchdnr.attacks import noise, orthogonal_pgd, pgd, smoothed_pgd
from torchdnr.evaluation import security_evaluation
from torchdnr.features.layers import LayerFeatures
from torchdnr.svm.compression import compress_svm


@pytest.fixture
def images():
    return make_images(30)


def unfitted():
    torch.manual_seed(1)
    return DNR(small_network(), {"conv": ("project", 20), "logits": "flatten"}, **OPTIONS)


OPTIONS = options(*LAYERS, "combiner")


def assert_can_be_attacked(model, images, expected=None):
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    labels = torch.arange(len(images)) % 3
    attacked = pgd(model, images, labels, 0.2, norm=torch.inf, steps=3)
    if expected is not None:
        assert torch.equal(attacked, pgd(expected, images, labels, 0.2, norm=torch.inf, steps=3))


def test_a_classifier_fitted_there_can_be_attacked_and_is_that_of_elsewhere(images):
    expected, model = fitted(unfitted(), images), unfitted()
    with torch.inference_mode():
        fitted(model, images)
    assert_can_be_attacked(model, images, expected)
    net = small_network()
    search = {"stacking_folds": 2, "C_grid": (1.0, 10.0), "gamma_grid": (1.0,), "folds": 2}
    with torch.inference_mode():  # images that are made there, too
        model = fitted(DNR(net, **search), images.clone())
    assert_can_be_attacked(model, images)


def test_what_is_loaded_compressed_or_smoothed_there_can_be_attacked(images, tmp_path):
    expected = fitted(unfitted(), images)
    expected.save(tmp_path / "dnr")
    net, state, empty = expected.net, expected.state_dict(), unfitted()
    with torch.inference_mode():
        loaded = DNR.load(tmp_path / "dnr", net)
        empty.load_state_dict(state)
        compressed = expected.compress(images, 3, steps=2, joint_steps=2).calibrate(images)
        view = expected.smoothed(0.5)
    for model in (loaded, empty):
        assert_can_be_attacked(model, images, expected)
    for model in (compressed, view):
        assert_can_be_attacked(model, images)
    with torch.inference_mode():
        expected.reset_threshold()
        expected.set_threshold(loaded.threshold)
    assert_can_be_attacked(expected, images, loaded)


def test_a_machine_fitted_there_has_gradients(images, tmp_path):
    with torch.inference_mode():
        features = images.flatten(1)
        svm = RBFSVM(gamma=0.1).fit(features, torch.arange(30) % 3)
        svm.save(tmp_path / "svm")
        machines = [svm, RBFSVM.load(tmp_path / "svm"), compress_svm(svm, features, 3, steps=2)]
    expected = RBFSVM(gamma=0.1).fit(images.flatten(1), torch.arange(30) % 3)
    for machine in machines:
        leaf = images.flatten(1).clone().requires_grad_()
        machine(leaf).sum().backward()
        assert leaf.grad.abs().sum() > 0
    assert torch.equal(machines[0].dual_coef, expected.dual_coef)


def test_a_projection_drawn_there_has_gradients(images):
    features = LayerFeatures(small_network(), {"conv": ("project", 20)})
    with torch.inference_mode():
        features(images)
    leaf = images.clone().requires_grad_()
    features(leaf)["conv"].sum().backward()
    assert leaf.grad.abs().sum() > 0


@pytest.mark.parametrize("attack", [pgd, orthogonal_pgd, smoothed_pgd])
def test_attacks_called_there_name_it(images, attack):
    model, labels = fitted(unfitted(), images), torch.arange(30) % 3
    with torch.inference_mode(), pytest.raises(ValueError, match=r"under torch\.inference_mode"):
        attack(model, images, labels, 0.1)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"under torch\.inference_mode"):
        security_evaluation(model, images, labels, [0.0, 0.1])
    with torch.inference_mode():  # needs no gradient
        assert noise(model, images, labels, 0.1, draws=2).shape == images.shape


def test_fitting_leaves_the_mode_as_it_was(images):
    with torch.inference_mode():
        NR(small_network(), "conv", **options("conv")).fit(images, torch.arange(30) % 3)
        assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    NR(small_network(), "conv", **options("conv")).fit(images, torch.arange(30) % 3)
    assert torch.is_grad_enabled()
