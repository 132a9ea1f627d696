"""benchmarks/few_shot: its heads are what they are called, its episodes hold what they should."""

import pytest
import torch
from sklearn.kernel_ridge import KernelRidge

from benchmarks.few_shot import heads
from benchmarks.few_shot.__main__ import BATCH, QUERIES, SHOTS, WAYS, episodes, works
from torchdnr.svm import RBFSVM

LABELS = torch.arange(3).repeat_interleave(5)


def samples():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 15, 4, generator=generator), torch.randn(2, 6, 4, generator=generator)


def test_ridge_regression_is_that_of_scikit_learn():
    features, inputs = samples()
    scores = heads.ridge(features, LABELS.expand(2, -1), inputs, torch.tensor(0.3))
    targets = 2 * torch.nn.functional.one_hot(LABELS) - 1
    for k in range(2):
        peer = KernelRidge(alpha=1 / heads.C, kernel="rbf", gamma=0.3).fit(features[k], targets)
        expected = torch.tensor(peer.predict(inputs[k]), dtype=torch.float32)
        torch.testing.assert_close(scores[k], expected, rtol=0, atol=1e-5)


def test_the_svm_head_is_one_vs_rest():
    features, inputs = samples()
    scores = heads.svm(features, LABELS.expand(2, -1), inputs, torch.tensor(0.3))
    for k in range(2):
        peer = RBFSVM(heads.C, 0.3, tol=1e-6).fit(features[k], LABELS)
        torch.testing.assert_close(scores[k], peer(inputs[k]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["svm", "ridge"])
def test_a_head_runs_and_one_that_fails_is_told_by_its_error(name):
    assert works(heads.HEADS[name]) is None
    assert works(lambda *_: torch.zeros(1)[2]).startswith("IndexError: index 2 is out of bounds")


def test_an_episode_has_samples_and_other_queries_of_five_classes():
    classes = [10.0 * k + torch.arange(16.0) / 16 for k in range(7)]  # the tens tell the class
    for some, labels, queries in episodes(classes, 3, torch.Generator().manual_seed(0)):
        assert some.shape == labels.shape == (BATCH, WAYS * SHOTS)
        assert queries.shape == (BATCH, WAYS * QUERIES)
        for k in range(BATCH):
            tens = some[k].view(WAYS, SHOTS) // 10
            assert (tens == tens[:, :1]).all() and len(tens.unique()) == WAYS
            assert torch.equal(queries[k].view(WAYS, QUERIES)[:, 0] // 10, tens[:, 0])
            assert len(torch.cat([some[k], queries[k]]).unique()) == WAYS * (SHOTS + QUERIES)
