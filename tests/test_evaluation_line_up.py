"""The line-up: attacks by name, each with the options that it has."""

import math

import pytest
import torch
from torch import nn

from torchdnr.evaluation import ATTACKS, build_line_up, default_line_up, security_evaluations
from torchdnr.evaluation.judging import CountedModel
from torchdnr.evaluation.line_up import DEFAULT_ATTACKS, choose_attacks
from torchdnr.evaluation.report.table import total_costs

QUICK = {name: {"steps": 4} for name, entry in ATTACKS.items() if "steps" in entry.accepts}
QUICK |= {"square": {"queries": 9}, "noise": {"draws": 5}}


class Disc(nn.Module):
    """Three classes of images with four pixels; far from the middle everything is rejected."""

    reject_index = 3

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor
        weight = torch.tensor([[4.0, -1, 0, 1], [-1, 4, 1, 0], [0, 1, 4, -1]])
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        scores = torch.tanh(self.factor * (x.flatten(1) - 0.5) @ self.weight.T)
        return torch.cat([scores, scores.new_full((len(x), 1), -0.1)], dim=1)

    def smoothed(self, factor):
        return Disc(factor)


@pytest.fixture
def data():
    inputs, pool = torch.rand(6, 1, 2, 2), torch.rand(30, 1, 2, 2)
    return inputs, Disc()(inputs)[:, :3].argmax(dim=1).detach(), pool


@pytest.mark.parametrize("every_eps", [False, True])
@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_every_attack_of_the_full_line_up_runs_within_its_budget(data, norm, every_eps):
    inputs, labels, pool = data
    surrogate = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    options = {"norm": norm, "surrogate": surrogate, "own_options": QUICK}
    attacks = build_line_up(["full"], pool, **options)
    expected = set(ATTACKS) - ({"ddn"} if norm != 2 else set())
    assert list(attacks) == [ATTACKS[name].label for name in ATTACKS if name in expected]
    eps = [0, 0.1, 0.6]
    curves = security_evaluations(
        {"disc": Disc(), "plain": surrogate}, inputs, labels, eps, norm=norm, attacks=attacks,
        init_inputs=pool, progress=False, every_eps=every_eps,
    )  # fmt: skip
    curve = curves["disc"]
    lines = [
        name for name, one in attacks.items() if every_eps or one.minimum_norm or one.every_eps
    ]
    assert list(curve.attacks) == lines
    assert [*curve.refinements] == [name for name in attacks if name not in lines]
    ran = curves["plain"].attacks.keys() | curves["plain"].refinements.keys()
    assert set(attacks) - ran == {"smoothed PGD"}  # it has no kernels
    assert every_eps == (lines == list(attacks))
    for name, alone in (curve.attacks | curve.refinements).items():
        spent, violations = total_costs(alone)
        assert violations == 0 and spent["forwards"] > 0
        assert (spent["backwards"] > 0) == (name not in ("Square", "noise", "transfer"))
        if "norm" in alone.settings:
            assert alone.settings["norm"] == norm
    for points, value in zip(curve.adversarial, eps, strict=True):
        size = torch.linalg.vector_norm((points - inputs).flatten(1), norm, dim=1)
        assert size.max() <= value + 1e-5
    assert curve.accuracy[2] < 1


def test_options_reach_the_attacks_that_have_them(data):
    *_, pool = data
    options = {"objective": "secml", "restarts": 2, "steps": 7, "seed": 5}
    own = {"apgd": {"steps": 9}}
    attacks = build_line_up(
        ["full"], pool, surrogate=Disc(), options=options, own_options=own, norm=2
    )
    for name, entry in ATTACKS.items():
        settings = attacks[entry.label].settings
        for key, value in options.items():
            wanted = own.get(name, {}).get(key, value)
            assert settings.get(key, "not there") == (
                wanted if key in entry.accepts else "not there"
            )
        assert not {"start", "progress", "batch_size", "init_inputs"} & settings.keys()
    assert attacks["line-search PGD"].settings["objective"] == "secml"
    assert default_line_up(pool)["line-search PGD"].settings["objective"] == "paper"
    assert default_line_up(pool)["APGD"].settings["objective"] == "decision"
    assert attacks["selective PGD"].settings["projected"] == "none"
    assert attacks["selective PGD"].settings["selective"] is True
    assert attacks["multi-target APGD"].settings["steps"] == 7  # of the attack inside
    assert "objective" not in attacks["transfer"].settings
    assert attacks["FMN"].settings.keys() >= {"step_size", "starts"}


def test_the_default_line_up_and_groups():
    assert [ATTACKS[name].label for name in DEFAULT_ATTACKS] == list(
        default_line_up(torch.rand(3, 4))
    )
    assert choose_attacks(["noise", "default", "apgd"]) == [*DEFAULT_ATTACKS, "noise"]
    assert choose_attacks(["full"]) == list(ATTACKS)
    assert set(ATTACKS) - set(choose_attacks(["full"], math.inf)) == {"ddn"}
    assert set(ATTACKS) - set(choose_attacks(["full"], 2, surrogate=False)) == {"transfer"}
    assert len({entry.label for entry in ATTACKS.values()}) == len(ATTACKS)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["pgdd"], {}, "no attack 'pgdd'; choose from: default, full, line-search-pgd"),
        (["ddn"], {"norm": 1}, "ddn is for the l2 norm only, got 1; choose from: line"),
        (["transfer"], {}, "transfer needs a surrogate"),
        ([], {}, "no attack is named"),
        (["pgd"], {"own_options": {"x": {}}}, r"no attack \['x'\]"),
    ],
)
def test_what_cannot_be_built_is_refused(names, options, message):
    with pytest.raises(ValueError, match=message):
        build_line_up(names, torch.rand(3, 4), **options)


def test_a_classifier_without_any_attack_is_refused(data):
    inputs, labels, pool = data
    attacks = build_line_up(["smoothed-pgd"], pool)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="attacks is empty for plain"):
        security_evaluations({"plain": plain}, inputs, labels, [0, 1], attacks=attacks)


def test_the_counted_model_passes_on_what_the_model_has():
    model = Disc()
    counted = CountedModel(model)
    assert counted.weight is model.weight and counted.reject_index == 3
    assert counted.factor == 1.0 and CountedModel(lambda x: x).reject_index is None
    view = counted.smoothed(0.5)
    x = torch.rand(4, 4)
    assert torch.equal(view(x), model.smoothed(0.5)(x))
    counted(x[:3])
    torch.autograd.grad(view(x.requires_grad_()).sum(), x)
    assert (counted.forwards, counted.backwards) == (4 + 3 + 4, 4)
    assert not hasattr(CountedModel(nn.Linear(2, 2)), "smoothed")
    with pytest.raises(AttributeError, match="no attribute 'smoothed'"):
        CountedModel(nn.Linear(2, 2)).smoothed(2)
