import pytest
import torch

torchattacks = pytest.importorskip(
    "torchattacks", reason="needs torchattacks: pip install -e '.[peers]'"
)

from torchdnr.adapters import (  # noqa: E402 - after the check that torchattacks is there
    attack_all_targets,
    attack_per_label,
    for_label,
    with_reject,
)

EPS = 2.0


def pgd(view, **options):
    return torchattacks.PGDL2(view, eps=EPS, alpha=0.3, **{"steps": 20, **options})


def test_finds_device_and_mode_of_the_model(victim, capsys):
    attack = pgd(for_label(victim.model, 0))
    assert attack.device == torch.device("cpu")
    assert "Failed to set device" not in capsys.readouterr().out
    attack(victim.inputs[:2], victim.labels[:2])
    assert not any(module.training for module in victim.model.modules())


def test_pgd_per_label_succeeds_where_we_say_so(victim):
    def run(view, inputs, labels):
        points = pgd(view)(inputs, labels)
        with torch.no_grad():
            told = view(points).argmax(dim=1) != labels
            output = victim.model(points)
        own = torch.maximum(output.gather(1, labels[:, None])[:, 0], output[:, -1])
        others = output[:, :-1].scatter(1, labels[:, None], -torch.inf).amax(dim=1)
        assert torch.equal(told, others > own)
        return points

    points = attack_per_label(run, victim.model, victim.inputs, victim.labels)
    evading = victim.evading(points)
    assert evading.sum() >= victim.evading(victim.inputs).sum() + 3
    assert ((points - victim.inputs).flatten(1).norm(dim=1) <= EPS * 1.0001).all()


def test_plain_view_counts_rejected_inputs_as_successes(victim):
    view = with_reject(victim.model)
    points = pgd(view)(victim.inputs, victim.labels)
    with torch.no_grad():
        told = view(points).argmax(dim=1) != victim.labels
    wrongly = told & ~victim.evading(points)
    assert wrongly.any() and victim.rejected(points)[wrongly].all()


def test_targeted_pgd_reaches_some_wrong_class(victim):
    def run(view, inputs, targets):
        attack = pgd(view, steps=6)
        attack.set_mode_targeted_by_label(quiet=True)
        return attack(inputs, targets)

    points = attack_all_targets(run, victim.model, victim.inputs, victim.labels)
    assert victim.evading(points).sum() >= victim.evading(victim.inputs).sum() + 3


def test_carlini_wagner_on_the_view_of_the_labels(victim):
    view = for_label(victim.model, victim.labels)
    attack = torchattacks.CW(view, c=200.0, kappa=0, steps=60, lr=0.05)
    points = attack(victim.inputs, victim.labels)
    evading = victim.evading(points)
    with torch.no_grad():
        assert torch.equal(view(points).argmax(dim=1) != victim.labels, evading)
    assert evading.sum() >= victim.evading(victim.inputs).sum() + 3
