import pytest
import torch

from torchdnr.decisions import NotFittedError
from torchdnr.svm import RBFSVM, influence


@pytest.fixture(scope="module", params=[pytest.param(1.0, marks=pytest.mark.slow), 10.0])
def left_out(request):
    """Effects on the best score, and what scores really lose in a fit without each sample."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(36) % 3
    centres = 1.5 * torch.randn(3, 5, dtype=torch.float64, generator=generator)
    features = centres[labels] + torch.randn(36, 5, dtype=torch.float64, generator=generator)
    inputs, classes = centres + 0.5, torch.arange(3)

    def fit(weight=None):
        svm = RBFSVM(request.param, 0.1, tol=1e-6)
        return svm.fit(features, labels, sample_weight=weight)

    svm, lost = fit(), []
    scores = svm(inputs).diagonal()
    for i in range(36):
        weight = torch.ones(36)
        weight[i] = 0.0
        lost.append(scores - fit(weight)(inputs).diagonal())
    return influence(svm, inputs, classes), torch.stack(lost, dim=1)


def test_effects_are_what_a_fit_without_the_sample_loses(left_out):
    """Exactly where the others stay free or bounded as they are, and well ranked elsewhere."""
    found, lost = left_out
    lost = lost[:, found.support]
    assert (found.effects - lost).abs().median() < 0.01 * lost.abs().max()
    for effects, truth in zip(found.effects, lost, strict=True):
        shared = set(effects.topk(5).indices.tolist()) & set(truth.topk(5).indices.tolist())
        assert len(shared) >= 3


def test_samples_that_are_no_support_vectors_have_no_effect(left_out):
    found, lost = left_out
    others = torch.ones(36, dtype=torch.bool)
    others[found.support] = False
    assert others.any() and lost[:, others].abs().max() < 1e-4


def test_the_strongest_samples_come_first(left_out):
    found, _ = left_out
    supporting, opposing = found.strongest(0, 3)
    place = {sample: i for i, sample in enumerate(found.support.tolist())}
    effects = [found.effects[0, place[sample]].item() for sample in supporting]
    assert effects == sorted(effects, reverse=True)
    assert effects[0] == found.effects[0].max()
    assert found.effects[0, place[opposing[0]]] == found.effects[0].min() < 0


def test_influence_needs_the_support_vectors_of_a_fit():
    with pytest.raises(NotFittedError):
        influence(RBFSVM(), torch.zeros(1, 2), torch.tensor([0]))
    features, labels = torch.randn(20, 2), torch.arange(20) % 2
    svm = RBFSVM(strategy="one-vs-one").fit(features, labels)
    with pytest.raises(ValueError, match="one-vs-rest"):
        influence(svm, features, labels)
