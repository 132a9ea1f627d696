import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from gpytorch.kernels import LinearKernel, MaternKernel
from sklearn.datasets import load_digits
from torch import nn
from torch.autograd import gradcheck

from torchdnr import DNR, NR, RBFSVM
from torchdnr.svm import NotFittedError
from torchdnr.svm.compression import (
    CompressionWarning,
    KernelSum,
    ReducedSet,
    compress_svm,
    compression_report,
    greedy_choice,
    minimise,
    score_bound,
    stack_losses,
)

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
LAYERS = ["relu", "head"]
PAIRS = {"relu": (10.0, 0.03), "head": (1.0, 0.02), "combiner": (1.0, 0.1)}
SMOOTHNESS = 1e-3


def features_and_labels(n=150, dtype=torch.float64):
    """Return a noisy problem of three classes."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    noise = 0.3 * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    y = (x[:, 0] + noise[:, 0] > 0).long() + (x[:, 1] ** 2 + noise[:, 1] > 0.7).long()
    return x.to(dtype), y


@pytest.fixture(scope="module")
def svm():
    return RBFSVM(C=5.0, gamma=0.3).fit(*features_and_labels())


def objective(svm, compressed, x):
    """Recompute what compression minimises: at the features, and in the space of the kernel."""
    at_features = (compressed(x) - svm(x)).square().sum(dim=1).mean()
    return at_features + SMOOTHNESS * score_bound(svm, compressed).square().sum()


# --- one SVM ---


@pytest.mark.parametrize("device", DEVICES)
def test_all_support_vectors_as_prototypes_give_the_original_scores(svm, device):
    svm, (x, _) = copy.deepcopy(svm).to(device), features_and_labels()
    same = compress_svm(svm, x.to(device), len(svm.support_vectors), steps=0)
    unseen = torch.randn(200, 4, dtype=torch.float64, device=device)
    assert (same(unseen) - svm(unseen)).abs().max() < 1e-5
    assert score_bound(svm, same).max() < 1e-4


def test_coefficients_are_those_of_an_independent_least_squares_solver(svm):
    x, _ = features_and_labels()
    compressed = compress_svm(svm, x, 12, steps=0, smoothness=0.05)
    rows = [
        (svm.support_vectors == p).all(dim=1).nonzero().item() for p in compressed.support_vectors
    ]

    def kernel(a, b):
        return torch.cdist(a, b).square().mul(-0.3).exp()

    at_features = kernel(x, svm.support_vectors) / len(x) ** 0.5
    root = torch.linalg.cholesky(kernel(svm.support_vectors, svm.support_vectors)).T
    whole = torch.cat([at_features, 0.05**0.5 * root]).numpy()
    expected, *_ = np.linalg.lstsq(whole[:, rows], whole @ svm.dual_coef.numpy(), rcond=None)
    assert np.abs(compressed.dual_coef.numpy() - expected).max() < 1e-6


def test_the_greedy_choice_is_the_best_at_every_step(svm):
    target = KernelSum.of(svm)
    gram = target.matrix(target.vectors, target.vectors)
    scores = gram @ target.coefficients

    def explained(chosen):
        part = gram[chosen][:, chosen]
        return (scores[chosen] * torch.linalg.solve(part, scores[chosen])).sum().item()

    chosen = greedy_choice(target, 8).tolist()
    for k in range(8):
        others = [i for i in range(len(gram)) if i not in chosen[:k]]
        best = max(explained([*chosen[:k], i]) for i in others)
        assert explained(chosen[: k + 1]) == pytest.approx(best, rel=1e-9)


def test_the_greedy_choice_takes_each_vector_once_even_among_copies(svm):
    target = KernelSum.of(svm)
    twice = KernelSum(
        target.kernel,
        target.vectors.repeat(2, 1),
        target.coefficients.repeat(2, 1),
        target.center,
    )
    chosen = greedy_choice(twice, 2 * len(target.vectors))
    assert sorted(chosen.tolist()) == list(range(2 * len(target.vectors)))


def test_fidelity_grows_with_the_number_of_prototypes(svm):
    x, _ = features_and_labels()
    reached = [objective(svm, compress_svm(svm, x, p, steps=20), x).item() for p in (2, 5, 10, 20)]
    assert all(more < 0.9 * fewer for fewer, more in pairwise(reached))


@pytest.mark.parametrize("prototypes", [1, 5, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_descent_never_ends_above_its_start(prototypes, dtype):
    x, y = features_and_labels(dtype=dtype)
    svm = RBFSVM(C=5.0, gamma=0.3).fit(x, y)
    start = objective(svm, compress_svm(svm, x, prototypes, steps=0), x)
    assert objective(svm, compress_svm(svm, x, prototypes, steps=1), x) <= start
    moved = compress_svm(svm, x, prototypes, steps=20)
    assert objective(svm, moved, x) < 0.9 * start
    assert moved.support_vectors.dtype == moved(x).dtype == dtype


def test_the_loss_is_the_objective_but_for_its_constant_and_its_gradient_is_exact(svm):
    x, _ = features_and_labels()
    target = KernelSum.of(svm)
    values = svm(x) - svm.intercept
    problem = ReducedSet(target, x, values, SMOOTHNESS)
    start = target.vectors[greedy_choice(target, 6)]
    norm = (target.coefficients * target(target.vectors)).sum()
    leaf = start.clone().requires_grad_()
    value = problem.loss(leaf)
    expected = objective(svm, compress_svm(svm, x, 6, steps=0), x) - SMOOTHNESS * norm
    assert value * problem.scale == pytest.approx(expected.item(), rel=1e-6)
    direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(1)).double()
    ahead, behind = (
        problem.loss((start + step * direction).requires_grad_()) for step in (1e-5, -1e-5)
    )
    assert (leaf.grad * direction).sum() == pytest.approx(
        ((ahead - behind) / 2e-5).item(), rel=1e-5
    )


def test_the_best_point_is_kept_when_later_ones_are_worse():
    seen = []

    def loss(tensors):
        seen.append(tensors[0].item())
        value = tensors[0].abs().sqrt().sum()  # no L-BFGS likes that kink
        value.backward()
        return value.detach()

    (best,) = minimise([torch.tensor([3.0])], loss, 30)
    assert best.abs() == min(map(abs, seen))


def test_the_difference_of_the_scores_keeps_to_its_bound_and_reaches_it(svm):
    x, _ = features_and_labels()
    compressed = compress_svm(svm, x, 10)
    points = (3 * torch.randn(500, 4, dtype=torch.float64)).requires_grad_()
    optimizer = torch.optim.Adam([points], lr=0.05)
    for _ in range(100):  # look for the largest difference
        optimizer.zero_grad()
        (-(compressed(points) - svm(points)).abs().sum()).backward()
        optimizer.step()
    difference = (compressed(points) - svm(points)).abs().amax(dim=0)
    assert (difference <= score_bound(svm, compressed) + 1e-9).all()
    lacking = copy.deepcopy(svm)
    lacking.dual_coef[0] = 0.0
    at_vector = (lacking(svm.support_vectors[:1]) - svm(svm.support_vectors[:1])).abs()[0]
    square = score_bound(svm, lacking).square()  # it is a root: rounding adds to its square
    assert torch.allclose(square, at_vector.square(), rtol=1e-7, atol=1e-12)


def test_scores_far_from_the_data_stay_the_intercept(svm):
    compressed = compress_svm(svm, features_and_labels()[0], 10)
    far = torch.full((1, 4), 1e4, dtype=torch.float64)
    assert torch.equal(compressed(far), svm(far))
    assert torch.equal(compressed(far)[0], svm.intercept)


def test_a_compressed_svm_claims_no_certificate_and_leaves_the_original_as_it_was(svm):
    before, solution = copy.deepcopy(svm.state_dict()), svm.solution
    compressed = compress_svm(svm, features_and_labels()[0], 7, steps=10)
    assert compressed.solution is None and svm.solution is solution
    assert compressed.support.tolist() == [-1] * 7
    assert compressed.support_vectors.shape == (7, 4) and compressed.dual_coef.shape == (7, 3)
    assert all(torch.equal(before[key], value) for key, value in svm.state_dict().items())
    assert compressed.settings() == svm.settings()
    again = compress_svm(svm, features_and_labels()[0], 7, steps=10)
    assert torch.equal(again.support_vectors, compressed.support_vectors)
    assert torch.equal(again.dual_coef, compressed.dual_coef)


def test_gradients_by_the_inputs_are_exact(svm):
    compressed = compress_svm(svm, features_and_labels()[0], 9)
    points = torch.randn(3, 4, dtype=torch.float64).requires_grad_()
    assert gradcheck(compressed, points)
    assert gradcheck(compressed.smoothed(0.3), points)


def test_saved_and_converted_it_scores_the_same(svm, tmp_path):
    x, _ = features_and_labels()
    compressed = compress_svm(svm, x, 9)
    compressed.save(tmp_path / "svm.safetensors")
    assert torch.equal(RBFSVM.load(tmp_path / "svm.safetensors")(x), compressed(x))
    converted = torch.tensor(compressed.to_sklearn().decision_function(x.numpy()))
    assert torch.allclose(converted, compressed(x), atol=1e-9)


def test_blocks_of_rows_change_nothing(svm):
    x, _ = features_and_labels()
    target = KernelSum.of(svm)
    blocks = replace(target, block_elements=7 * sum(svm.support_vectors.shape))
    assert blocks.block_rows == 7 and target.block_rows > len(x)
    problem = ReducedSet(blocks, x, svm(x) - svm.intercept, SMOOTHNESS)
    start = target.vectors[greedy_choice(target, 8)]
    (vectors,) = minimise([start], lambda tensors: problem.loss(tensors[0]), 3)
    scores = target.scores(x, vectors, problem.coefficients(vectors)) + svm.intercept
    assert (scores - compress_svm(svm, x, 8, steps=3)(x)).abs().max() < 1e-8


def test_targets_of_ones_own_are_met(svm):
    x, _ = features_and_labels()
    wanted = svm(x) + 0.5 * torch.sin(3 * x[:, :1])
    m = len(svm.support_vectors)
    given = compress_svm(svm, x, m, targets=wanted, steps=0, smoothness=1e-9)
    assert (given(x) - wanted).square().mean() < 0.1 * (svm(x) - wanted).square().mean()


@pytest.mark.parametrize("kernel", [MaternKernel(nu=2.5), MaternKernel(nu=0.5), LinearKernel()])
def test_kernels_of_gpytorch_are_compressed_too(kernel):
    x, y = features_and_labels()
    svm = RBFSVM(C=5.0, kernel=kernel).fit(x, y)
    start, moved = (compress_svm(svm, x, 10, steps=steps) for steps in (0, 30))
    errors = [(c(x) - svm(x)).square().mean() for c in (start, moved)]
    if type(kernel) is LinearKernel:  # four features: ten prototypes span all there is
        assert max(errors) < 1e-12 and score_bound(svm, moved).isinf().all()
    else:
        assert errors[1] < 0.8 * errors[0]
        assert ((moved(x) - svm(x)).abs().amax(dim=0) <= score_bound(svm, moved)).all()
    assert moved.kernel is not svm.kernel and moved.has_own_kernel


def test_pairwise_scores_of_one_vs_one_are_compressed():
    x, y = features_and_labels()
    svm = RBFSVM(C=5.0, gamma=0.3, strategy="one-vs-one").fit(x, y)
    compressed = compress_svm(svm, x, 15, steps=30)
    difference = compressed.pairwise_scores(x) - svm.pairwise_scores(x)
    assert difference.square().mean() < 0.05 * svm.pairwise_scores(x).square().mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prototypes": 0}, r"prototypes must be an integer in 1..\d+, .* got 0"),
        ({"prototypes": 10_000}, r"prototypes must be an integer in 1..\d+, .* got 10000"),
        ({"prototypes": 2.0}, "got 2.0"),
        ({"prototypes": True}, "got True"),
        ({"features": torch.zeros(5, 3)}, r"features must be \(n, 4\) as in fit, got \(5, 3\)"),
        ({"features": torch.full((5, 4), torch.nan)}, "features must be finite"),
        ({"targets": torch.zeros(2, 3)}, r"targets must be \(150, 3\), got \(2, 3\)"),
        ({"steps": -1}, "steps >= 0"),
        ({"smoothness": 0.0}, "smoothness > 0"),
    ],
)
def test_wrong_arguments_are_refused(svm, arguments, message):
    given = {"features": features_and_labels()[0], "prototypes": 5} | arguments
    with pytest.raises(ValueError, match=message):
        compress_svm(svm, **given)


def test_what_cannot_be_compressed_is_refused(svm):
    x, y = features_and_labels()
    with pytest.raises(NotFittedError, match="not fitted"):
        compress_svm(RBFSVM(), x, 3)
    precomputed = RBFSVM(kernel="precomputed").fit(x @ x.T, y)
    with pytest.raises(ValueError, match="with a precomputed kernel there are none to move"):
        compress_svm(precomputed, x @ x.T, 3)
    with pytest.raises(ValueError, match="the same kernel"):
        score_bound(svm, RBFSVM(gamma=0.5).fit(x, y))


# --- DNR and NR ---


class TinyNet(nn.Module):
    """A network for 8 x 8 digits of three classes."""

    def __init__(self):
        super().__init__()
        self.hidden, self.relu, self.head = nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 3)

    def forward(self, x):
        return self.head(self.relu(self.hidden(x.flatten(1))))


def digits():
    """Return images and labels in three parts: fit, calibration, test."""
    x, y = load_digits(n_class=3, return_X_y=True)
    x, y = torch.tensor(x / 16).float().view(-1, 1, 8, 8), torch.tensor(y)
    return (x[:200], y[:200]), (x[200:360], y[200:360]), (x[360:], y[360:])


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    net, ((x, y), (held_out, _), _) = TinyNet(), digits()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.eval()
    dnr = DNR(net, LAYERS, hyperparameters=PAIRS).fit(x, y).calibrate(held_out)
    nr = NR(net, "head", hyperparameters={"head": PAIRS["head"]}).fit(x, y).calibrate(held_out)
    return {"DNR": dnr, "NR": nr}


@pytest.mark.parametrize("kind", ["DNR", "NR"])
def test_a_compressed_classifier_decides_as_the_original_on_fewer_vectors(fitted, kind):
    (x, y), (held_out, _), (test, labels) = digits()
    model = fitted[kind]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    compressed = model.compress(x, factor=4, steps=30, joint_steps=10)
    assert type(compressed) is type(model) and compressed.net is model.net
    with pytest.raises(NotFittedError, match="threshold is not set"):
        compressed(x)
    compressed.calibrate(held_out)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for name, svm in model.svms.named().items():
        fewer = len(compressed.svms.named()[name].support_vectors)
        assert fewer == max(1, round(len(svm.support_vectors) / 4))
    assert (compressed.predict(test) == model.predict(test)).double().mean() > 0.9
    assert (compressed.predict(held_out) == -1).sum() == 16
    inputs = test[:2].clone().requires_grad_()
    compressed(inputs)[:, 0].sum().backward()
    assert inputs.grad.abs().sum() > 0
    assert len(labels) == len(test) and len(y) == len(x)


def test_all_support_vectors_give_the_original_classifier(fitted):
    (x, _), _, (test, _) = digits()
    same = fitted["DNR"].compress(x, factor=1, steps=0, joint_steps=0)
    assert (same.scores(test) - fitted["DNR"].scores(test)).abs().max() < 1e-3


def test_svms_without_a_number_keep_their_vectors(fitted):
    (x, _), model = digits()[0], fitted["DNR"]
    compressed = model.compress(x, {"combiner": 10}, steps=5, joint_steps=5)
    assert len(compressed.combiner.support_vectors) == 10
    for mine, own in zip(compressed.base_svms, model.base_svms, strict=True):
        assert mine is not own and torch.equal(mine.support_vectors, own.support_vectors)
        assert torch.equal(mine.dual_coef, own.dual_coef)


def test_descent_on_the_final_scores_brings_them_nearer(fitted):
    (x, _), model = digits()[0], fitted["DNR"]
    wanted = model.scores(x)
    errors = [
        (model.compress(x, 3, steps=20, joint_steps=steps).scores(x) - wanted).square().mean()
        for steps in (0, 40)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_the_report_tells_what_was_lost(fitted):
    (x, _), model = digits()[0], fitted["DNR"]
    compressed = model.compress(x, {"relu": 6, "head": 5, "combiner": 7}, steps=10, joint_steps=10)
    losses = {name: chosen["compression"] for name, chosen in compressed.selection.items()}
    assert list(losses) == ["relu", "head", "combiner"]
    final, wanted, given = losses["combiner"], model.scores(x).double(), compressed.scores(x)
    assert final["support_vectors"] == len(model.combiner.support_vectors)
    assert final["prototypes"] == 7
    assert final["largest_difference"] == pytest.approx((given - wanted).abs().max().item(), 1e-4)
    unexplained = (given - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert final["r2"] == pytest.approx(1 - unexplained.item(), abs=1e-6)
    agree = (given.argmax(1) == wanted.argmax(1)).double().mean().item()
    assert final["label_agreement"] == agree
    text = compression_report(compressed).splitlines()
    assert [line.split()[0] for line in text] == ["SVM", "relu", "head", "combiner"]
    assert f"{final['support_vectors']} -> 7" in text[-1] and f"{final['r2']:.4f}" in text[-1]
    assert "compression" not in model.selection["combiner"]
    with pytest.raises(ValueError, match="not compressed"):
        compression_report(model)
    test = digits()[2][0]
    stacks = model.svms.named(), compressed.svms.named()
    elsewhere = stack_losses(*stacks, model.features(test))["combiner"]
    largest = (compressed.scores(test) - model.scores(test)).abs().max().item()
    assert elsewhere["largest_difference"] == pytest.approx(largest, rel=1e-4)


def test_visible_losses_are_warned_of_and_small_ones_are_not(fitted, recwarn):
    x = digits()[0][0]
    fitted["NR"].compress(x, 15)
    assert not [w for w in recwarn if w.category is CompressionWarning]
    with pytest.warns(CompressionWarning, match="'head' keep .* of the labels"):
        fitted["NR"].compress(x, 1)


@pytest.mark.parametrize("kind", ["DNR", "NR"])
def test_a_compressed_classifier_is_saved_and_loaded(fitted, kind, tmp_path):
    (x, _), (held_out, _), (test, _) = digits()
    compressed = fitted[kind].compress(x, factor=5, steps=5, joint_steps=5).calibrate(held_out)
    compressed.save(tmp_path / "model.safetensors")
    loaded = type(compressed).load(tmp_path / "model.safetensors", compressed.net)
    assert torch.equal(loaded(test), compressed(test))
    assert loaded.selection == compressed.selection
    assert compression_report(loaded) == compression_report(compressed)
    assert all(svm.solution is None for svm in loaded.svms.named().values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either prototypes, .* or factor"),
        ({"prototypes": 3, "factor": 2}, "either prototypes, .* or factor"),
        ({"prototypes": 0}, r"prototypes of 'relu' must be an integer in 1..\d+"),
        ({"prototypes": 10_000}, "got 10000"),
        ({"prototypes": {"fc9": 3}}, r"named after \['relu', 'head', 'combiner'\], got \['fc9'\]"),
        ({"prototypes": {}}, "got none"),
        ({"factor": 0.5}, "factor must be a number >= 1, got 0.5"),
        ({"factor": torch.inf}, "factor must be a number >= 1, got inf"),
        ({"factor": 2, "joint_steps": -1}, "joint_steps must be >= 0, got -1"),
    ],
)
def test_wrong_sizes_are_refused(fitted, arguments, message):
    with pytest.raises(ValueError, match=message):
        fitted["DNR"].compress(digits()[0][0], **arguments)


def test_a_classifier_that_is_not_fitted_is_refused(fitted):
    with pytest.raises(NotFittedError, match="this DNR is not fitted"):
        DNR(fitted["DNR"].net, LAYERS).compress(digits()[0][0], 3)
    with pytest.raises(ValueError, match=r"inputs must lie in \(0.0, 1.0\)"):
        fitted["DNR"].compress(2 * digits()[0][0], 3)
