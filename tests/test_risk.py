"""A threshold set by an error keeps its promise, and wastes little for it."""

import math

import pytest
import torch
from scipy import stats

from torchdnr import NR, WithReject
from torchdnr.rejection.risk import error_bound, threshold_at_error

each_number_of_draws = pytest.mark.parametrize(
    "draws", [300, pytest.param(1000, marks=pytest.mark.slow)]
)
SCORES = torch.arange(1, 100_001, dtype=torch.float64) / 100_000
TIED = (SCORES * 50).ceil() / 50


def falling(scores):
    """Probability of an error of inputs with these scores, uniform in (0, 1]."""
    return 0.3 * (1 - scores) ** 3


def confident_errors(scores):
    """More errors at the very top than below, as wrong labels cause them, and most at the end."""
    return torch.where(scores > 0.95, 0.09, torch.where(scores > 0.2, 0.02, 0.4)).double()


def everywhere(scores):
    return torch.full_like(scores, 0.0501)


class Population:
    """All inputs there are: what they score, and the true error among those above a threshold."""

    def __init__(self, scores, error):
        self.scores, self.error = scores, error(scores)
        errors = self.error.flip(0).cumsum(0)  # of the k highest
        self.risk = (errors / torch.arange(1, len(scores) + 1)).flip(0)

    def draw(self, n, generator):
        rows = torch.randint(len(self.scores), (n,), generator=generator)
        wrong = torch.rand(n, generator=generator, dtype=torch.float64) < self.error[rows]
        return self.scores[rows], wrong

    def at(self, theta):
        """Return the error among accepted inputs, and the share accepted."""
        first = int(torch.searchsorted(self.scores, theta, right=True))
        n = len(self.scores)
        return (self.risk[first].item() if first < n else 0.0), 1 - first / n

    def most_acceptable(self, max_error):
        """Return the largest share that can be accepted, as who knows the true error would."""
        rises = self.scores[1:] > self.scores[:-1]
        good = ((self.risk[1:] <= max_error) & rises).nonzero()
        return 1 - (good[0].item() + 1) / len(self.scores)


def simulate(population, n, max_error, draws):
    generator = torch.Generator().manual_seed(0)
    broken, shares = 0, []
    for _ in range(draws):
        try:
            theta = threshold_at_error(*population.draw(n, generator), max_error, 0.95)
        except ValueError:  # no promise, and none broken
            continue
        risk, accepted = population.at(theta)
        broken += risk > max_error
        shares.append(accepted)
    return broken, shares


@each_number_of_draws
@pytest.mark.parametrize(
    ("scores", "error", "n", "max_error"),
    [
        *(
            pytest.param(SCORES, falling, *given, marks=pytest.mark.slow)
            for given in ((300, 0.05), (1500, 0.02), (5000, 0.05))
        ),
        (TIED, falling, 1000, 0.05),
        (SCORES, confident_errors, 2000, 0.05),
        (SCORES, everywhere, 1000, 0.05),
    ],
)
def test_the_true_error_exceeds_the_bound_in_at_most_5_percent_of_draws(
    scores, error, n, max_error, draws
):
    broken, _ = simulate(Population(scores, error), n, max_error, draws)
    # So many violations are shown, with probability 0.999, by a promise that holds in 95 %.
    allowed = int(stats.binom.ppf(0.999, draws, 0.05))
    assert broken <= allowed, f"{broken} of {draws}"


@each_number_of_draws
@pytest.mark.parametrize(
    ("scores", "error", "share"),
    [
        (TIED, falling, 0.92),
        pytest.param(SCORES, falling, 0.95, marks=pytest.mark.slow),
        pytest.param(SCORES, confident_errors, 0.95, marks=pytest.mark.slow),
    ],
)
def test_nearly_as_many_are_accepted_as_if_the_true_error_were_known(scores, error, share, draws):
    population = Population(scores, error)
    _, shares = simulate(population, 5000, 0.05, draws)
    assert len(shares) > 0.97 * draws
    assert sum(shares) / len(shares) > share * population.most_acceptable(0.05)


def test_one_wrong_input_at_the_top_does_not_end_it():
    scores = torch.arange(2000.0)
    wrong = scores > 1998  # the most certain of all
    assert (scores > threshold_at_error(scores, wrong, 0.01)).sum() == 1999


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("n", [1, 20, 300, 100_000])
def test_the_bound_is_that_of_clopper_and_pearson(n, confidence):
    for errors in {0, 1, n // 50, n - 1, n}:
        expected = stats.beta.ppf(confidence, errors + 1, n - errors) if errors < n else 1.0
        assert error_bound(errors, n, confidence) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("max_error", [0.001, 0.05, 0.3])
def test_a_lone_candidate_is_promised_iff_the_exact_test_allows(max_error):
    """Of the inputs all but one have the same score: only one threshold is possible."""
    for n in (100, 1000, 4000):
        allowed = stats.binom.ppf(0.05, n, max_error)  # the CDF there is >= 0.05
        allowed -= stats.binom.cdf(allowed, n, max_error) > 0.05
        scores = torch.ones(n + 1, dtype=torch.float64)
        scores[-1] = 0
        for errors in range(max(0, int(allowed)), int(allowed) + 2):
            wrong = torch.arange(n + 1) < errors
            # All beginnings lie in the one group of equal scores: nothing of 0.05 is lost.
            if errors <= allowed:
                assert threshold_at_error(scores, wrong, max_error, 0.95) == 0
            else:
                with pytest.raises(ValueError, match="no threshold promises"):
                    threshold_at_error(scores, wrong, max_error, 0.95)


def test_where_nothing_can_be_promised_the_error_says_how_many_inputs_it_takes():
    scores = torch.arange(200.0)
    with pytest.raises(ValueError, match=r"expected 300 inputs at least.* got 200; pass more"):
        threshold_at_error(scores, scores < 0, 0.01)
    # 299 without an error are the fewest: 0.99^299 = 0.0495
    assert threshold_at_error(torch.arange(300.0), torch.zeros(300), 0.01) == 0
    scores = torch.arange(1000.0)
    with pytest.raises(ValueError, match="more inputs like these would not help; pass a larger"):
        threshold_at_error(scores, scores % 10 == 0, 0.01)
    wrong = scores % 142 == 3  # 0.7 %
    with pytest.raises(ValueError, match=r"7 are wrong; pass about \d+ inputs") as caught:
        threshold_at_error(scores, wrong, 0.01)
    needed = int(str(caught.value).split("pass about ")[1].split()[0])
    scores = torch.arange(float(2 * needed))
    threshold_at_error(scores, scores % 142 == 3, 0.01)
    with pytest.raises(ValueError, match="with different scores"):
        threshold_at_error(torch.zeros(1000), torch.zeros(1000), 0.01)


class Columns(NR):
    """Scores are the pixels themselves."""

    num_classes = 2

    def __init__(self):
        super().__init__(torch.nn.Sequential(torch.nn.Flatten()), "0")

    def scores(self, inputs):
        return inputs.flatten(1)


def images(n=2000, seed=0):
    """Two pixels each, and a class that is more often that of the brighter, the brighter it is."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(n, 2, generator=generator)
    best, labels = inputs.max(dim=1)
    right = torch.rand(n, generator=generator) < 1 - 0.5 * (1 - best)
    return inputs, torch.where(right, labels, 1 - labels)


def models():
    return {
        "a classifier": Columns(),
        "with a detector": WithReject(lambda x: x, lambda x: -x.amax(dim=1), 0.0),
    }


@pytest.mark.parametrize("kind", models())
def test_calibrate_by_error_promises_it_of_the_accepted(kind):
    model, (inputs, labels) = models()[kind], images()
    assert model.calibrate(inputs, labels, max_error=0.1) is model
    further, truth = images(100_000, seed=1)
    predicted = model.predict(further)
    accepted = predicted >= 0
    error = (predicted != truth)[accepted].double().mean()
    assert 0.07 < error < 0.1 and 0.3 < accepted.double().mean() < 1
    # fewer are accepted for more confidence, and for less error
    shares = []
    for goal in ({"max_error": 0.1, "confidence": 0.999}, {"max_error": 0.08}):
        model.calibrate(inputs, labels, **goal)
        shares.append((model.predict(further) >= 0).double().mean())
    assert max(shares) < accepted.double().mean()
    threshold = model.threshold
    loader = list(zip(inputs.split(100), labels.split(100), strict=True))
    assert model.calibrate(loader, max_error=0.08).threshold == threshold
    assert model.calibrate(inputs, labels.tolist(), max_error=0.08).threshold == threshold


@pytest.mark.parametrize("kind", models())
def test_goals_that_are_unclear_are_refused(kind):
    model, (inputs, labels) = models()[kind], images(500)
    for arguments, message in {
        (inputs,): "max_error needs labels",
        (inputs, 0.1): "got both",
        (inputs, labels[:9]): r"labels must be \(n,\), .* got \(9,\) beside",
        (inputs.split(9), labels): "beside a loader",
    }.items():
        with pytest.raises(ValueError, match=message):
            model.calibrate(*arguments, max_error=0.2)
    for goal in ({"max_error": 0.0}, {"max_error": math.nan}, {"max_error": 0.2, "confidence": 1}):
        with pytest.raises(ValueError, match=r"(max_error|confidence) must be in \(0, 1\)"):
            model.calibrate(inputs, labels, **goal)


def test_how_many_inputs_it_would_take_is_said_at_once_where_they_are_many():
    best = torch.cat([torch.ones(10001), torch.zeros(50)])
    wrong = torch.zeros(10051, dtype=torch.bool)
    wrong[:1000] = True  # 9.999 % of those that can be accepted
    with pytest.raises(ValueError, match=r"pass about \d{9,} inputs or more"):
        threshold_at_error(best, wrong, 0.1)
