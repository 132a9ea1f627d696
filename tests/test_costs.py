import sys

import pytest
import torch
from torch import nn

from torchdnr import DNR
from torchdnr.costs import record_costs, stage


def test_nothing_is_recorded_unless_asked_for():
    with stage("outside"):
        pass
    with record_costs() as costs:
        pass
    assert costs == {}


def test_one_name_is_one_entry():
    with record_costs() as costs:
        for _ in range(3):
            with stage("a"):
                pass
    assert costs["a"].calls == 3
    assert costs["a"].seconds >= 0
    assert set(costs["a"].to_dict()) == {"seconds", "peak_memory_mib", "calls"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_stage_is_its_own_peak_and_that_of_the_stages_inside():
    def take():
        # 256 MiB, freed at once: much more than a system under pressure takes away meanwhile
        return torch.ones(256 * 2**18).sum()

    with record_costs() as costs:
        with stage("small before"):
            pass
        with stage("outer"), stage("inner"):
            take()
        with stage("small after"):
            pass
    peaks = {name: cost.peak_memory_mib for name, cost in costs.items()}
    if peaks["small after"] is None:
        pytest.skip("this system does not forget the peak of a process")
    assert peaks["inner"] > peaks["small before"] + 200
    assert peaks["outer"] >= peaks["inner"]
    assert peaks["small after"] < peaks["inner"] - 200


def test_a_peak_that_the_system_keeps_counts_only_where_it_rises(monkeypatch, tmp_path):
    def use(peak, now):
        (tmp_path / "status").write_text(f"VmHWM:\t{peak * 1024} kB\nVmRSS:\t{now * 1024} kB\n")

    monkeypatch.setattr("torchdnr.costs._PROCESS", tmp_path)
    use(500, 100)  # 500 MiB were needed before; a plain file cannot reset that
    with record_costs() as costs:
        with stage("below"):
            pass
        with stage("outer"), stage("above"):
            use(700, 100)
        with stage("after"):
            pass
        with stage("above"):  # 700 at the most
            pass
        with stage("below"):
            use(800, 100)
        with stage("outer"):  # may have needed 750, which nobody knows
            pass
    peaks = {name: cost.peak_memory_mib for name, cost in costs.items()}
    assert peaks == {"below": 800, "outer": None, "above": 700, "after": None}


def test_memory_is_unknown_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr("torchdnr.costs._PROCESS", tmp_path / "missing")
    with record_costs() as costs, stage("a"):
        pass
    assert costs["a"].peak_memory_mib is None


def test_a_stage_that_fails_is_recorded_all_the_same():
    with record_costs() as costs, pytest.raises(KeyError), stage("a"):
        raise KeyError
    assert costs["a"].calls == 1
    with stage("b"):  # the recorder is gone
        pass
    assert set(costs) == {"a"}


def test_fit_and_calibrate_tell_their_stages():
    torch.manual_seed(0)
    images = torch.rand(60, 1, 4, 4)
    labels = torch.arange(60) % 2
    images[labels == 1, :, :2] *= 0.2
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    model = DNR(
        net, ["0", "1"], hyperparameters={"1": (1.0, 0.1)}, C_grid=(1.0,), gamma_grid=(1.0,)
    )
    with record_costs() as costs:
        model.fit(images, labels)
        model.calibrate(images, 0.1)
    calls = {name: cost.calls for name, cost in costs.items()}
    # Layer "0" and the combiner are searched, layer "1" is not; both layers are stacked.
    assert calls == {"features": 1, "search": 2, "fit": 1, "stacking": 2, "threshold": 1}
