import gpytorch
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from torchdnr.kernels import (
    full_precision,
    kernel_matrix,
    kernel_scores,
    make_rbf_kernel,
    rbf_gamma,
    rbf_scores,
    scale_gamma,
    squared_distances,
)

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def problem(n=7, m=5, d=4, c=3, dtype=torch.float64, device="cpu"):
    make = lambda *shape: torch.randn(*shape, dtype=dtype, device=device)  # noqa: E731
    gamma = torch.tensor(0.3, dtype=dtype, device=device)
    return make(n, d), make(m, d), make(m, c), gamma, make(d)


def plain_scores(inputs, vectors, coefficients, gamma):
    differences = inputs.unsqueeze(1) - vectors.unsqueeze(0)
    return (-gamma * differences.square().sum(2)).exp() @ coefficients


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_distances_are_those_of_the_plain_formula_even_far_from_the_origin(device, dtype, tol):
    a, b, _, _, _ = problem(n=40, m=30, d=64, dtype=torch.float64, device=device)
    a, b = (a + 100).to(dtype), (b + 100).to(dtype)
    exact = torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist") ** 2
    torch.testing.assert_close(
        squared_distances(a, b, a.mean(0)).double(), exact, rtol=tol, atol=tol
    )
    assert (squared_distances(a, a, a.mean(0)).diagonal() == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("block_elements", [1, 12, 10**6])
def test_scores_and_gradients_equal_the_plain_formula_in_any_block_size(device, n, block_elements):
    *tensors, gamma, center = problem(n=n, device=device)
    leaves = [t.requires_grad_() for t in (*tensors, gamma)]
    ours = rbf_scores(*leaves, center, block_elements=block_elements)
    plain = plain_scores(*leaves)
    torch.testing.assert_close(ours, plain)
    weight = torch.randn_like(plain)
    for got, expected in zip(
        torch.autograd.grad((ours * weight).sum(), leaves),
        torch.autograd.grad((plain * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("block_elements", [7, 10**6])
def test_first_and_second_derivatives_pass_gradcheck(block_elements):
    *tensors, gamma, center = problem(n=4, m=3, d=2, c=2)
    leaves = [t.requires_grad_() for t in (*tensors, gamma, center)]

    def scores(*arguments):
        return rbf_scores(*arguments, block_elements=block_elements)

    assert gradcheck(scores, leaves)
    assert gradgradcheck(scores, leaves)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("d", "offset"), [(30, 0.0), (512, 1.0), (8192, 5.0)])
def test_kernel_values_far_from_the_origin_are_those_of_direct_differences(device, d, offset):
    vectors = (torch.randn(40, d) + offset).to(device)
    inputs = torch.cat([torch.randn(20, d).to(device) + offset, vectors[:20] + 0.01, vectors[:9]])
    exact = torch.cdist(
        inputs.double(), vectors.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    expected = (-exact.square() / d).exp()
    gamma, identity = torch.tensor(1.0 / d, device=device), torch.eye(40, device=device)
    got = rbf_scores(inputs, vectors, identity, gamma, vectors.mean(0))
    assert (got.double() - expected).abs().max() < 2e-6
    assert got.max() <= 1.0


@pytest.mark.parametrize("device", DEVICES)
def test_tiles_change_scores_and_gradients_by_rounding_alone(device):
    inputs, vectors, coefficients, gamma, center = problem(n=1030, m=1100, device=device)
    leaves = [t.requires_grad_() for t in (inputs, vectors, coefficients, gamma, center)]

    def evaluate(block_elements):
        scores = rbf_scores(*leaves, block_elements=block_elements)
        return scores, *torch.autograd.grad(scores.square().sum(), leaves)

    whole = evaluate(2**24)  # kept for the gradient
    for block_elements in (2**18, 10**4, 700):
        for got, expected in zip(evaluate(block_elements), whole, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whole[0], plain_scores(*leaves[:4]))


def test_scores_of_a_row_do_not_depend_on_the_others():
    inputs, vectors, coefficients, gamma, center = problem(n=1100, m=700, d=30)
    alone = rbf_scores(inputs[40:41], vectors, coefficients, gamma, center)
    inputs[:40], inputs[41:] = 1e6, torch.nan
    for n in (41, 100, 1100):
        among = rbf_scores(inputs[:n], vectors, coefficients, gamma, center)
        torch.testing.assert_close(among[40:41], alone, rtol=1e-12, atol=1e-12)


def test_one_tensor_given_twice_gets_the_derivatives_of_both_arguments():
    points, _, coefficients, gamma, center = problem(n=4, m=4)
    points.requires_grad_()
    scores = rbf_scores(points, points, coefficients, gamma, center)
    plain = plain_scores(points, points, coefficients, gamma)
    found = [
        torch.autograd.grad(s.square().sum(), points, create_graph=True)[0] for s in (scores, plain)
    ]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*(torch.autograd.grad(f.square().sum(), points)[0] for f in found))


def test_second_derivatives_at_a_support_vector_survive_rounding():
    _, vectors, coefficients, gamma, center = problem(n=1, m=20, d=64, dtype=torch.float32)
    inputs = vectors.clone().requires_grad_()  # here rounding makes some distances negative

    def curvature(sums):
        (slope,) = torch.autograd.grad(sums.sum(), inputs, create_graph=True)
        return torch.autograd.grad(slope.sum(), inputs)[0]

    ours = rbf_scores(inputs, vectors, coefficients, gamma, center)
    plain = plain_scores(inputs, vectors, coefficients, gamma)
    torch.testing.assert_close(curvature(ours), curvature(plain), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("n", "m"), [(0, 5), (3, 0)])
def test_nothing_to_score_or_to_sum_gives_empty_or_zero_scores(n, m):
    inputs, vectors, coefficients, gamma, center = problem(n=n, m=m)
    inputs.requires_grad_()
    scores = rbf_scores(inputs, vectors, coefficients, gamma, center)
    assert torch.equal(scores, torch.zeros(n, 3, dtype=torch.float64))
    assert torch.equal(torch.autograd.grad(scores.sum(), inputs)[0], torch.zeros_like(inputs))


def test_scores_follow_tensors_that_change_in_place():
    inputs, vectors, coefficients, gamma, center = problem()
    rbf_scores(inputs, vectors, coefficients, gamma, center)
    vectors.data.mul_(2.0)
    coefficients.data.add_(1.0)
    center.data.add_(1.0)
    torch.testing.assert_close(
        rbf_scores(inputs, vectors, coefficients, gamma, center),
        plain_scores(inputs, vectors, coefficients, gamma),
    )


def test_scores_equal_gpytorch():
    inputs, vectors, coefficients, _, center = problem(dtype=torch.float32)
    kernel = make_rbf_kernel(0.3, inputs)
    torch.testing.assert_close(rbf_gamma(kernel), torch.tensor(0.3))
    expected = kernel(inputs, vectors).to_dense() @ coefficients
    torch.testing.assert_close(
        kernel_scores(kernel, inputs, vectors, coefficients, center), expected
    )
    torch.testing.assert_close(
        kernel_matrix(kernel, inputs, vectors, center) @ coefficients, expected
    )


def test_gamma_trains_through_the_lengthscale():
    inputs, vectors, coefficients, _, center = problem()
    kernel = make_rbf_kernel(0.3, inputs).requires_grad_()
    ours = kernel_scores(kernel, inputs, vectors, coefficients, center).sum()
    plain = (kernel(inputs, vectors).to_dense() @ coefficients).sum()
    (got,) = torch.autograd.grad(ours, kernel.raw_lengthscale)
    (expected,) = torch.autograd.grad(plain, kernel.raw_lengthscale)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "kernel",
    [
        gpytorch.kernels.MaternKernel(nu=2.5),
        gpytorch.kernels.RBFKernel(ard_num_dims=4),
        gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()),
        gpytorch.kernels.PolynomialKernel(power=2),
    ],
    ids=["matern", "ard", "scaled", "polynomial"],
)
def test_other_kernels_run_through_gpytorch_in_blocks(kernel):
    inputs, vectors, coefficients, _, center = problem()
    kernel = kernel.double()
    assert rbf_gamma(kernel) is None
    expected = kernel(inputs, vectors).to_dense() @ coefficients
    got = kernel_scores(kernel, inputs, vectors, coefficients, center, block_elements=10)
    torch.testing.assert_close(got, expected)


def test_scale_is_that_of_scikit_learn():
    from sklearn.svm import SVC

    features = torch.randn(30, 4) * 3 + 1
    svc = SVC(gamma="scale").fit(features.numpy(), torch.arange(30).numpy() % 2)
    assert scale_gamma(features) == pytest.approx(svc._gamma, rel=1e-5)
    assert scale_gamma(torch.ones(3, 2)) == 1.0


def current_precisions():
    return (
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.mkldnn.matmul.fp32_precision,
        torch.get_float32_matmul_precision(),
    )


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_full_precision_lifts_the_global_switch_and_puts_it_back(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        outside = current_precisions()
        with full_precision(torch.device("cpu")):
            assert torch.backends.cuda.matmul.fp32_precision in ("ieee", "none")
            assert torch.backends.mkldnn.matmul.fp32_precision in ("ieee", "none")
        assert current_precisions() == outside
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("device", DEVICES)
def test_neither_tf32_nor_autocast_reaches_scores_or_gradients(device):
    inputs, vectors, coefficients, gamma, center = problem(
        n=64, m=200, d=128, dtype=torch.float32, device=device
    )
    inputs.requires_grad_()

    def evaluate():
        scores = rbf_scores(inputs, vectors, 100 * coefficients, gamma / 30, center)
        return scores.detach(), torch.autograd.grad(scores.sum(), inputs)[0]

    expected = evaluate()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(device, dtype=torch.bfloat16):
            got = evaluate()
    finally:
        torch.set_float32_matmul_precision(before)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == torch.float32
        assert torch.equal(g, e)


def test_full_precision_leaves_an_inherited_setting_inherited():
    before, explicit = torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.backends.fp32_precision = "tf32"
        with full_precision(torch.device("cpu")):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before
        torch.backends.cuda.matmul.fp32_precision = explicit
