"""C by class and gamma, refined from a point of the grid."""

import json
from copy import deepcopy

import pytest
import torch
from accelerator import accelerator
from gpytorch.kernels import RBFKernel
from small_models import LAYERS, make_images, small_network
from test_model_selection import digits

from torchdnr import DNR, NR
from torchdnr.features.layers import LayerFeatures
from torchdnr.svm import RBFSVM, grid_search, out_of_fold_scores
from torchdnr.svm.folds import stratified_folds
from torchdnr.svm.refinement import FoldedProblem, Refinement, refine_point

POOR = {"C_grid": [300.0], "gamma_grid": [0.02], "folds": 3}


def checked_gradient(loss, point):
    """Compute a gradient, and hold it to central differences, each of which fits anew."""
    point.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(point), point)
    for index, step in enumerate(1e-4 * torch.eye(len(point), dtype=torch.float64)):
        with torch.no_grad():
            central = (loss(point + step) - loss(point - step)) / 2e-4
        assert gradient[index].item() == pytest.approx(central.item(), rel=2e-3, abs=1e-7)
    return gradient


@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_of_the_loss_is_that_of_refits(weighted):
    features, labels = digits(80)
    weight = torch.linspace(0.5, 1.5, 80, dtype=torch.float64) if weighted else None
    fold = stratified_folds(labels, 3)
    options = ("balanced" if weighted else None), weight, None
    problem = FoldedProblem(features, labels, fold, *options)

    def loss(logs):
        values = logs.exp()
        return problem.loss(problem.scores(values[:-1], values[-1])[0])

    gradient = checked_gradient(
        loss, torch.tensor([0.1, 0.3, 0.5, 1.0, 0.02], dtype=torch.float64).log()
    )
    assert gradient[:4].abs().min() > 1e-5  # each C has a part in it


def test_the_loss_is_the_cross_entropy_at_its_best_slope():
    """Scores that all are three times as large leave it the same."""
    features, labels = digits(80)
    problem = FoldedProblem(features, labels, stratified_folds(labels, 3), None, None, None)
    scores, _ = problem.scores(torch.ones(4), torch.tensor(0.02))
    logits = torch.logspace(-1, 2, 2_000, dtype=torch.float64)[:, None, None] * scores
    expected = -logits.log_softmax(dim=2)[:, torch.arange(80), labels].mean(dim=1).max()
    assert problem.loss(scores).item() == pytest.approx(expected.item(), rel=1e-5)
    assert problem.loss(3 * scores).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.slow
def test_from_a_poor_grid_it_comes_close_to_the_best_of_a_fine_one():
    features, labels = digits(120)
    search = grid_search(features, labels, refine=True, **POOR)
    found = search.refinement
    assert found.kept and "; refined: kept: out-of-fold loss" in search.reason
    assert search.C == found.C[1] == search.svm.C and search.gamma == found.gamma[1]
    problem = FoldedProblem(features, labels, stratified_folds(labels, 3), None, None, None)
    scale = search.gamma_grid[0] / 0.02

    def loss(C, gamma):
        scores, _ = problem.scores(torch.tensor(C, dtype=torch.float64).expand(4), gamma)
        return problem.loss(scores).item()

    assert loss(300.0, search.gamma_grid[0]) == pytest.approx(found.loss[0], rel=1e-3)
    widths = torch.tensor([0.06, 0.2, 0.6], dtype=torch.float64) * scale
    fine = min(loss(C, gamma) for C in (0.1, 0.3, 1.0, 10.0) for gamma in widths)
    assert found.loss[1] < fine + 0.1 * (found.loss[0] - fine)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_what_is_kept_is_not_worse_where_each_sample_was_left_out_of_all(seed):
    features, labels = digits(100, noise=0.8)
    grid = {"C_grid": [1.0], "gamma_grid": [1.0], "folds": 3, "seed": seed}
    search = grid_search(features, labels, refine=True, **grid)
    found = search.refinement
    pairs = list(zip(found.C, found.gamma, strict=True))
    judged = stratified_folds(labels, 3, seed + 1)
    scores_of_both, rates = torch.zeros(2, 100, 4, dtype=torch.float64), []
    for k in range(3):
        rest, held_out = judged != k, judged == k
        point = found.C[0], found.gamma[0]
        part = refine_point(features[rest], labels[rest], point, folds=3, seed=seed)
        for scores, C, gamma in zip(scores_of_both, part.C, part.gamma, strict=True):
            svm = RBFSVM(C, gamma, tol=1e-6).fit(features[rest], labels[rest])
            scores[held_out] = svm(features[held_out])
    for scores in scores_of_both:
        best, predicted = scores.max(dim=1)
        wrong, accepted = predicted != labels, best >= best.sort().values[10]
        rates.append([(~wrong).double().mean().item(), (wrong & accepted).double().mean().item()])
    (accuracy, errors), (new_accuracy, new_errors) = rates
    assert found.accuracy == pytest.approx((accuracy, new_accuracy))
    assert found.accepted_errors == pytest.approx((errors, new_errors))
    assert found.kept == (new_accuracy >= accuracy and new_errors <= errors)
    C, gamma = pairs[found.kept]
    expected = RBFSVM(C, gamma, tol=1e-6).fit(features, labels)
    torch.testing.assert_close(search.svm(features), expected(features), rtol=0, atol=5e-3)
    assert (search.C, search.gamma) == (C, gamma)
    assert ("not kept" in search.reason) == (not found.kept)


def test_widths_that_fit_chance_do_not_pass_for_better():
    """They lower the loss, and the error on other folds, of samples that they were chosen by."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(60, 40, dtype=torch.float64, generator=generator)
    labels = torch.arange(60) % 2
    grid = {"C_grid": [1.0], "gamma_grid": [0.3], "folds": 3}
    search = grid_search(features, labels, refine="ard", **grid)
    found = search.refinement
    assert found.loss[1] < 0.9 * found.loss[0]
    widths = features * torch.tensor(found.scale)
    scores = out_of_fold_scores(widths, labels, C=found.C[1], gamma=found.gamma[1], seed=7)
    assert (scores.argmax(dim=1) == labels).double().mean() > 0.7
    assert found.accuracy[1] < 0.6


def test_out_of_fold_scores_with_a_c_by_class_are_those_of_refits():
    features, labels = digits(80)
    C, fold = (0.1, 1.0, 3.0, 10.0), stratified_folds(labels, 3, 0)
    scores = out_of_fold_scores(features, labels, C=C, gamma=0.02, tol=1e-6)
    for k in range(3):
        svm = RBFSVM(C, 0.02, tol=1e-6).fit(features[fold != k], labels[fold != k])
        expected = svm(features[fold == k])
        torch.testing.assert_close(scores[fold == k], expected, rtol=0, atol=1e-4)


def test_samples_of_weight_0_are_as_good_as_removed():
    features, labels = digits(80)
    fold = stratified_folds(labels, 3)
    weight = (torch.arange(80) % 5 > 0).double()
    kept = weight > 0
    point = torch.ones(4, dtype=torch.float64), torch.tensor(0.02, dtype=torch.float64)
    whole = FoldedProblem(features, labels, fold, None, weight, None)
    part = FoldedProblem(features[kept], labels[kept], fold[kept], None, None, None)
    scores, expected = (problem.scores(*point)[0] for problem in (whole, part))
    torch.testing.assert_close(scores[kept], expected, rtol=0, atol=1e-5)
    assert whole.loss(scores).item() == pytest.approx(part.loss(expected).item(), rel=1e-5)
    assert whole.judge(scores) == pytest.approx(part.judge(expected))


def test_where_all_is_right_by_far_nothing_is_left_to_refine():
    labels = torch.arange(30) % 2
    features = 100.0 * labels.double()[:, None] + torch.linspace(0, 1, 30)[:, None]
    search = grid_search(features, labels, refine=True, C_grid=[1.0], gamma_grid=[1.0], folds=3)
    assert search.refinement.reason.startswith("not kept, no point of a smaller loss")
    assert search.C == 1.0 and search.refinement.accuracy == (1.0, 1.0)


def test_a_search_that_is_not_refined_says_nothing_of_it():
    features, labels = digits(80)
    search = grid_search(features, labels, **POOR)
    assert search.refinement is None and "refine" not in json.dumps(search.to_dict())
    assert search.C == 300.0


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DNR, NR])
def test_a_refined_classifier_is_saved_loaded_and_refitted_with_its_c_by_class(tmp_path, kind):
    torch.manual_seed(0)
    images, labels = make_images(60), torch.arange(60) % 3
    images = (images + 0.5 * images[labels]) / 1.5
    grid = {**POOR, "stacking_folds": 2, "refine": True, "seed": 1}
    fixed = {"hyperparameters": {LAYERS[0]: ((1.0, 2.0, 3.0), 0.1)}} if kind is DNR else {}
    net = small_network()
    model = kind(net, LAYERS if kind is DNR else LAYERS[-1], **grid, **fixed).fit(images, labels)
    chosen = model.selection[LAYERS[-1]]
    assert chosen["refinement"]["kept"] and len(chosen["C"]) == 3
    svm = model.svms.named()[LAYERS[-1]]
    assert list(svm.C) == chosen["C"] == chosen["refinement"]["C"][1]
    if kind is DNR:  # what is given is not refined
        assert model.selection[LAYERS[0]] == {"C": [1.0, 2.0, 3.0], "gamma": 0.1}
    model.set_threshold(0.0)
    model.save(tmp_path / "model.safetensors")
    loaded = kind.load(tmp_path / "model.safetensors", net)
    assert torch.equal(loaded(images), model(images))
    assert loaded.selection == json.loads(json.dumps(model.selection))
    assert loaded.svm_options.refine and loaded.svms.named()[LAYERS[-1]].C == svm.C
    assert loaded.svm_options.hyperparameters == model.svm_options.hyperparameters
    again = loaded.refitted(images, labels).scores(images)
    torch.testing.assert_close(again, model.scores(images), rtol=0, atol=1e-2)


def test_settings_say_nothing_of_refining_unless_it_is_asked_for():
    net = small_network()
    assert "refine" not in NR(net, LAYERS[-1]).settings()["options"]
    assert NR(net, LAYERS[-1], refine=True).settings()["options"]["refine"] is True


def test_a_c_by_class_among_the_hyperparameters_is_checked():
    for wrong in ((), (1.0, -1.0), (1.0, "2")):
        with pytest.raises(ValueError, match="where C may be one per class"):
            NR(small_network(), LAYERS[-1], hyperparameters={LAYERS[-1]: (wrong, 0.1)})


@pytest.mark.slow
def test_a_search_is_refined_on_any_device_and_in_inference_mode():
    features, labels = digits(60)
    expected = grid_search(features, labels, refine=True, **POOR)
    with accelerator() as device:
        there = grid_search(features.to(device), labels.to(device), refine=True, **POOR)
        assert there.svm.center.device == device
    with torch.inference_mode():
        inside = grid_search(features.clone(), labels.clone(), refine=True, **POOR)
    for search in (there, inside):
        assert search.refinement.loss == pytest.approx(expected.refinement.loss, rel=1e-3)
        assert search.refinement.kept == expected.refinement.kept


def noisy(n, seed=0):
    """Two features that tell the classes, and six of noise, which weigh as much."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    angle = labels * (2 * torch.pi / 3)
    features = 1.5 * torch.randn(n, 8, dtype=torch.float64, generator=generator)
    features[:, :2] /= 1.5
    features[:, :2] += 1.5 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return features, labels


def test_the_gradient_by_the_widths_of_features_is_that_of_refits():
    features, labels = noisy(60)
    problem = FoldedProblem(features, labels, stratified_folds(labels, 3), None, None, None)
    C, gamma = torch.ones(3, dtype=torch.float64), torch.tensor(0.05, dtype=torch.float64)

    def loss(scale):
        return problem.loss(problem.scores(C, gamma, scale)[0])

    gradient = checked_gradient(loss, torch.linspace(0.6, 1.4, 8, dtype=torch.float64))
    assert gradient.abs().min() > 1e-5


def test_features_of_noise_get_wide_kernels_and_scores_are_gpytorchs_of_such_widths():
    (features, labels), (unseen, _) = noisy(200), noisy(50, seed=1)
    grid = {"C_grid": [1.0], "gamma_grid": [1.0], "folds": 2}
    search = grid_search(features, labels, refine="ard", **grid)
    scale, refined = search.scale, search.refinement
    assert refined.kept and scale[2:].max() < 0.7 * scale[:2].min()
    kernel = RBFKernel(ard_num_dims=8).double()
    kernel.lengthscale = (2 * search.gamma) ** -0.5 / scale
    expected = RBFSVM(search.C, kernel=kernel, tol=1e-6).fit(features, labels)
    torch.testing.assert_close(search.svm(unseen * scale), expected(unseen), rtol=0, atol=5e-3)
    found = json.loads(json.dumps(search.to_dict()))["refinement"]
    assert Refinement.from_dict(found) == refined


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DNR, NR])
def test_a_classifier_with_widths_of_features_does_all_that_others_do(tmp_path, kind):
    torch.manual_seed(0)
    images, labels = make_images(60), torch.arange(60) % 3
    images = (images + images[labels]) / 2
    options = {**POOR, "stacking_folds": 2, "refine": "ard", "seed": 3}
    if kind is DNR:  # of one layer the widths stay as they are
        options["hyperparameters"] = {LAYERS[0]: (1.0, 0.1)}
    net = small_network()
    model = kind(net, LAYERS if kind is DNR else LAYERS[-1], **options).fit(images, labels)
    assert model.selection[LAYERS[-1]]["refinement"]["kept"]
    scale = torch.tensor(model.selection[LAYERS[-1]]["refinement"]["scale"])
    assert not torch.allclose(scale, torch.ones_like(scale))
    plain = LayerFeatures(net, [LAYERS[-1]])(images)[LAYERS[-1]]
    torch.testing.assert_close(model.features(images)[LAYERS[-1]], plain * scale)
    assert "scaled one by one" in model.features.describe()
    model.set_threshold(0.0)
    model.save(tmp_path / "model.safetensors")
    loaded = kind.load(tmp_path / "model.safetensors", net)
    assert torch.equal(loaded(images), model(images))
    assert torch.equal(deepcopy(model)(images), model(images))
    again = loaded.refitted(images, labels).scores(images)
    torch.testing.assert_close(again, model.scores(images), rtol=0, atol=1e-2)
    whole = model.compress(images, factor=1, steps=0, joint_steps=0)
    torch.testing.assert_close(whole.scores(images), model.scores(images), rtol=0, atol=1e-2)
    wide, image = deepcopy(model).double(), images[:2].double()
    assert torch.autograd.gradcheck(wide.scores, image.requires_grad_(), atol=1e-4)
    # Fitted again without, and loaded into one that has none, it keeps nothing of them.
    once_more = kind(net, LAYERS if kind is DNR else LAYERS[-1], **{**options, "refine": False})
    other = once_more.fit(images, labels).state_dict()
    model.load_state_dict(other)
    torch.testing.assert_close(model.scores(images), once_more.scores(images))


def test_a_class_of_few_samples_is_refined_and_one_of_fewer_is_refused():
    features = torch.randn(23, 3)
    labels = torch.tensor([0] * 10 + [1] * 10 + [2] * 3)
    grid = {"C_grid": [1.0], "gamma_grid": [1.0], "folds": 2}
    assert grid_search(features, labels, refine="ard", **grid).refinement.reason
    with pytest.raises(ValueError, match="got a class with 2"):
        grid_search(features[:22], labels[:22], refine=True, **grid)


def test_what_to_refine_is_checked():
    for make in (
        lambda: NR(small_network(), LAYERS[-1], refine="all"),
        lambda: grid_search(*digits(60), refine="all", **POOR),
    ):
        with pytest.raises(ValueError, match='refine must be False, True or "ard", got'):
            make()
