import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.metrics import roc_auc_score
from small_models import LAYERS, fitted, make_images, options, small_network

from benchmarks.ood.__main__ import measure_all
from benchmarks.ood.images import Unknown
from torchdnr import DNR, NR, REJECT

pytest.importorskip("pytorch_ood", reason="needs pytorch-ood: pip install -e '.[peers]'")

from benchmarks.ood.detectors import fit_detectors


@pytest.fixture
def toy():
    """Fit all detectors on images of three classes that their brightness tells apart."""
    images = make_images(90)
    net = small_network().eval()
    dnr = fitted(DNR(net, LAYERS, **options(*LAYERS, "combiner", gamma=1.0)), images)
    nr = fitted(NR(net, LAYERS[-1], **options(LAYERS[-1], gamma=1.0)), images)
    detectors = fit_detectors(net, dnr, nr, images, torch.arange(90) % 3, neighbours=4)
    return images, detectors


def test_every_score_is_what_its_name_says(toy):
    images, detectors = toy
    new = make_images(30).flip(0)
    scores, predicted = detectors.scores(new)
    with torch.no_grad():
        logits = detectors.net(new).double()
        features = {k: v.double().numpy() for k, v in detectors.dnr.features(new).items()}
        fitted_on = {k: v.double().numpy() for k, v in detectors.dnr.features(images).items()}
    assert torch.equal(predicted, logits.argmax(dim=1))
    for name, model in (("DNR", detectors.dnr), ("NR", detectors.nr)):
        assert torch.equal(scores[name] >= 0, model.predict(new) == REJECT)
        best = model.scores(new).amax(dim=1).double().detach()
        torch.testing.assert_close(scores[name], model.threshold.double() - best)
    torch.testing.assert_close(scores["maximum softmax"], -logits.softmax(dim=1).amax(dim=1))
    torch.testing.assert_close(scores["energy"], -logits.exp().sum(dim=1).log())
    views = {layer: [layer] for layer in LAYERS} | {"all layers": LAYERS}
    for view, layers in views.items():
        z, known = (np.concatenate([f[k] for k in layers], 1) for f in (features, fitted_on))
        expected = half_squared_distance(z, known, np.arange(90) % 3)
        np.testing.assert_allclose(scores[f"Mahalanobis, {view}"].numpy(), expected, rtol=1e-4)
        unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (z, known)]
        nearest = np.sort(cdist(*unit), axis=1)[:, 3]
        np.testing.assert_allclose(scores[f"kNN, {view}"].numpy(), nearest, rtol=1e-6)
    assert len(scores) == 4 + 2 * len(views)
    assert all(s.dtype == torch.float64 and s.shape == (30,) for s in scores.values())
    assert torch.get_default_dtype() == torch.float32


def half_squared_distance(z, known, labels):
    """Take the nearest class centre, in the metric of the sum within classes and a ridge."""
    centres = np.stack([known[labels == k].mean(axis=0) for k in range(3)])
    within = known - centres[labels]
    scatter = within.T @ within + 1e-6 * np.eye(z.shape[1])
    apart = z[:, None] - centres
    solved = np.linalg.solve(scatter, apart.reshape(-1, z.shape[1]).T).T.reshape(apart.shape)
    return 0.5 * (apart * solved).sum(axis=2).min(axis=1)


def test_from_images_to_numbers(toy):
    _, detectors = toy
    clean, unknown = make_images(60), (torch.rand(40, 1, 8, 8) > 0.5).float()
    labels = torch.arange(60) % 3
    sets = [Unknown("black and white points", "noise", unknown)]
    first, entry = measure_all(detectors.scores, clean, labels, sets)
    right = (detectors.net(clean).argmax(dim=1) == labels).double().mean().item()
    assert first["accuracy"][0] == pytest.approx(right, abs=1e-5)
    negatives, positives = detectors.scores(clean)[0], detectors.scores(unknown)[0]
    for name, found in entry["detectors"].items():
        scores = torch.cat([negatives[name], positives[name]]).numpy()
        expected = roc_auc_score([0] * 60 + [1] * 40, scores)
        assert found["auroc"][0] == pytest.approx(expected, abs=1e-5)
    rejected = (detectors.dnr.predict(unknown) == REJECT).double().mean().item()
    assert entry["detectors"]["DNR"]["rejected"][0] == pytest.approx(rejected) and rejected > 0
