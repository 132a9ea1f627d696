"""The benchmark of poisoned training data: its retrained last layer."""

import torch
from sklearn.linear_model import LogisticRegression

from benchmarks.poisoning.last_layer import retrain, with_constant


def make_samples(n=60, d=5, c=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % c
    inputs = torch.randn(n, d, generator=generator, dtype=torch.float64)
    inputs[torch.arange(n), labels] += 1.5
    weight = 0.5 + torch.rand(n, generator=generator, dtype=torch.float64)
    return inputs, labels, weight


def test_the_last_layer_is_the_logistic_regression_of_scikit_learn():
    inputs, labels, weight = make_samples()
    model = retrain(torch.tanh, inputs, labels, weight, num_classes=3, ridge=0.5)
    peer = LogisticRegression(C=2.0, fit_intercept=False, tol=1e-10, max_iter=1_000)
    peer.fit(with_constant(inputs.tanh()).numpy(), labels.numpy(), sample_weight=weight.numpy())
    torch.testing.assert_close(model.weight, torch.tensor(peer.coef_), atol=1e-6, rtol=0)


def test_the_last_layer_has_derivatives_by_inputs_and_weights():
    inputs, labels, weight = make_samples(n=15)
    others = make_samples(n=4, seed=1)[0]

    def scores(inputs, weight):
        return retrain(torch.tanh, inputs, labels, weight, num_classes=3)(others)

    given = inputs.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(scores, given, eps=1e-5, atol=1e-6)
