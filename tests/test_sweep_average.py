import pytest

from benchmarks.paper.sweep_average import average_sweeps


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
