import math
import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from property_examples import up_to

from torchdnr import NR, REJECT, WithReject
from torchdnr.decisions import predict_with_rejection
from torchdnr.distributed.sharing import checked_batches
from torchdnr.rejection import CalibrationWarning, rejection_threshold
from torchdnr.svm import NotFittedError

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


class Flat(NR):
    """Scores are the pixels themselves."""

    num_classes = 4

    def __init__(self, batch_size=256):
        super().__init__(torch.nn.Sequential(torch.nn.Flatten()), "0", batch_size=batch_size)

    def scores(self, inputs):
        return inputs.flatten(1)


def distinct_scores(n, c, seed, dtype):
    """Return scores whose best values are distinct, in a random order."""
    generator = torch.Generator().manual_seed(seed)
    best = torch.randperm(n, generator=generator).to(dtype) / 8 - n / 20
    scores = best.unsqueeze(1) - torch.rand(n, c, generator=generator).to(dtype)
    winner = torch.randint(c, (n,), generator=generator)
    return scores.scatter(1, winner.unsqueeze(1), best.unsqueeze(1)), winner


@given(
    n=st.integers(1, 400),
    c=st.integers(1, 4),
    percent=st.integers(0, 99),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@example(n=100, c=2, percent=29, seed=0, dtype=torch.float32)  # 0.29 * 100 is 28.999...
@up_to(150)
def test_exactly_the_share_with_the_lowest_best_scores_is_rejected(n, c, percent, seed, dtype):
    scores, winner = distinct_scores(n, c, seed, dtype)
    threshold = rejection_threshold(scores, percent / 100)
    assert threshold.shape == () and threshold.dtype == dtype
    labels = predict_with_rejection(scores, threshold)
    rejected = labels == REJECT
    assert rejected.sum() == math.floor(Fraction(percent, 100) * n)
    assert torch.equal(labels[~rejected], winner[~rejected])
    best = scores.max(dim=1).values
    if rejected.any():
        assert best[rejected].max() < best[~rejected].min()
        # Halfway, so that rounding on either side changes nothing.
        middle = (best[rejected].max() + best[~rejected].min()) / 2
        torch.testing.assert_close(threshold, middle)


@given(seed=st.integers(0, 1000), rate=st.floats(0.0, 0.999), levels=st.integers(1, 5))
@up_to(60)
def test_equal_scores_are_rejected_together_and_never_too_few(seed, rate, levels):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (50, 3), generator=generator).double()
    threshold = rejection_threshold(scores, rate)
    best, rejected = scores.max(1).values, predict_with_rejection(scores, threshold) == REJECT
    for value in best.unique():
        assert rejected[best == value].unique().numel() == 1
    wanted = math.floor(rate * 50)
    assert rejected.sum() >= wanted
    assert (best < best[rejected].max()).sum() < max(wanted, 1) if rejected.any() else wanted == 0


def test_a_tie_with_the_threshold_rejects():
    scores = torch.tensor([[0.5, 0.2], [0.5, 0.5001], [0.1, -3.0]])
    assert predict_with_rejection(scores, 0.5).tolist() == [REJECT, 1, REJECT]
    assert predict_with_rejection(scores, torch.tensor(0.1)).tolist() == [0, 1, REJECT]
    assert predict_with_rejection(scores[:1] * torch.nan, 0.0).tolist() == [REJECT]
    assert predict_with_rejection(scores, 0.5).dtype == torch.int64


def test_neighbouring_floats_still_split():
    low = torch.tensor(1.0)
    high = torch.nextafter(low, torch.tensor(2.0))
    scores = torch.stack([low, high]).unsqueeze(1)
    assert predict_with_rejection(scores, rejection_threshold(scores, 0.5)).tolist() == [REJECT, 0]


@pytest.mark.parametrize("n", [1, 9])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e20])
def test_rate_zero_and_a_single_sample_reject_nothing(n, scale):
    scores = scale * torch.randn(n, 3)
    for rate in (0.0, 0.99 / n):
        assert (predict_with_rejection(scores, rejection_threshold(scores, rate)) >= 0).all()


@pytest.mark.parametrize(
    ("scores", "rate", "message"),
    [
        (torch.zeros(5, 2), 1.0, r"rejection_rate must be in \[0, 1\), got 1.0"),
        (torch.zeros(5, 2), -0.1, "rejection_rate must be in"),
        (torch.zeros(5, 2), math.nan, "rejection_rate must be in"),
        (torch.full((5, 2), torch.nan), 0.1, "scores must be finite"),
        (torch.full((5, 2), torch.inf), 0.1, "scores must be finite"),
        (torch.zeros(0, 2), 0.1, r"n >= 1, got \(0, 2\)"),
        (torch.zeros(5), 0.1, r"scores must be \(n, c\)"),
    ],
)
def test_wrong_thresholds_are_refused(scores, rate, message):
    with pytest.raises(ValueError, match=message):
        rejection_threshold(scores, rate)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_labels_and_calibration_agree(dtype, device):
    images = torch.rand(97, 1, 2, 2, dtype=dtype, device=device)
    model = Flat(batch_size=10).to(device).calibrate(images, rejection_rate=0.2)
    output = model(images)
    assert output.shape == (97, 5) and output.dtype == dtype and output.device == images.device
    assert (output[:, -1] == model.threshold).all() and model.reject_index == 4
    best, labels = output[:, :-1].max(1)
    expected = torch.where(best > output[:, -1], labels, REJECT)
    assert torch.equal(model.predict(images), expected)
    assert (expected == REJECT).sum() == 19
    output.zero_()  # fresh and writable: neither images nor threshold are touched
    assert (model(images)[:, -1] == model.threshold).all() and images.max() > 0


def test_calibration_takes_loaders_with_or_without_labels():
    images = torch.rand(30, 4)
    expected = Flat().calibrate(images, 0.1).threshold
    assert Flat().calibrate(images.split(7), 0.1).threshold == expected
    batches = [(batch, torch.zeros(len(batch))) for batch in images.split(7)]
    assert Flat().calibrate(batches, 0.1).threshold == expected


def detector(threshold=0.0):
    """The same decisions as those of ``Flat``, by a score that is higher for suspicious inputs."""
    return WithReject(lambda x: x.flatten(1), lambda x: -x.flatten(1).amax(1), threshold)


@pytest.mark.parametrize("make", [Flat, detector])
@pytest.mark.parametrize(("equal", "rejected"), [(40, "40.0%"), (100, "100.0%")])
def test_a_warning_tells_the_share_really_rejected_where_scores_are_equal(make, equal, rejected):
    """As of repeated images, or where the features are all the same."""
    images = torch.rand(100, 4)
    images[:equal] = torch.tensor([0.0, 0.01, 0.02, 0.0])
    message = f"expected 10.0% of 100 inputs to be rejected, got {rejected}: {equal} of them"
    with pytest.warns(CalibrationWarning, match=message) as caught:
        model = make().calibrate(images, 0.10)
    assert caught[0].filename == __file__
    assert (model.predict(images) == REJECT).sum() == equal


def test_features_that_are_all_equal_are_warned_of_too():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.ReLU())
    net[1].bias.data -= 100  # dead: every feature is 0
    model = NR(net, "2", hyperparameters={"2": (1.0, 1.0)})
    model.fit(torch.rand(60, 4), torch.arange(60) % 2)
    with pytest.warns(CalibrationWarning, match="expected 10.0% of 50 inputs .* got 100.0%"):
        model.calibrate(torch.rand(50, 4), 0.10)


@pytest.mark.parametrize("make", [Flat, detector])
def test_a_share_that_is_met_exactly_is_not_warned_of(make):
    images = torch.rand(60, 4)
    images[:6] = 0  # as many as are to be rejected
    images[9:30] = 1  # equal, but accepted
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rate, rejected in ((0.1, 6), (0.0, 0), (0.05, 6)):
            if rate == 0.05:
                warnings.simplefilter("ignore")
            assert (make().calibrate(images, rate).predict(images) == REJECT).sum() == rejected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.5, 0.99])
def test_a_detector_is_calibrated_by_the_rule_of_the_classifiers(rate, dtype):
    images = torch.rand(100, 4, dtype=dtype)
    model = detector().calibrate(images, rate)
    expected = Flat().calibrate(images, rate)
    assert torch.equal(model.predict(images), expected.predict(images))
    # the same for all further images: the thresholds lie between the same two numbers
    theta = expected.threshold
    near = torch.nextafter(theta, theta + torch.tensor([[-1.0], [1.0]], dtype=dtype))
    further = torch.cat([near, theta[None, None]]).clamp(0, 1) * torch.ones(4, dtype=dtype)
    assert torch.equal(model.predict(further), expected.predict(further))


@pytest.mark.parametrize("make", [Flat, lambda: detector(-0.5)])
def test_predict_takes_loaders_and_returns_scores(make):
    images, model = torch.rand(30, 4), make()
    if isinstance(model, NR):
        model.set_threshold(0.5)
    expected = model.predict(images)
    assert 0 < (expected == REJECT).sum() < 30
    assert torch.equal(model.predict(images.split(7)), expected)
    batches = [(batch, torch.zeros(len(batch))) for batch in images.split(7)]
    labels, scores = model.predict(batches, return_scores=True)
    assert torch.equal(labels, expected) and torch.equal(scores, images)
    assert torch.equal(model.predict(images, return_scores=True)[1], images)
    with pytest.raises(ValueError, match="must lie in"):
        model.predict([images, images + 1])
    with pytest.raises(ValueError, match="no batch"):
        model.predict([])


def test_the_threshold_must_be_set_and_finite():
    model, images = Flat(), torch.rand(3, 4)
    for use in (model, model.predict):
        with pytest.raises(NotFittedError, match=r"call calibrate\(images\)"):
            use(images)
    assert model.scores(images).shape == (3, 4)
    for wrong in (math.nan, math.inf, torch.tensor(-math.inf)):
        with pytest.raises(ValueError, match="threshold must be finite"):
            model.set_threshold(wrong)
    model.set_threshold(1)
    assert model(images)[0, -1] == 1.0
    assert (model.predict(images) == REJECT).all()
    model.reset_threshold()
    with pytest.raises(NotFittedError, match="threshold is not set"):
        model(images)


def test_loading_a_state_without_threshold_is_noticed():
    model, images = Flat(), torch.rand(3, 4)
    model.set_threshold(0.5)
    model(images)
    model.load_state_dict(Flat().state_dict())
    with pytest.raises(NotFittedError, match="threshold is not set"):
        model(images)


def test_a_float64_threshold_survives_a_state_dict():
    model, fresh = Flat(), Flat()
    model.calibrate(torch.rand(40, 4, dtype=torch.float64))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.threshold, model.threshold)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(0, 4), "non-empty batch"),
        (torch.rand(4), "non-empty batch"),
        (torch.rand(2, 4) + 1, r"must lie in \(0.0, 1.0\), got values from 1"),
        (torch.rand(2, 4) - 1, r"must lie in"),
        (torch.full((2, 4), torch.nan), "must lie in .* nan"),
        (torch.ones(2, 4).byte(), "must be floating point .* got torch.uint8"),
    ],
)
def test_wrong_images_are_refused(images, message):
    model = Flat()
    model.set_threshold(0.0)
    for use in (model.predict, model.calibrate, lambda x: model.calibrate([x])):
        with pytest.raises(ValueError, match=message):
            use(images)
    assert model.threshold == 0.0


def test_empty_loaders_and_batch_sizes_are_refused():
    with pytest.raises(ValueError, match="the loader yielded no batch"):
        list(checked_batches([], 8))
    with pytest.raises(ValueError, match="batch_size must be >= 1"):
        Flat(batch_size=0)
