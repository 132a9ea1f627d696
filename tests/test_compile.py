"""Tests of torch.compile, autocast and channels_last: the scores are those of the eager model."""

import copy
import shutil

import pytest
import torch
from gpytorch.kernels import MaternKernel
from small_models import fitted, make_images, options, small_dnr, small_network
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchvision import models

from torchdnr import DNR, NR
from torchdnr.attacks import line_search_pgd
from torchdnr.decisions import NotFittedError
from torchdnr.features.layers import LayerFeatures
from torchdnr.kernels.rbf import (
    compiled_rbf_scores,
    rbf_scores,
    scores_and_kernel,
    squared_norms,
    traced_rbf_scores,
)
from torchdnr.svm import RBFSVM

INDUCTOR = pytest.param(
    "inductor",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(
            not any(map(shutil.which, ("g++", "clang++", "cl"))),
            reason="inductor needs a C++ compiler",
        ),
    ],
)


@pytest.fixture(autouse=True)
def _afresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def fitted_once():
    torch.manual_seed(0)
    images = make_images(30)
    return images, small_dnr(images)


@pytest.fixture
def images(fitted_once):
    return fitted_once[0].clone()


@pytest.fixture
def model(fitted_once):
    return copy.deepcopy(fitted_once[1])


def scores_and_gradient(model, images):
    leaf = images.clone().requires_grad_()
    output = model(leaf)
    weight = torch.linspace(1, 2, output.shape[1] - 1)
    (gradient,) = torch.autograd.grad((output[:, :-1] * weight).sum(), leaf)
    return output.detach(), gradient


def assert_same(got, expected, tol=1e-4):
    """Compare relative to the scale of each: float32 sums in another order differ."""
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=tol * e.abs().max().item())


@pytest.mark.parametrize("backend", [pytest.param("aot_eager", marks=pytest.mark.slow), INDUCTOR])
def test_compiled_scores_and_gradients_are_the_eager_ones(model, images, backend):
    expected = scores_and_gradient(model, images[:8])
    assert expected[0].std(0)[:-1].min() > 0.1 and expected[1].abs().max() > 0
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_same(scores_and_gradient(compiled, images[:8]), expected)
    with torch.no_grad():
        assert_same([compiled(images[:8])], expected[:1])


@pytest.mark.slow
def test_recompiled_once_for_the_smaller_last_batch_and_never_again(model, images):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    batches = [*images.split(8), *images.split(7), *images.split(11)]
    assert {len(batch) for batch in batches} == {8, 6, 7, 2, 11}
    counts = []
    for batch in batches:
        scores_and_gradient(compiled, batch)
        counts.append(counter.frame_count)
    assert counts[:4] == [1, 1, 1, 2] and set(counts[4:]) == {2}
    assert_same(scores_and_gradient(compiled, images), scores_and_gradient(model, images))


def test_network_is_left_as_found(images):
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Dropout(0.9), nn.Linear(5, 2))
    net[0].weight.requires_grad_(False)
    net[3].eval()
    handle = net[0].register_forward_hook(lambda module, inputs, output: output + 1)
    hooks = [module._forward_hooks for module in net.modules()]
    flags = [module.training for module in net.modules()]
    inputs = torch.rand(3, 4)
    features = LayerFeatures(net, ["0", "2"])
    expected = features(inputs)
    compiled = torch.compile(features, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert_same(compiled(inputs).values(), expected.values())
        # The very same dictionaries: the handles of the user's own hooks point at them.
        assert all(m._forward_hooks is h for m, h in zip(net.modules(), hooks, strict=True))
        assert [len(h) for h in hooks] == [0, 1, 0, 0, 0]
        assert [module.training for module in net.modules()] == flags
    assert not net[0].weight.requires_grad and net[3].weight.requires_grad
    handle.remove()
    without = features(inputs)
    assert not torch.allclose(without["0"], expected["0"])
    assert_same(compiled(inputs).values(), without.values())


def test_layer_under_two_names_and_deep_copy():
    shared = nn.Linear(3, 3)
    features = LayerFeatures(nn.Sequential(shared, nn.Tanh(), shared), ["0", "2"])
    # named_modules() tells of one name, get_submodule() of both.
    features.layers = ("0", "2")
    inputs = torch.rand(4, 3)
    expected = features(inputs)
    compiled = torch.compile(features, backend="aot_eager", fullgraph=True)
    assert_same(compiled(inputs).values(), expected.values())
    assert_same(compiled(inputs).values(), copy.deepcopy(features)(inputs).values())


@pytest.mark.slow
def test_torchvision_network():
    layers = ["features.10", "classifier"]
    net = models.squeezenet1_1(weights=None, num_classes=3).eval()
    images = make_images(12, 3, 40)
    model = fitted(DNR(net, layers, **options(*layers, "combiner")), images)
    expected = scores_and_gradient(model, images[:4])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(scores_and_gradient(compiled, images[:4]), expected)
    channels_last = images[:4].to(memory_format=torch.channels_last)
    assert_same(scores_and_gradient(model, channels_last), expected)


@pytest.mark.slow
def test_nr_compiled_in_place_serves_predict_and_attacks(images):
    model = fitted(NR(small_network(), "logits", **options("logits", gamma=1.0)), images)
    labels = model.predict(images)
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter)
    assert torch.equal(model.predict(images), labels)
    assert counter.frame_count == 1
    chosen, truth = images[:4], torch.arange(4) % 3
    adversarial = line_search_pgd(model, chosen, truth, eps=0.5, norm=2, steps=3)
    assert counter.frame_count > 1
    margin = lambda x: model(x)[range(4), truth] - model(x)[:, :-1].sum(1)  # noqa: E731
    assert (margin(adversarial) < margin(chosen)).all()


def test_model_from_a_file_is_compiled_whole(model, images, tmp_path):
    model.save(tmp_path / "dnr.safetensors")
    loaded = DNR.load(tmp_path / "dnr.safetensors", model.net)
    compiled = torch.compile(loaded, backend="aot_eager", fullgraph=True)
    assert_same([compiled(images)], [model(images)])


@pytest.mark.slow
def test_missing_threshold_is_told_by_the_compiled_model_too(model, images):
    model.reset_threshold()
    with pytest.raises(NotFittedError, match="threshold is not set"):
        torch.compile(model, backend="aot_eager")(images)
    model.set_threshold(0.5)
    assert (torch.compile(model, backend="aot_eager")(images)[:, -1] == 0.5).all()


def test_a_change_between_forward_and_backward_leaves_the_gradient_of_the_forward(model, images):
    compiled = torch.compile(model, backend="aot_eager")
    _, expected = scores_and_gradient(model, images[:8])
    leaf = images[:8].clone().requires_grad_()
    output = compiled(leaf)
    model.base_svms[0].support_vectors.mul_(1.1)
    model(images[:8])
    (output[:, :-1] * torch.linspace(1, 2, 3)).sum().backward()
    assert_same([leaf.grad], [expected])
    model.base_svms[0].dual_coef.mul_(1.1)
    output = compiled(images[:8].clone().requires_grad_())
    model.base_svms[0].dual_coef.mul_(1.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [None, "matern"])
def test_svm_alone(kernel):
    features = torch.randn(20, 4)
    svm = RBFSVM(gamma=0.1, kernel=kernel and MaternKernel(nu=1.5))
    svm.fit(features, torch.arange(20) % 2)
    compiled = torch.compile(svm, backend="aot_eager")
    assert_same([compiled(features[:5])], [svm(features[:5])])


def problem(dtype=torch.float64, n=7, m=5, d=4, c=3):
    tensors = [torch.randn(*shape, dtype=dtype) for shape in ((n, d), (m, d), (m, c))]
    return [t.requires_grad_() for t in (*tensors, torch.tensor(0.3, dtype=dtype))]


def less(center, tensors):
    """Measure inputs and vectors from the center."""
    inputs, vectors, *others = tensors
    return inputs - center, vectors - center, *others


def compiled(inputs, vectors, coefficients, gamma):
    norms = squared_norms(vectors.detach())
    return compiled_rbf_scores(inputs, vectors, coefficients, gamma, norms)


def test_traced_formula_has_the_scores_and_gradients_of_the_fused_one():
    leaves, center = problem(), torch.randn(4, dtype=torch.float64)
    ours, fused = traced_rbf_scores(*less(center, leaves)), rbf_scores(*leaves, center)
    torch.testing.assert_close(ours, fused)
    gradients = (torch.autograd.grad(s.square().sum(), leaves) for s in (ours, fused))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(lambda *t: traced_rbf_scores(*less(center, t)), leaves)


@pytest.mark.parametrize("chosen", [(0,), (0, 1), (1, 2, 3), (0, 1, 2, 3)])
def test_operator_has_the_gradients_of_the_fused_function(chosen):
    leaves, center = problem(m=700), torch.randn(4, dtype=torch.float64)  # several tiles
    for number, leaf in enumerate(leaves):
        leaf.requires_grad_(number in chosen)
    wanted, found = [leaves[number] for number in chosen], []
    for function in (compiled, lambda *tensors: rbf_scores(*tensors, center)):
        scores = function(*(leaves if function is not compiled else less(center, leaves)))
        found.append([scores, *torch.autograd.grad(scores.square().sum(), wanted)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("keep_kernel", [False, True])
def test_operator_is_sound(keep_kernel):
    leaves = problem(torch.float32)
    norms = squared_norms(leaves[1].detach())
    torch.library.opcheck(scores_and_kernel, (*leaves, norms, keep_kernel))


@pytest.mark.slow
def test_no_kernel_is_kept_where_no_gradient_is_wanted(model, images):
    sizes = []
    keep = lambda graph, _: sizes.append(kernel_sizes(graph)) or graph.forward  # noqa: E731
    compiled = torch.compile(model, backend=keep)
    with torch.no_grad():
        compiled(images[:8])
    compiled(images[:8].clone().requires_grad_())
    without, wanted = sizes
    assert len(without) == len(wanted) == 3 and not any(without) and all(wanted)


def kernel_sizes(graph):
    operator = torch.ops.torchdnr.rbf_scores
    nodes = [
        n for n in graph.graph.nodes if getattr(n.target, "overloadpacket", n.target) == operator
    ]
    return [node.meta["example_value"][1].numel() for node in nodes]


def centrings(model, images, run):
    """Count the SVMs whose support vectors a call centres."""
    with torch.profiler.profile(record_shapes=True) as profile:
        scores_and_gradient(run, images)
    events = [e for e in profile.events() if e.name in ("aten::sub", "aten::sub_")]
    shapes = [[list(shape) for shape in event.input_shapes[:2]] for event in events]
    machines = model.svms.named().values()
    return sum([list(m.support_vectors.shape), list(m.center.shape)] in shapes for m in machines)


def test_compiled_calls_take_the_centred_vectors_that_are_kept(model, images):
    compiled = torch.compile(model, backend="aot_eager")
    scores_and_gradient(compiled, images[:8])
    assert centrings(model, images[:8], compiled) == 0
    for svm in model.svms.named().values():
        svm.support_vectors.mul_(1.01)
    assert centrings(model, images[:8], model) == 3  # once, and then they are kept
    assert centrings(model, images[:8], model) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda svm: setattr(svm, "support_vectors", 1.1 * svm.support_vectors),
        *(
            pytest.param(change, marks=pytest.mark.slow)
            for change in (
                lambda svm: svm.load_state_dict(svm.state_dict() | {"center": svm.center + 1}),
                lambda svm: (svm.support_vectors.mul_(1.1), svm(svm.support_vectors[:1])),
            )
        ),
    ],
)
def test_compiled_scores_follow_a_change_of_the_vectors(model, images, change):
    compiled = torch.compile(model, backend="aot_eager")
    before = scores_and_gradient(compiled, images[:8])
    expected = [copy.deepcopy(svm.support_vectors) for svm in model.base_svms]
    change(model.base_svms[0])
    after = scores_and_gradient(compiled, images[:8])
    assert_same(after, scores_and_gradient(model, images[:8]))
    if not torch.equal(model.base_svms[0].support_vectors, expected[0]):
        assert (after[0] - before[0]).abs().max() > 1e-3


def test_neither_the_global_switch_nor_autocast_reaches_compiled_scores():
    *tensors, gamma = problem(torch.float32, n=64, m=200, d=128)
    leaves = [*tensors[:2], 100 * tensors[2].detach(), gamma.detach() / 30]
    leaves.append(squared_norms(leaves[1].detach()))
    compiled = torch.compile(compiled_rbf_scores, backend="aot_eager", fullgraph=True)

    def evaluate():
        scores = compiled(*leaves)
        return scores.detach(), torch.autograd.grad(scores.sum(), leaves[0])[0]

    expected = evaluate()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = evaluate()
    finally:
        torch.set_float32_matmul_precision(before)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == torch.float32 and torch.equal(g, e)


@pytest.mark.slow
def test_autocast_is_for_the_network_alone(images):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = small_dnr(images)
        seen = []
        handle = model.net.logits.register_forward_hook(lambda *given: seen.append(given[2].dtype))
        scores, gradient = scores_and_gradient(model, images[:8])
        labels = model.predict(images)
        features = model.features(images[:8])
        handle.remove()
    assert set(seen) == {torch.bfloat16}
    assert scores.dtype == gradient.dtype == torch.float32
    # The kernels have all digits of their features, which have those of bfloat16.
    base = [
        svm(features[name].float()) for svm, name in zip(model.base_svms, model.layers, strict=True)
    ]
    torch.testing.assert_close(scores[:, :-1], model.combiner(torch.cat(base, 1)), rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_same([compiled(images[:8])], [scores])
    # The classifier in float32 is close, but not the same.
    assert 0 < (model(images[:8]) - scores).abs().max() < 0.1 * scores.abs().max()
    assert (model.predict(images) == labels).float().mean() > 0.8
