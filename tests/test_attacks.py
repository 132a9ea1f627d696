"""What both attacks promise: budget, bounds, independence of rows, the model left as found."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn

from torchdnr.attacks import boundary_walk, evades, line_search_pgd


class Abating(nn.Module):
    """RBF scores around a few centres of three classes, and theta: rejects what lies far off."""

    def __init__(self, gamma=6.0, theta=0.3, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        centers = 0.15 + 0.7 * torch.rand(9, 6, generator=generator, dtype=torch.float64)
        self.centers = nn.Parameter(centers.to(dtype))
        self.register_buffer("classes", torch.arange(3).repeat(3))
        self.register_buffer("coefs", 2 * nn.functional.one_hot(self.classes, 3).to(dtype) - 0.5)
        self.dropout = nn.Dropout(0.5)  # random unless the attack sets evaluation mode
        self.gamma, self.theta, self.reject_index = gamma, theta, 3

    def forward(self, x):
        x = x.flatten(1)
        square = (x[:, None] - self.centers).square().sum(dim=2)
        scores = self.dropout(torch.exp(-self.gamma * square) @ self.coefs)
        return torch.cat([scores, scores.new_full((len(x), 1), self.theta)], dim=1)


def problem(dtype=torch.float64, **options):
    model = Abating(dtype=dtype, **options).eval()
    centers = model.centers.detach()
    noise = torch.randn(9, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = (centers + 0.02 * noise.to(dtype)).clamp(0, 1).reshape(9, 1, 2, 3)
    pool = (centers - 0.02 * noise.to(dtype)).clamp(0, 1).reshape(9, 1, 2, 3)
    return model, inputs, model.classes.clone(), pool


def line_search(model, inputs, labels, pool, **options):
    options = {"eps": 0.6, "steps": 8, **options}
    return line_search_pgd(model, inputs, labels, init_inputs=pool, **options)


def walk(model, inputs, labels, pool, **options):
    return boundary_walk(model, inputs, labels, pool, **{"eps": 0.6, "steps": 30, **options})


def distances(adversarial, inputs):
    return (adversarial.double() - inputs.double()).flatten(1).norm(dim=1)


ATTACKS = pytest.mark.parametrize("attack", [line_search, walk])


@ATTACKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stays_in_ball_and_box_with_an_eps_per_row(attack, dtype):
    model, inputs, labels, pool = problem(dtype)
    eps = torch.linspace(0, 0.8, 9, dtype=dtype)
    adversarial = attack(model, inputs, labels, pool, eps=eps)
    assert adversarial.dtype == dtype and adversarial.shape == inputs.shape
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    assert (distances(adversarial, inputs) <= eps.double() * (1 + 1e-6)).all()
    assert torch.equal(adversarial[0], inputs[0])


@ATTACKS
def test_a_sample_gets_the_same_result_alone_and_in_a_batch(attack):
    model, inputs, labels, pool = problem()
    together = attack(model, inputs, labels, pool)
    for row in (0, 4):
        alone = attack(model, inputs[row : row + 1], labels[row : row + 1], pool)
        torch.testing.assert_close(alone[0], together[row], atol=1e-9, rtol=0)
    chunked = attack(model, inputs, labels, pool, batch_size=4)
    torch.testing.assert_close(chunked, together, atol=1e-9, rtol=0)


@ATTACKS
def test_model_is_unchanged_and_attacked_in_evaluation_mode(attack):
    model, inputs, labels, pool = problem()
    expected = attack(model, inputs, labels, pool)
    model.train()
    with torch.no_grad():
        assert torch.equal(attack(model, inputs, labels, pool), expected)
    assert model.training and model.dropout.training
    assert model.centers.requires_grad and model.centers.grad is None
    assert not inputs.requires_grad and not expected.requires_grad


@ATTACKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_evades_and_still_does_one_by_one(attack, dtype):
    model, inputs, labels, pool = problem(dtype)
    adversarial = attack(model, inputs, labels, pool, eps=torch.inf)
    for row in range(9):
        assert evades(model(adversarial[row : row + 1]), labels[row : row + 1], reject=True)


@ATTACKS
def test_given_classes_of_the_pool_change_nothing(attack):
    model, inputs, labels, pool = problem()
    output = model(pool)
    classes = torch.where(output.argmax(1) == 3, -1, output.argmax(1))
    expected = attack(model, inputs, labels, pool)
    assert torch.equal(attack(model, inputs, labels, pool, init_labels=classes), expected)


@ATTACKS
def test_a_rejected_point_is_no_evasion(attack):
    model, inputs, labels, pool = problem()
    model.theta = 10.0  # rejects everything
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adversarial = attack(model, inputs, labels, pool)
    assert not evades(model(adversarial), labels, reject=True).any()


@ATTACKS
def test_a_model_that_ties_with_theta_rejects(attack):
    def tied(x):
        scores = torch.stack([x[:, 0], 1 - x[:, 0]], dim=1)
        return torch.cat([scores, scores.amax(dim=1, keepdim=True)], dim=1)

    inputs = torch.tensor([[0.9, 0.5]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adversarial = attack(tied, inputs, torch.tensor([0]), torch.rand(20, 2), reject=True)
    assert not evades(tied(adversarial), torch.tensor([0]), reject=True).any()


@ATTACKS
def test_zero_and_nan_gradients_do_no_harm(attack):
    def flat(x):
        return torch.stack([x[:, 0] * 0 + 1, x[:, 1] * 0, x[:, 0].sqrt() * 0], dim=1)

    inputs = torch.zeros(3, 2)  # the gradient of sqrt is infinite here, times zero NaN
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adversarial = attack(flat, inputs, torch.tensor([0, 0, 1]), torch.rand(5, 2))
    assert torch.isfinite(adversarial).all()


@ATTACKS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.full((2, 3), 255.0)}, "inputs must lie in .* got values from 255"),
        ({"inputs": torch.full((2, 3), torch.nan)}, "inputs must lie in"),
        ({"inputs": torch.zeros(2, 3, dtype=torch.uint8)}, "floating point"),
        ({"inputs": torch.zeros(0, 3), "labels": torch.zeros(0).long()}, "non-empty batch"),
        ({"labels": torch.zeros(3).long()}, r"labels must be \(n,\) with n = 2"),
        ({"labels": torch.zeros(2)}, "labels must be int64"),
        ({"labels": torch.tensor([0, -1])}, "labels must be >= 0, got -1"),
        ({"labels": torch.tensor([0, 3])}, "below the 3 classes of the model, got 3"),
        ({"eps": -1.0}, "eps must be >= 0"),
        ({"eps": torch.zeros(3)}, r"eps must be a number or \(n,\) with n = 2"),
        ({"norm": 3}, "no norm 3; choose from: 1, 2, inf"),
        ({"bounds": (1.0, 0.0)}, "bounds must be"),
        ({"pool": torch.zeros(4, 5)}, "init_inputs must have the shape"),
        ({"pool": torch.zeros(4, 3).double()}, "init_inputs must be like inputs"),
        ({"init_labels": torch.zeros(5).long()}, r"init_labels must be int64 \(m,\) with m = 4"),
        ({"steps": -1}, "steps must be >= 0, got -1"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"model": lambda x: x.sum(dim=1)}, r"model must return \(n, c\)"),
        ({"model": lambda x: x.detach() * 2, "labels": torch.tensor([0, 1])}, "differentiable"),
    ],
)
def test_bad_arguments_are_refused(attack, change, message):
    inputs = torch.tensor([[0.8, 0.2, 0.1], [0.1, 0.7, 0.3]])
    arguments = {
        "model": lambda x: 2 * x,
        "inputs": inputs,
        "labels": torch.tensor([0, 1]),
        "pool": torch.eye(4, 3),
    }
    with pytest.raises(ValueError, match=message):
        partial(attack, **(arguments | change))()
