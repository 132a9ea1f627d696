"""Tests of what a fitted module keeps: its certificate, not the solution; copies, not arguments."""

import copy
import gc

import pytest
import torch
from gpytorch.kernels import MaternKernel
from small_models import make_images, small_dnr, small_network

from torchdnr import NR, RBFSVM
from torchdnr.evaluation import security_evaluation
from torchdnr.models.paper import Normalise
from torchdnr.svm import grid_search, solve_dual

N, D = 400, 5


def samples(dtype=torch.float64):
    torch.manual_seed(0)
    y = torch.arange(N) % 4
    return (torch.randn(4, D)[y] + 0.5 * torch.randn(N, D)).to(dtype), y


def tensors_of(thing):
    """All tensors that can be reached from an object, through whatever holds them."""
    seen, todo, found = set(), [thing], []
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, type | type(gc)):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif not callable(item) or isinstance(item, torch.nn.Module):
            todo += gc.get_referents(item)
    return found


@pytest.mark.parametrize(
    "fit", [RBFSVM(5.0).fit, lambda x, y: grid_search(x, y, C_grid=(1.0, 5.0), folds=2).svm]
)
def test_a_fitted_svm_holds_what_scoring_takes_and_little_more(fit):
    svm = fit(*samples())
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(svm)}
    vectors = svm.support_vectors
    scoring = 2 * vectors.nbytes + 8 * len(vectors) * (1 + svm.num_classes + 1)
    assert scoring <= sum(held.values()) <= scoring + 1000
    assert N not in {length for t in tensors_of(svm) for length in t.shape}


def test_the_certificate_is_that_of_the_solution_and_stays_on_the_cpu():
    x, y = samples()
    svm = RBFSVM(5.0, 0.1).fit(x, y)
    targets = torch.where(y[:, None] == torch.arange(4), 1.0, -1.0).double()
    kernel = torch.exp(-0.1 * torch.cdist(x, x).square())
    whole = solve_dual(kernel, targets, 5.0)
    assert svm.solution.samples == whole.samples == N and svm.solution.converged.all()
    torch.testing.assert_close(svm.solution.objective, whole.objective, rtol=1e-6, atol=0)
    assert (svm.solution.violation <= 1e-3).all() and (svm.solution.duality_gap >= -1e-9).all()
    content = dict(vars(svm.solution))
    assert content.pop("method") == ("descent",) * 4
    for name, value in content.items():
        assert isinstance(value, int) or (value.shape == (4,) and value.device.type == "cpu"), name
    before = copy.deepcopy(svm.solution)
    svm.float()
    assert svm.solution.objective.dtype == torch.float64
    assert torch.equal(svm.solution.objective, before.objective)
    assert all(t.device.type == "meta" for t in svm.to("meta").state_dict().values())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return small_dnr(make_images(30))


@pytest.mark.parametrize("theta", [torch.tensor(0.25), torch.tensor([0.25]).double()])
def test_a_threshold_does_not_move_with_the_tensor_it_was_set_to(model, theta):
    images = make_images(6)
    model.set_threshold(theta)
    expected, labels = model(images), model.predict(images)
    theta += 100.0
    assert torch.equal(model(images), expected) and torch.equal(model.predict(images), labels)
    assert model.threshold.item() == 0.25
    leaf = torch.tensor(0.25, requires_grad=True)
    model.set_threshold(leaf)
    assert not model.threshold.requires_grad


def fit_svm(**given):
    x, y = samples()
    given = {"features": x, "labels": y, **given}
    svm = RBFSVM(
        given.pop("C", 5.0), given.pop("gamma", 0.1), class_weight=given.pop("class_weight", None)
    )
    return svm.fit(given.pop("features"), given.pop("labels"), **given)


GIVEN = {
    "features": lambda: samples()[0],
    "labels": lambda: samples()[1],
    "sample_weight": lambda: torch.ones(N).double(),
    "initial": lambda: torch.zeros(N, 4).double(),
    "distances": lambda: torch.cdist(samples()[0], samples()[0]).square(),
    "C": lambda: torch.full((4,), 5.0),
    "gamma": lambda: torch.tensor(0.1),
    "class_weight": lambda: torch.ones(4),
}


@pytest.mark.parametrize("name", GIVEN)
def test_an_svm_does_not_change_with_the_tensors_it_was_given(name):
    given = GIVEN[name]()
    svm = fit_svm(**{name: given})
    x = samples()[0] + 0.1
    scores, settings, state = svm(x), svm.settings(), copy.deepcopy(svm.state_dict())
    given += 3
    assert torch.equal(svm(x), scores) and svm.settings() == settings
    assert all(torch.equal(svm.state_dict()[key], value) for key, value in state.items())


def test_a_state_dict_is_copied():
    svm = fit_svm()
    state = {name: value.clone() for name, value in svm.state_dict().items()}
    loaded = RBFSVM(5.0)
    loaded.load_state_dict(state)
    for value in state.values():
        value.zero_()
    x, _ = samples()
    torch.testing.assert_close(loaded(x), svm(x))


def test_one_kernel_may_be_given_for_two_files(tmp_path):
    x, y = samples()
    svms = []
    for lengthscale in (0.5, 2.0):
        kernel = MaternKernel(nu=1.5).double()
        kernel.lengthscale = lengthscale
        svms.append(RBFSVM(5.0, kernel=kernel).fit(x, y))
        svms[-1].save(tmp_path / f"{lengthscale}")
    kernel = MaternKernel(nu=1.5)
    loaded = [RBFSVM.load(tmp_path / f"{ell}", kernel=kernel) for ell in (0.5, 2.0)]
    for svm, again in zip(svms, loaded, strict=True):
        torch.testing.assert_close(again(x), svm(x))


def test_hyperparameters_are_copied():
    given = {"logits": [10.0, 0.01]}
    model = NR(small_network(), "logits", hyperparameters=given)
    given["logits"][0] = 1.0
    assert model.svm_options.hyperparameters == {"logits": (10.0, 0.01)}


def test_a_curve_does_not_change_with_the_labels_it_was_measured_on(model):
    images, labels = make_images(6), torch.arange(6) % 3
    model.set_threshold(-100.0)
    curve = security_evaluation(model, images, labels, eps=[0.0], norm=2)
    accuracy, worst = curve.accuracy, curve.adversarial.clone()
    labels += 1
    images += 1
    assert curve.accuracy == accuracy and torch.equal(curve.adversarial, worst)


def test_a_normalisation_does_not_change_with_its_statistics():
    mean, std = torch.tensor([0.5]), torch.tensor([2.0])
    layer = Normalise(mean, std)
    mean += 1
    std += 1
    assert torch.equal(layer(torch.ones(1, 1, 2, 2)), torch.full((1, 1, 2, 2), 0.25))
