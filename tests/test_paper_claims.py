"""What is said of the paper's experiments, by hand-made outcomes, and the figure of a toy."""

import pytest
import torch
from attack_toys import NORMS, RBFMap

from benchmarks.paper.claims import (
    FAILS,
    HOLDS,
    LEVEL,
    OPEN,
    PARTLY,
    Outcomes,
    _same,
    _signs,
    gather,
    images_to_be_the_same,
    images_to_tell_apart,
    judge_claims,
)
from benchmarks.paper.merge import average_sweeps
from benchmarks.paper.plane import plot_plane

EPS = [0, 1, 2]
N = 100


def outcomes(right, rejected):
    """Build outcomes in which the first so many samples are right, or rejected, at each eps."""
    order = torch.arange(N)
    return Outcomes(
        EPS,
        torch.stack([order < count for count in right]),
        torch.stack([order < count for count in rejected]),
        order,
    )


CLEAN = {"DNN": torch.arange(N) < 99, "NR": torch.arange(N) < 88, "DNR": torch.arange(N) < 89}
AS_THE_PAPER = {
    "DNN": outcomes([99, 5, 0], [0, 0, 0]),
    "NR": outcomes([88, 40, 0], [10, 35, 0]),
    "DNR": outcomes([89, 60, 0], [10, 20, 0]),
}


def verdicts(found, at=(1,), sweeps=None, clean=CLEAN):
    claims = judge_claims(clean, torch.arange(N), found, at, sweeps)
    return {claim.claim: claim.verdict for claim in claims}


def test_outcomes_as_in_the_paper_hold():
    assert set(verdicts(AS_THE_PAPER).values()) == {HOLDS}


def drawn(n, more, less, generator):
    """Draw images of which a share is right by the first alone, and a share by the other."""
    chance = torch.rand(n, generator=generator)
    return chance < more, (chance > 1 - less)


@pytest.mark.parametrize(("more", "less"), [(0.10, 0.04), (0.02, 0.0), (0.3, 0.2)])
def test_on_so_many_images_four_tests_in_five_find_the_difference(more, less):
    rates = torch.arange(1000) / 1000
    seen = rates < more, rates >= 1 - less
    n = round(images_to_tell_apart(*seen, torch.arange(1000), LEVEL))
    generator = torch.Generator().manual_seed(0)
    found = [_signs([drawn(n, more, less, generator)], torch.arange(n)) == [1] for _ in range(300)]
    assert 0.7 < sum(found) / 300 < 0.9


def test_on_so_many_images_four_in_five_are_certain_to_be_the_same():
    rates = torch.arange(1000) / 1000
    seen = rates < 0.012, rates >= 0.99
    n = round(images_to_be_the_same(*seen, torch.arange(1000)))
    generator = torch.Generator().manual_seed(0)
    found = [_same(*drawn(n, 0.012, 0.01, generator), torch.arange(n)) for _ in range(300)]
    assert 0.7 < sum(found) / 300 < 0.9


def test_an_open_claim_tells_how_many_images_would_decide_it_and_no_other_does():
    close = {"NR": outcomes([88, 61, 0], [10, 35, 0]), "DNR": outcomes([89, 60, 0], [10, 20, 0])}
    claims = judge_claims(CLEAN, torch.arange(N), {**AS_THE_PAPER, **close}, (1,), None)
    assert {c.verdict for c in claims} == {HOLDS, OPEN}
    assert all((c.needed is not None) == (c.verdict == OPEN) for c in claims)
    assert all(c.needed > N for c in claims if c.verdict == OPEN)
    assert claims[0].to_dict().keys() == {"claim", "verdict", "numbers"}


def test_how_many_images_tell_that_nothing_is_left():
    few = torch.arange(20)
    none = Outcomes(EPS, torch.zeros(3, 20).bool(), torch.zeros(3, 20).bool(), few)
    zero = judge_claims(
        {name: few < 19 for name in CLEAN}, few, dict.fromkeys(CLEAN, none), (1,), None
    )[2]
    assert zero.verdict == OPEN and 34 < zero.needed < 40  # 1.96^2 / (n + 1.96^2) is to be 0.1


@pytest.mark.parametrize(
    ("change", "claim", "verdict"),
    [
        ({"DNR": outcomes([89, 30, 20], [10, 20, 0])}, "DNR is slightly more", PARTLY),
        ({"DNR": outcomes([89, 20, 0], [10, 20, 0])}, "DNR is slightly more", FAILS),
        ({"DNR": outcomes([89, 60, 30], [10, 20, 0])}, "no accuracy at all", PARTLY),
        ({"NR": outcomes([88, 40, 0], [10, 35, 60])}, "first rise", PARTLY),
        ({"NR": outcomes([88, 40, 0], [60, 35, 0])}, "first rise", PARTLY),
        ({"NR": outcomes([88, 40, 0], [10, 12, 9])}, "first rise", PARTLY),
        ({"NR": outcomes([88, 40, 0], [10, 15, 0])}, "NR rejects more", OPEN),
        ({"NR": outcomes([88, 40, 0], [10, 5, 0])}, "NR rejects more", FAILS),
        ({"NR": outcomes([88, 5, 0], [10, 35, 0])}, "attack, NR is more accurate", OPEN),
    ],
)
def test_other_outcomes_do_not(change, claim, verdict):
    found = verdicts({**AS_THE_PAPER, **change})
    assert [value for key, value in found.items() if claim in key] == [verdict]


def test_rates_that_only_fall_do_not_first_rise():
    falling = outcomes([88, 40, 0], [60, 35, 0])
    found = verdicts({**AS_THE_PAPER, "NR": falling, "DNR": falling})
    assert [value for key, value in found.items() if "first rise" in key] == [FAILS]


def test_rates_that_neither_rise_nor_fall_cannot_be_told():
    level = outcomes([88, 40, 0], [10, 12, 10])
    found = verdicts({**AS_THE_PAPER, "NR": level, "DNR": level})
    assert [value for key, value in found.items() if "first rise" in key] == [OPEN]


def test_few_samples_do_not_show_that_no_accuracy_is_left():
    for n, left, verdict in ((20, 0, OPEN), (100, 0, HOLDS), (100, 1, HOLDS), (100, 10, FAILS)):
        right = torch.stack([torch.ones(n, dtype=torch.bool), torch.arange(n) < left])
        one = Outcomes([0, 1], right, torch.zeros_like(right), torch.arange(n))
        found = verdicts({"DNN": one, "NR": one, "DNR": one})
        assert [value for key, value in found.items() if "no accuracy" in key] == [verdict]


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [((99, 88, 89), HOLDS), ((99, 88, 99), PARTLY), ((99, 95, 95), OPEN), ((80, 95, 95), FAILS)],
)
def test_without_attack_all_test_images_count(counts, verdict):
    clean = {
        name: torch.arange(N) < count
        for name, count in zip(("DNN", "NR", "DNR"), counts, strict=True)
    }
    found = verdicts(AS_THE_PAPER, clean=clean)
    assert [value for key, value in found.items() if "without attack" in key] == [verdict]


def test_five_samples_that_differ_decide_nothing_and_six_do():
    for more, verdict in ((5, OPEN), (6, HOLDS)):
        close = {**AS_THE_PAPER, "DNR": outcomes([89, 40 + more, 0], [10, 34, 0])}
        found = verdicts(close)
        assert found["under attack, DNR is slightly more accurate than NR"] == verdict


def test_an_image_that_several_runs_draw_counts_once():
    """Six of them decide; one image six times, or three twice, does not."""
    for images, verdict in (([0, 1, 2, 3, 4, 5], HOLDS), ([0] * 6, OPEN), ([0, 1, 2] * 2, OPEN)):
        drawn = torch.arange(N)
        drawn[:6] = torch.tensor(images)
        right = torch.ones(2, N, dtype=torch.bool)
        behind = right & (torch.arange(N) >= 6)
        none = torch.zeros_like(right)
        nr, dnr = Outcomes([0, 1], behind, none, drawn), Outcomes([0, 1], right, none, drawn)
        found = verdicts({"DNN": nr, "NR": nr, "DNR": dnr})
        assert found["under attack, DNR is slightly more accurate than NR"] == verdict


def test_a_difference_that_is_certain_to_be_small_fails_a_claim():
    n = 4000
    order = torch.arange(n)
    none = torch.stack([order < 0] * 2)
    one = Outcomes([0, 1], torch.stack([order < 3600, order < 2000]), none, order)
    two = Outcomes([0, 1], torch.stack([order < 3600, order < 2002]), none, order)
    found = verdicts({"DNN": one, "NR": one, "DNR": two}, at=(1,))
    assert found["under attack, DNR is slightly more accurate than NR"] == FAILS


def test_the_numbers_of_a_claim_are_those_of_the_outcomes():
    claims = {
        c.claim: c.numbers for c in judge_claims(CLEAN, torch.arange(N), AS_THE_PAPER, (1,), None)
    }
    told = claims["under attack, DNR is slightly more accurate than NR"]
    assert told == "accuracy in percent: 60.0 against 40.0 at 1, 0.0 against 0.0 at 2 (ahead at 1)"


def test_gather_counts_a_reject_as_an_error_without_attack_and_as_right_under_it():
    class Run:
        eps = (0.0, 1.0)
        labels = torch.tensor([0, 1, 2])
        predictions = torch.tensor([[0, -1, 1], [0, -1, 1]])

    found = gather([Run(), Run()], [torch.tensor([7, 8, 9]), torch.tensor([1, 8, 2])])
    assert found.images.tolist() == [7, 8, 9, 1, 8, 2]
    assert found.right.tolist() == [[True, False, False] * 2, [True, True, False] * 2]
    assert found.rejected.tolist() == [[False, True, False] * 2] * 2


def test_the_trade_is_judged_by_the_ends_of_the_sweep_if_attacked_again():
    def sweep(low, high, again):
        def entry(value):
            return {"value": value, "low": value - 0.05, "high": value + 0.05}

        row = [[entry(low), entry(high)]]
        return {
            "eps": [1],
            "accuracy": row,
            "reattacked_accuracy": row if again else None,
            "false_rejection_rate": [entry(0.05), entry(0.4)],
        }

    key = "a higher theta buys accuracy under attack for clean samples rejected"
    for ends, again, verdict in (
        ((0.2, 0.6), True, HOLDS),
        ((0.5, 0.55), True, OPEN),
        ((0.2, 0.6), False, OPEN),
    ):
        sweeps = {"NR": sweep(*ends, again), "DNR": sweep(*ends, again)}
        assert verdicts(AS_THE_PAPER, sweeps=sweeps)[key] == verdict


# --- averages of sweeps ---


def estimate(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 10}


def sweep(values, thetas=(0.1, 0.2)):
    row = [estimate(value) for value in values]
    return {
        "name": "NR",
        "norm": 2.0,
        "eps": [1.0],
        "thresholds": list(thetas),
        "clean_accuracy": row,
        "false_rejection_rate": row,
        "accuracy": [row],
        "rejection_rate": [row],
        "reattacked_accuracy": None,
        "reattacked_rejection_rate": None,
        "settings": {"samples": 10},
    }


def test_one_run_keeps_its_intervals():
    found = average_sweeps("NR", [sweep([0.3, 0.5])])
    assert found.accuracy[0][0].to_dict() == estimate(0.3)
    assert found.thresholds == [0.1, 0.2]
    assert found.reattacked_accuracy is None


def test_several_runs_give_mean_and_standard_deviation():
    found = average_sweeps("NR", [sweep([0.3, 0.5]), sweep([0.5, 0.5], thetas=(0.3, 0.2))])
    first, second = found.accuracy[0]
    assert first.value == pytest.approx(0.4)
    assert first.high - first.value == pytest.approx(0.02**0.5)  # of 0.3 and 0.5, n - 1
    assert second.low == second.high == second.value == pytest.approx(0.5)
    assert first.n == 20
    assert found.thresholds == pytest.approx([0.2, 0.2])
    assert found.settings["runs"] == 2


def test_sweeps_that_do_not_fit_together_are_refused():
    other = sweep([0.3, 0.5])
    other["eps"] = [2.0]
    with pytest.raises(ValueError, match="same eps"):
        average_sweeps("NR", [sweep([0.3, 0.5]), other])
    with pytest.raises(ValueError, match="at least one"):
        average_sweeps("NR", [])


# --- the plane ---


@pytest.mark.parametrize("norm", NORMS)
def test_draws_an_image(tmp_path, norm):
    toy = RBFMap()
    inputs, labels, _ = toy.samples(20)
    path = tmp_path / "plane.png"
    options = {"norm": norm, "paths": {"path": inputs[:3]}}
    found = {"a": inputs[1]}
    plot_plane(path, toy, inputs, labels, inputs[0], int(labels[0]), found, 0.3, **options)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


def test_refuses_what_is_not_in_the_plane(tmp_path):
    x = torch.rand(4, 3)
    with pytest.raises(ValueError, match=r"samples must be \(m, 2\) and source \(2,\)"):
        plot_plane(tmp_path / "p.png", RBFMap(), x, torch.zeros(4).long(), x[0], 0, {}, 0.3)
    assert not (tmp_path / "p.png").exists()
