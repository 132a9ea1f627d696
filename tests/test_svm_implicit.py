import pytest
import torch

from torchdnr.svm import RBFSVM
from torchdnr.svm.implicit import implicit_solution, svm_scores


def blobs(n=30, d=3, c=3, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % c
    centres = 2 * torch.randn(c, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return centres[labels] + spread * noise, labels, centres[:2] + 0.3


@pytest.mark.parametrize("C", [0.3, 2.0, 1e3])
def test_scores_are_those_of_a_fitted_svm(C):
    features, labels, inputs = blobs()
    svm = RBFSVM(C=C, gamma=0.2, tol=1e-6).fit(features, labels)
    scores = svm_scores(features, labels, inputs, C=C, gamma=0.2)
    assert torch.allclose(scores, svm(inputs), atol=1e-5)


@pytest.mark.parametrize("C", [0.3, 2.0, 1e3])
def test_derivatives_are_those_of_refits(C):
    """gradcheck solves the problem anew for every central difference."""
    features, labels, inputs = blobs(15, d=2)
    given = [
        features.requires_grad_(),
        inputs.requires_grad_(),
        torch.full((3,), C, dtype=torch.float64, requires_grad=True),
        torch.tensor(0.2, dtype=torch.float64, requires_grad=True),
        torch.linspace(0.7, 1.3, 15, dtype=torch.float64).requires_grad_(),
    ]

    def scores(features, inputs, C, gamma, weight):
        return svm_scores(features, labels, inputs, C=C, gamma=gamma, sample_weight=weight)

    near = {"eps": 1e-6, "atol": 1e-4, "rtol": 1e-3}
    assert torch.autograd.gradcheck(scores, given, fast_mode=True, **near)


def test_hundreds_of_real_samples_agree_with_refits():
    from sklearn.datasets import load_digits

    data = load_digits()
    features = torch.tensor(data.data[:300] / 16, dtype=torch.float64)
    labels = torch.tensor(data.target[:300])
    inputs = torch.tensor(data.data[300:310] / 16, dtype=torch.float64)
    weights = torch.randn(10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def value(features, C, gamma):
        return (weights * svm_scores(features, labels, inputs, C=C, gamma=gamma)).sum()

    C, gamma = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.0, 0.05))
    leaf = features.clone().requires_grad_()
    gradients = torch.autograd.grad(value(leaf, C, gamma), (leaf, C, gamma))
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(features.shape, dtype=torch.float64, generator=generator)
    eps = 1e-5
    with torch.no_grad():
        by_features = value(features + eps * direction, C, gamma)
        by_features = (by_features - value(features - eps * direction, C, gamma)) / (2 * eps)
        by_C = (value(features, C + eps, gamma) - value(features, C - eps, gamma)) / (2 * eps)
        by_gamma = value(features, C, gamma + 1e-6) - value(features, C, gamma - 1e-6)
    assert (gradients[0] * direction).sum().item() == pytest.approx(by_features.item(), rel=1e-4)
    assert gradients[1].item() == pytest.approx(by_C.item(), rel=1e-4)
    assert gradients[2].item() == pytest.approx((by_gamma / 2e-6).item(), rel=1e-4)


def test_episodes_are_fits_of_their_own():
    episodes = [blobs(15, seed=seed) for seed in range(4)]
    features, inputs = (torch.stack([e[i] for e in episodes]) for i in (0, 2))
    labels = torch.stack([e[1] for e in episodes])
    features.requires_grad_()
    together = svm_scores(features, labels, inputs, C=1.0, gamma=0.2)
    gradient = torch.autograd.grad(together.square().sum(), features)[0]
    for k, (one, classes, x) in enumerate(episodes):
        leaf = one.clone().requires_grad_()
        alone = svm_scores(leaf, classes, x, C=1.0, gamma=0.2)
        assert torch.allclose(together[k], alone, atol=1e-6)
        expected = torch.autograd.grad(alone.square().sum(), leaf)[0]
        assert torch.allclose(gradient[k], expected, atol=1e-5)


def test_duplicates_leave_gradients_finite():
    features, labels, inputs = blobs()
    features, labels = features.repeat(2, 1).requires_grad_(), labels.repeat(2)
    svm_scores(features, labels, inputs, C=1e3, gamma=0.2).sum().backward()
    assert features.grad.isfinite().all()


def test_a_sample_at_margin_and_bound_is_told():
    """Two samples: alpha = 1 / (1 - k) for large C; with C right there both lie at the margin."""
    features = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    targets = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    gamma = torch.tensor(1.0, dtype=torch.float64)
    alpha = 1 / (1 - torch.exp(torch.tensor(-1.0, dtype=torch.float64)))
    free = implicit_solution(features, targets, 2 * alpha, gamma)
    assert not free.degenerate.any()
    assert torch.allclose(free.dual_coef.abs(), alpha.expand(2, 1))
    assert implicit_solution(features, targets, alpha * (1 - 1e-12), gamma).degenerate.all()


def test_float32_is_as_good_as_its_digits():
    features, labels, inputs = blobs()
    wide = features.clone().requires_grad_()
    svm_scores(wide, labels, inputs, C=2.0, gamma=0.2).sum().backward()
    leaf = features.float().requires_grad_()
    svm_scores(leaf, labels, inputs.float(), C=2.0, gamma=0.2).sum().backward()
    assert leaf.grad.dtype == torch.float32
    assert torch.allclose(leaf.grad.double(), wide.grad, atol=1e-3 * wide.grad.abs().max())


def test_shapes_that_do_not_fit_are_refused():
    features, labels, inputs = blobs()
    with pytest.raises(ValueError, match=r"expected features \(e, n, d\)"):
        svm_scores(features, labels[None], inputs, gamma=0.2)
    with pytest.raises(ValueError, match=r"inputs \(e, m, d\)"):
        svm_scores(features, labels, inputs[:, :2], gamma=0.2)
    with pytest.raises(ValueError, match="gamma must be one number > 0"):
        svm_scores(features, labels, inputs, gamma=-0.5)


@pytest.mark.parametrize(("gamma", "strategy"), [("scale", "one-vs-rest"), (0.2, "one-vs-one")])
def test_a_fit_with_its_graph_differentiates_scores_into_its_samples(gamma, strategy):
    """gradcheck fits anew for every central difference."""
    features, labels, inputs = blobs(15, d=2)
    weight = torch.linspace(0.7, 1.3, 15, dtype=torch.float64)

    def scores(features, weight):
        svm = RBFSVM(C=2.0, gamma=gamma, strategy=strategy)
        svm.fit(features, labels, sample_weight=weight, differentiable=True)
        return svm(inputs, vote=False)

    given = (features.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(scores, given, eps=1e-6, atol=1e-4, rtol=1e-3, fast_mode=True)
    plain = RBFSVM(C=2.0, gamma=gamma, strategy=strategy, tol=1e-6)
    plain.fit(features, labels, sample_weight=weight)
    assert torch.allclose(scores(*given), plain(inputs, vote=False), atol=1e-5)


def test_a_fit_with_its_graph_says_what_it_is():
    features, labels, inputs = blobs()
    weight = torch.ones(30)
    weight[3] = 0.0
    svm = RBFSVM(C=2.0, gamma=0.2)
    svm.fit(features.requires_grad_(), labels, sample_weight=weight, differentiable=True)
    assert svm.solution.converged.all() and svm.solution.samples == 30
    assert svm.degenerate.shape == (30, 3) and 3 not in svm.support
    (gradient,) = torch.autograd.grad(svm(inputs).sum(), features)
    assert gradient[svm.support].abs().max() > 0 == gradient[3].abs().max()
    loaded = RBFSVM()
    loaded.load_state_dict(svm.state_dict())
    assert torch.equal(loaded(inputs), svm(inputs)) and not loaded(inputs).requires_grad
    assert svm.fit(features, labels).degenerate is None and not svm(inputs).requires_grad


def test_a_graph_needs_the_kernel_of_width_gamma():
    from gpytorch.kernels import MaternKernel

    features, labels, _ = blobs()
    with pytest.raises(ValueError, match="differentiable=True needs the RBF kernel"):
        RBFSVM(kernel=MaternKernel()).fit(features, labels, differentiable=True)


def test_the_derivative_to_the_other_side_of_a_kink():
    """At a sample that just reaches its bound, C moves the scores to one side only."""
    features = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    targets = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    gamma = torch.tensor(1.0, dtype=torch.float64)
    exact = 1 / (1 - torch.exp(-gamma))  # alpha without bounds
    limit = exact.clone().requires_grad_()
    slopes = []
    for other_side in (False, True):
        solution = implicit_solution(
            features, targets, limit.expand(2, 1), gamma, other_side=other_side
        )
        slopes.append(torch.autograd.grad(solution.dual_coef[0, 0], limit)[0].item())
    assert solution.degenerate.all()
    assert slopes == pytest.approx([1.0, 0.0], abs=1e-6)
