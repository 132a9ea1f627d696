import json
import math

import pytest
import torch
from torch import nn

from torchdnr.attacks.projections import project
from torchdnr.evaluation import ALPHAS, plot_stratified, stratified_curve


class Strip(nn.Module):
    """Two classes told apart at x_0 = 0.5, rejected within ``width`` of it: a score per side."""

    reject_index = 2

    def __init__(self, width=0.1):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        side = (x[:, :1] - 0.5) * self.weight
        return torch.cat([-side, side, side.new_full(side.shape, self.width)], dim=1)


def problem(eps=0.4, n=60):
    """Inputs, and their best points for evasion within eps: straight to the other side."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    labels = (inputs[:, 0] > 0.5).long()
    step = torch.zeros_like(inputs)
    step[:, 0] = eps * (1 - 2 * labels.to(inputs))
    return inputs, labels, project(inputs + step, inputs, eps, 2, (0, 1))


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_curve_is_the_one_that_geometry_gives(norm):
    inputs, labels, adversarial = problem()
    curve = stratified_curve(
        Strip(),
        inputs,
        labels,
        adversarial,
        0.4,
        norm=norm,
        reject_options={"steps": 40, "restarts": 0},
    )
    distance = (inputs[:, 0] - 0.5).abs()
    evaded = distance < 0.4 - 0.1
    assert torch.equal(curve.evaded, evaded)
    for alpha, row, rate in zip(curve.alphas, curve.rejected, curve.robustness, strict=True):
        slack = (distance - alpha * 0.4 - 0.1).abs() > 2e-3  # reached but for the last step
        expected = distance - alpha * 0.4 <= 0.1
        assert torch.equal(row[slack], expected[slack])
        assert rate.value == pytest.approx((~(evaded | row)).double().mean().item())
        assert rate.low <= rate.value <= rate.high and rate.n == 60


def test_curve_falls_from_what_ignores_small_rejections():
    inputs, labels, adversarial = problem()
    curve = stratified_curve(
        Strip(), inputs, labels, adversarial, 0.4, reject_options={"steps": 5, "restarts": 0}
    )
    values = [rate.value for rate in curve.robustness]
    assert curve.alphas == list(ALPHAS)
    assert values == sorted(values, reverse=True) and values[0] > values[-1]
    clean = Strip()(inputs)
    rejected = clean[:, :2].max(dim=1).values <= clean[:, 2]
    assert torch.equal(curve.rejected[0], rejected)
    assert [rate.value for rate in curve.rejection] == sorted(
        rate.value for rate in curve.rejection
    )


def test_given_attack_gets_what_is_not_rejected_and_keeps_to_its_radius():
    inputs, labels, adversarial = problem()
    calls = []

    def attack(model, x, y, radius):
        calls.append((len(x), radius))
        assert torch.equal(y, (x[:, 0] > 0.5).long())
        middle = torch.cat([torch.full_like(x[:, :1], 0.5), x[:, 1:]], dim=1)
        return project(middle, x, radius, 2, (0, 1))

    def cheat(model, x, y, radius):
        return torch.full_like(x, 0.5)

    options = {"alphas": [0, 0.5, 1]}
    curve = stratified_curve(
        Strip(), inputs, labels, adversarial, 0.4, reject_attack=attack, **options
    )
    left = [(~row).sum().item() for row in curve.rejected]
    assert calls == [(left[0], 0.2), (left[1], 0.4)]
    with pytest.warns(UserWarning, match="reject attack at eps = 0.2"):
        cheating = stratified_curve(
            Strip(), inputs, labels, adversarial, 0.4, reject_attack=cheat, **options
        )
    assert (cheating.rejected <= curve.rejected).all()


def test_several_attacks_and_the_inputs_themselves_count():
    inputs, labels, adversarial = problem()
    labels[:5] = 1 - labels[:5]
    accepted = (inputs[:, 0] - 0.5).abs() > 0.1
    options = {"alphas": [0.0]}
    none = stratified_curve(Strip(), inputs, labels, inputs, 0.4, **options)
    assert torch.equal(none.evaded, accepted & (torch.arange(60) < 5))
    halves = torch.stack([adversarial, adversarial])
    halves[0, ::2], halves[1, 1::2] = inputs[::2], inputs[1::2]
    both = stratified_curve(Strip(), inputs, labels, halves, 0.4, **options)
    alone = stratified_curve(Strip(), inputs, labels, adversarial, 0.4, **options)
    assert torch.equal(both.evaded, alone.evaded)


def test_a_model_without_rejection_has_a_flat_curve():
    inputs, labels, adversarial = problem()

    def model(x):
        return Strip()(x)[:, :2]

    curve = stratified_curve(model, inputs, labels, adversarial, 0.4)
    assert not curve.rejected.any()
    assert {rate.value for rate in curve.robustness} == {(~curve.evaded).double().mean().item()}


def test_curve_as_json_and_as_figure(tmp_path):
    inputs, labels, adversarial = problem(n=9)
    curve = stratified_curve(
        Strip(), inputs, labels, adversarial, 0.4, name="s", reject_options={"steps": 2, "seed": 3}
    )
    content = json.loads(json.dumps(curve.to_dict()))
    assert content["robustness"][0] == curve.robustness[0].to_dict()
    assert content["settings"]["seed"] == 3 and content["evaded"] == curve.evaded.tolist()
    plot_stratified({"s": curve}, tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="expected curves at one eps"):
        plot_stratified({}, tmp_path / "s.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alphas": [0.5, 0.1]}, r"alphas must be in \[0, 1\] and increasing"),
        ({"alphas": []}, "alphas must be"),
        ({"eps": 0.0}, "eps must be > 0"),
        ({"reject_attack": lambda m, x, y, r: x, "reject_options": {"steps": 1}}, "leave out"),
        ({"adversarial": torch.rand(3, 2)}, "adversarial must be like clean"),
    ],
)
def test_refuses_what_makes_no_sense(options, message):
    inputs, labels, adversarial = problem(n=5)
    with pytest.raises(ValueError, match=message):
        stratified_curve(
            Strip(), inputs, labels, **{"adversarial": adversarial, "eps": 0.4} | options
        )


def test_what_the_mask_holds_moves_neither_to_evade_nor_to_be_rejected():
    inputs, labels, adversarial = problem()
    options = {"reject_options": {"steps": 20, "restarts": 0}}
    free = stratified_curve(Strip(), inputs, labels, adversarial, 0.4, **options)
    one = torch.tensor([True, False])  # x_0 alone decides
    same = stratified_curve(Strip(), inputs, labels, adversarial, 0.4, mask=one, **options)
    assert torch.equal(same.evaded, free.evaded) and torch.equal(same.rejected, free.rejected)
    with pytest.warns(UserWarning, match="adversarial at eps = 0.4"):
        held = stratified_curve(
            Strip(), inputs, labels, adversarial, 0.4, mask=(~one).expand(60, 2), **options
        )
    assert not held.evaded.any() and free.evaded.any() and held.settings["masked"]
    assert torch.equal(held.rejected, free.rejected[:1].expand(len(ALPHAS), 60))
    masks = []

    def attack(model, x, y, radius, mask):
        masks.append(mask)
        return x

    stratified_curve(
        Strip(), inputs, labels, adversarial, 0.4, alphas=[1], mask=one, reject_attack=attack
    )
    accepted = ~free.rejected[0]
    assert torch.equal(masks[0], one.expand(int(accepted.sum()), 2))


def test_with_a_target_only_what_is_accepted_as_it_is_evaded():
    inputs, labels, adversarial = problem()
    options = {"alphas": [0]}
    free = stratified_curve(Strip(), inputs, labels, adversarial, 0.4, **options)
    found = stratified_curve(Strip(), inputs, labels, adversarial, 0.4, targets=1, **options)
    assert torch.equal(found.evaded, free.evaded & (labels == 0)) and found.evaded.any()
    with pytest.raises(ValueError, match="below the 2 classes of the model"):
        stratified_curve(Strip(), inputs, labels, adversarial, 0.4, targets=2, **options)


def test_on_levels_what_no_image_file_holds_is_rejected_by_nobody():
    class OffLevels(Strip):
        """Rejects what lies between four levels."""

        def forward(self, x):
            off = ((3 * x - (3 * x).round()).abs() > 1e-3).any(dim=1, keepdim=True)
            return torch.cat([x, off.to(x) * 9 - 1], dim=1)

    inputs = torch.tensor([[0.0, 1.0], [1.0, 1 / 3], [2 / 3, 0.0]], dtype=torch.float64)
    options = {"alphas": [1], "reject_attack": lambda model, x, y, radius: x * 0.9 + 0.02}
    given = OffLevels(), inputs, inputs.argmax(dim=1), inputs, 0.5
    assert stratified_curve(*given, **options).rejected.all()
    assert not stratified_curve(*given, levels=4, **options).rejected.any()
