"""Tests of torch.func and forward mode through scores: against autograd and central differences."""

import copy
from functools import cache

import pytest
import torch
from small_models import fitted, make_images, options, small_network
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp
from torch.func import vmap as torch_vmap

from torchdnr import DNR, NR, RBFSVM
from torchdnr.kernels import rbf_scores


def make_svm(seed=0, **options):
    torch.manual_seed(seed)
    x = torch.randn(60, 4, dtype=torch.float64)
    y = torch.arange(60) % 3
    x[:, 0] += y
    return RBFSVM(C=3.0, gamma=0.2, **options).fit(x, y)


def make_dnr(kind):
    torch.manual_seed(0)
    images = make_images(30)
    net = small_network()
    if kind == "NR":
        model = NR(net, "logits", **options("logits", gamma=0.1))
    else:
        model = DNR(net, ["conv", "logits"], **options("conv", "logits", "combiner"))
    return fitted(model, images).double(), images[:5].double()


CASES = {
    "svm": lambda: (make_svm(), torch.randn(5, 4, dtype=torch.float64)),
    "one-vs-one": lambda: (
        make_svm(strategy="one-vs-one"),
        torch.randn(5, 4, dtype=torch.float64),
    ),
    "DNR": lambda: make_dnr("DNR"),
    "NR": lambda: make_dnr("NR"),
}
METHODS = [("svm", "forward"), ("one-vs-one", "forward")]
METHODS += [(kind, method) for kind in ("DNR", "NR") for method in ("scores", "forward")]


made = cache(lambda kind: CASES[kind]())


@pytest.fixture(params=METHODS, ids="-".join)
def case(request):
    """Return a function of a batch, of one sample, and inputs."""
    kind, method = request.param
    model, inputs = made(kind)
    batch = model if method == "forward" else model.scores
    return batch, lambda sample: batch(sample[None])[0], inputs


def looped_jacobians(function, inputs):
    """Differentiate output by output and sample by sample, by plain autograd."""
    rows = []
    for sample in inputs:
        leaf = sample.clone().requires_grad_()
        outputs = function(leaf)
        found = [torch.autograd.grad(o, leaf, retain_graph=True)[0] for o in outputs]
        rows.append(torch.stack(found))
    return torch.stack(rows)


def differences(function, inputs, direction, step=1e-5):
    return (function(inputs + step * direction) - function(inputs - step * direction)) / (2 * step)


def test_vmap_gives_the_scores_of_the_batch(case):
    batch, one, inputs = case
    torch.testing.assert_close(torch_vmap(one)(inputs), batch(inputs))
    pairs = torch.stack([inputs, 0.5 * inputs], dim=1)
    expected = torch.stack([batch(inputs), batch(0.5 * inputs)], dim=1)
    torch.testing.assert_close(torch_vmap(batch, in_dims=1, out_dims=1)(pairs), expected)
    torch.testing.assert_close(torch_vmap(torch_vmap(one))(pairs), expected)


def test_per_sample_gradients_are_those_of_a_loop(case):
    _, one, inputs = case
    loss = lambda sample: (one(sample) * torch.linspace(1, 2, len(one(sample)))).sum()  # noqa: E731
    leaves = [sample.clone().requires_grad_() for sample in inputs]
    expected = torch.stack([torch.autograd.grad(loss(leaf), leaf)[0] for leaf in leaves])
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(torch_vmap(grad(loss))(inputs), expected)
    torch.testing.assert_close(torch.stack([grad(loss)(sample) for sample in inputs]), expected)


def test_jacobians_are_those_of_a_loop_over_outputs(case):
    _, one, inputs = case
    expected = looped_jacobians(one, inputs)
    torch.testing.assert_close(torch_vmap(jacrev(one))(inputs), expected)
    torch.testing.assert_close(torch_vmap(jacfwd(one))(inputs), expected)
    with torch.no_grad():
        torch.testing.assert_close(jacrev(one)(inputs[0]), expected[0])
    vectorised = torch.autograd.functional.jacobian(one, inputs[0], vectorize=True)
    torch.testing.assert_close(vectorised, expected[0])


def test_jvp_is_the_central_difference(case):
    batch, _, inputs = case
    direction = torch.randn_like(inputs)
    value, slope = jvp(batch, (inputs,), (direction,))
    torch.testing.assert_close(value, batch(inputs))
    torch.testing.assert_close(slope, differences(batch, inputs, direction), rtol=1e-5, atol=1e-7)
    with forward_ad.dual_level():
        dual = batch(forward_ad.make_dual(inputs, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, slope)
    _, pull = vjp(batch, inputs)
    weight = torch.randn_like(value)
    torch.testing.assert_close((weight * slope).sum(), (pull(weight)[0] * direction).sum())


def test_hessians_are_those_of_double_backward(case):
    _, one, inputs = case
    function = lambda sample: one(sample).square().sum()  # noqa: E731
    sample = inputs[0]
    expected = torch.autograd.functional.hessian(function, sample)
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(hessian(function)(sample), expected)
    torch.testing.assert_close(jacrev(jacrev(function))(sample), expected)
    torch.testing.assert_close(jacfwd(jacfwd(function))(sample), expected)
    direction = torch.randn_like(sample)
    product = jvp(grad(function), (sample,), (direction,))[1]
    slopes = differences(grad(function), sample, direction)
    torch.testing.assert_close(product, slopes, rtol=1e-4, atol=1e-7)


def problem(n=4, m=3, d=2, c=2):
    tensors = [torch.randn(*shape, dtype=torch.float64) for shape in ((n, d), (m, d), (m, c))]
    return [t.requires_grad_() for t in (*tensors, torch.tensor(0.3, dtype=torch.float64))]


def test_forward_mode_by_every_argument_passes_gradcheck():
    leaves, center = problem(), torch.randn(2, dtype=torch.float64)
    scores = lambda *tensors: rbf_scores(*tensors, center)  # noqa: E731
    checks = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(scores, leaves, **checks, check_batched_forward_grad=True)
    assert torch.autograd.gradgradcheck(
        scores, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
    )


@pytest.mark.parametrize("argument", range(4))
def test_vmap_over_any_argument_is_a_loop(argument):
    tensors = [t.detach() for t in problem()]
    several = torch.stack([tensors[argument], 0.7 * tensors[argument]])
    in_dims = tuple(0 if number == argument else None for number in range(4))
    given = [several if number == argument else t for number, t in enumerate(tensors)]
    loss = lambda *t: rbf_scores(*t).square().sum()  # noqa: E731
    got = torch_vmap(grad(loss, argnums=(0, 1, 2, 3)), in_dims)(*given)
    for number, value in enumerate(several):
        leaves = [value if n == argument else t for n, t in enumerate(tensors)]
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        expected = torch.autograd.grad(rbf_scores(*leaves).square().sum(), leaves)
        torch.testing.assert_close([part[number] for part in got], list(expected))


def test_an_ensemble_of_svms_is_scored_at_once_and_leaves_nothing_behind():
    svms = [make_svm(), make_svm()]
    svms[1].dual_coef *= 0.5
    svms[1].support_vectors += 0.1
    inputs = torch.randn(6, 4, dtype=torch.float64)
    expected = torch.stack([svm(inputs) for svm in svms])
    parameters, buffers = stack_module_state(svms)
    for held in (parameters, buffers):
        for name in held:
            held[name] = held[name].detach()
    base = copy.deepcopy(svms[0])

    def scores(parameters, buffers):
        return functional_call(base, (parameters, buffers), (inputs,))

    torch.testing.assert_close(torch_vmap(scores)(parameters, buffers), expected)
    torch.testing.assert_close(copy.deepcopy(base)(inputs), expected[0])
    torch.testing.assert_close(base(inputs), expected[0])


def test_ordinary_gradients_may_flow_through_a_transform():
    svm = make_svm()
    inputs = torch.randn(4, dtype=torch.float64)
    lengthscale = svm.kernel.raw_lengthscale.requires_grad_()
    slope = grad(lambda x: svm(x[None])[0, 0])(inputs)
    (got,) = torch.autograd.grad(slope.square().sum(), lengthscale)
    leaf = inputs.clone().requires_grad_()
    (slope,) = torch.autograd.grad(svm(leaf[None])[0, 0], leaf, create_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(slope.square().sum(), lengthscale)[0])


def test_transforms_keep_full_precision_under_a_lower_global_switch():
    svm = make_svm()
    inputs = torch.randn(6, 4)
    svm.float()
    evaluate = lambda: (  # noqa: E731
        torch_vmap(jacrev(lambda x: svm(x[None])[0]))(inputs),
        jvp(svm, (inputs,), (torch.ones_like(inputs),)),
    )
    expected = evaluate()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        torch.testing.assert_close(evaluate(), expected, rtol=0, atol=0)
    finally:
        torch.set_float32_matmul_precision(before)
