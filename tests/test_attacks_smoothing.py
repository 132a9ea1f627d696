"""Smoothed views of a classifier, and the attack that follows their gradients."""

from functools import partial

import gpytorch
import pytest
import torch
from attack_promises import (
    EPS,
    NORMS,
    Bumps,
    check_budget,
    check_chunks,
    check_model_is_unchanged,
    check_seed,
    check_success,
    check_targeted,
    measure,
    not_worse,
)
from torch import nn

from torchdnr import DNR, NR
from torchdnr.attacks import evades, pgd, smoothed_pgd
from torchdnr.kernels import rbf_gamma
from torchdnr.svm import RBFSVM, NotFittedError

QUICK = partial(smoothed_pgd, steps=5, factors=(0.1, 1.0))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_to_ball_and_box(norm, dtype):
    check_budget(QUICK, norm, dtype)


def test_promises():
    check_chunks(QUICK)
    check_model_is_unchanged(QUICK)
    check_seed(partial(QUICK, random_start=True))


@pytest.mark.parametrize("norm", NORMS)
def test_finds_in_the_plane_what_brute_force_finds(norm):
    check_success(partial(smoothed_pgd, steps=30, factors=(0.1, 1.0), restarts=2), norm)


def test_finds_targets():
    check_targeted(partial(smoothed_pgd, steps=30, factors=(0.1, 1.0), restarts=2))


def clusters(dtype=torch.float32):
    """Three tight clusters in the plane, far apart for a narrow kernel."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.tensor([[0.2, 0.2], [0.8, 0.2], [0.5, 0.8]], dtype=dtype)
    noise = torch.randn(120, 2, generator=generator, dtype=torch.float64)
    inputs = (corners.repeat(40, 1) + 0.03 * noise.to(dtype)).clamp(0, 1)
    return inputs, torch.arange(3).repeat(40), corners


def classifier(kind, gamma=2000.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 8), nn.ReLU()).to(dtype)
    weight = torch.randn(8, 2, generator=generator).to(dtype)
    with torch.no_grad():
        net[1].weight.copy_(weight)
        net[1].bias.copy_(0.5 - 0.5 * weight.sum(dim=1))
    inputs, labels, _ = clusters(dtype)
    if kind == "NR":
        model = NR(net, "0", hyperparameters={"0": (10.0, gamma)})
    else:
        pairs = {"0": (10.0, gamma), "1": (10.0, gamma / 4), "combiner": (1.0, 2.0)}
        model = DNR(net, ["0", "1"], hyperparameters=pairs)
    return model.fit(inputs, labels).calibrate(inputs, 0.2).eval()


@pytest.mark.parametrize("kind", [pytest.param("NR", marks=pytest.mark.slow), "DNR"])
def test_succeeds_where_gradients_vanish_and_pgd_fails(kind):
    model = classifier(kind)
    inputs, labels, _ = clusters()
    kept = model.predict(inputs) == labels
    inputs, labels = inputs[kept][:12], labels[kept][:12]
    far = (inputs + inputs.flip(0)) / 2  # between the clusters: nothing to follow
    far = far[torch.cdist(far, clusters()[2]).amin(dim=1) > 0.3].requires_grad_()
    gradient = torch.autograd.grad(model.scores(far)[:, 0].sum(), far)[0]
    assert len(far) > 3 and (gradient == 0).all()
    plain = pgd(model, inputs, labels, 0.7, steps=20)
    assert not evades(model(plain), labels, True).any()
    points = smoothed_pgd(model, inputs, labels, 0.7, steps=15)
    assert evades(model(points), labels, True).float().mean() >= 0.7


def test_a_clean_point_without_any_gradient_is_led_away():
    model = classifier("NR")
    inputs = torch.tensor([[0.5, 0.45]])  # rejected, and flat in float32
    labels = torch.tensor([0])
    x = inputs.clone().requires_grad_()
    for k in range(3):
        assert (torch.autograd.grad(model.scores(x)[0, k], x)[0] == 0).all()
    assert torch.equal(pgd(model, inputs, labels, 0.5), inputs)
    points = smoothed_pgd(model, inputs, labels, 0.5, steps=25)
    assert evades(model(points), labels, True).all()


@pytest.mark.parametrize("kind", ["NR", "DNR"])
def test_a_view_has_other_gammas_and_shares_the_rest(kind):
    model = classifier(kind, gamma=30.0, dtype=torch.float64)
    inputs, _, _ = clusters(torch.float64)
    expected, state = model(inputs), {k: v.clone() for k, v in model.state_dict().items()}
    view = model.smoothed(0.25)
    assert view.reject_index == 3 and view.net is model.net

    def scores(svm, z, factor):
        square = (z[:, None] - svm.support_vectors).square().sum(dim=2)
        return torch.exp(-factor * rbf_gamma(svm.kernel) * square) @ svm.dual_coef + svm.intercept

    def by_hand(factors):
        features = model.features(inputs)
        svms = zip(model.layers, model.base_svms, strict=True)
        base = [scores(svm, features[name], factors[name]) for name, svm in svms]
        return (
            base[0]
            if kind == "NR"
            else scores(model.combiner, torch.cat(base, 1), factors["combiner"])
        )

    names = [*model.layers, "combiner"]
    torch.testing.assert_close(view(inputs)[:, :3], by_hand(dict.fromkeys(names, 0.25)))
    assert torch.equal(view(inputs)[:, 3], expected[:, 3])  # theta
    for mine, its in zip(model.base_svms, view.base_svms, strict=True):
        for name in ("support_vectors", "dual_coef", "intercept", "center"):
            assert getattr(mine, name) is getattr(its, name)
    if kind == "DNR":
        for chosen in (["combiner"], ["0", "1"], ["1"], []):
            factors = {name: 0.25 if name in chosen else 1.0 for name in names}
            some = model.smoothed(0.25, svms=chosen)
            torch.testing.assert_close(some(inputs)[:, :3], by_hand(factors))
    assert torch.equal(model(inputs), expected)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model.set_threshold(7.0)
    assert torch.equal(view(inputs)[:, 3], expected[:, 3])
    model.fit(*clusters(torch.float64)[:2])
    torch.testing.assert_close(view.smoothed(4.0)(inputs)[:, :3], expected[:, :3])


@pytest.mark.parametrize(
    "kernel",
    [
        gpytorch.kernels.MaternKernel(nu=2.5),
        gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()),
    ],
)
def test_other_kernels_with_a_lengthscale_are_smoothed_too(kernel):
    inputs, labels, _ = clusters(torch.float64)
    svm = RBFSVM(kernel=kernel).fit(inputs, labels)
    view = svm.smoothed(0.25)
    # a lengthscale twice as large is the same as features half as large
    with torch.no_grad():
        values = svm.kernel(inputs / 2, svm.support_vectors / 2).to_dense()
        torch.testing.assert_close(view(inputs), values @ svm.dual_coef + svm.intercept)


def test_a_view_of_nothing_is_refused():
    inputs, labels, _ = clusters()
    with pytest.raises(NotFittedError, match="this RBFSVM is not fitted"):
        RBFSVM().smoothed(0.5)
    with pytest.raises(NotFittedError, match="this NR is not fitted"):
        NR(nn.Sequential(nn.Flatten()), "0").smoothed(0.5)
    model = classifier("DNR", gamma=30.0)
    for factor in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="factor must be > 0 and finite"):
            model.smoothed(factor)
    with pytest.raises(ValueError, match=r"svms must be named after \['0', '1', 'combiner'\]"):
        model.smoothed(0.5, svms=["fc1"])
    linear = RBFSVM(kernel=gpytorch.kernels.LinearKernel()).fit(inputs, labels)
    with pytest.raises(ValueError, match="needs a kernel with a lengthscale, got LinearKernel"):
        linear.smoothed(0.5)
    given = RBFSVM(kernel="precomputed").fit(inputs @ inputs.T, labels)
    with pytest.raises(ValueError, match="needs a kernel with a lengthscale, got a precomputed"):
        given.smoothed(0.5)


def test_takes_the_view_from_an_argument_where_the_model_has_none():
    model = Bumps().eval()
    inputs, labels = model.samples(10)

    def bare(x):
        return model(x)

    attack = partial(smoothed_pgd, steps=5)
    with pytest.raises(ValueError, match=r"model must have a method smoothed.* got function"):
        attack(bare, inputs, labels, 0.2, reject=True)
    expected = attack(model, inputs, labels, 0.2)
    given = attack(bare, inputs, labels, 0.2, reject=True, smoothed=model.smoothed)
    assert torch.equal(given, expected)
    assert torch.equal(
        attack(bare, inputs, labels, 0.2, reject=True, factors=(1.0,)),
        pgd(model, inputs, labels, 0.2, steps=5),
    )


def test_what_a_view_finds_is_judged_on_the_model():
    model = Bumps().eval()
    inputs, labels = model.samples(20)

    def misleading(factor):
        return lambda x: -model(x)[:, [0, 1, 2, 3]]

    points = smoothed_pgd(model, inputs, labels, EPS[2], smoothed=misleading, factors=(0.5,))
    assert not_worse(measure(model, points, labels), measure(model, inputs, labels))
    start = pgd(model, inputs, labels, EPS[2])
    points = smoothed_pgd(model, inputs, labels, EPS[2], steps=3, start=start)
    assert not_worse(measure(model, points, labels), measure(model, start, labels))


def test_bad_options_are_refused():
    model = Bumps().eval()
    inputs, labels = model.samples(2)
    for change, message in (
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"factors": ()}, "factors must be >= 1, got 0"),
        ({"factors": (0.0, 1.0)}, "factors must be > 0 and finite"),
    ):
        with pytest.raises(ValueError, match=message):
            smoothed_pgd(model, inputs, labels, 0.1, **change)
