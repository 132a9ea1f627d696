import pytest
import torch

foolbox = pytest.importorskip("foolbox", reason="needs foolbox: pip install -e '.[peers]'")

from torchdnr.adapters import (  # noqa: E402 - after the check that foolbox is there
    AcceptedMisclassification,
    attack_all_targets,
    attack_per_label,
    for_label,
    with_reject,
)
from torchdnr.attacks import evades  # noqa: E402

EPS = 2.0


def shown(view):
    return foolbox.PyTorchModel(view, bounds=(0, 1), device="cpu")


def sizes(points, victim):
    return (points - victim.inputs).flatten(1).norm(dim=1)


def test_pgd_on_the_view_of_the_labels_succeeds_where_we_say_so(victim):
    attack = foolbox.attacks.L2PGD(steps=20, rel_stepsize=0.15)
    view = for_label(victim.model, victim.labels)
    _, points, success = attack(shown(view), victim.inputs, victim.labels, epsilons=EPS)
    assert torch.equal(success, victim.evading(points))
    assert success.sum() >= victim.evading(victim.inputs).sum() + 3
    assert (sizes(points, victim) <= EPS * 1.0001).all()


def test_plain_view_counts_rejected_inputs_as_successes(victim):
    attack = foolbox.attacks.L2PGD(steps=20, rel_stepsize=0.15)
    view = shown(with_reject(victim.model))
    _, points, success = attack(view, victim.inputs, victim.labels, epsilons=EPS)
    evading = victim.evading(points)
    wrongly = success & ~evading
    assert wrongly.any() and victim.rejected(points)[wrongly].all()
    assert not (evading & ~success).any()


def test_fmn_finds_near_points_that_evade(victim):
    attack = foolbox.attacks.L2FMNAttack(steps=60)
    view = for_label(victim.model, victim.labels)
    _, points, success = attack(shown(view), victim.inputs, victim.labels, epsilons=None)
    assert torch.equal(success, victim.evading(points))
    assert success.sum() >= 6
    assert sizes(points, victim)[success].median() < 3  # other digits are about 9 away


def test_views_make_one_batch_of_labels_and_one_run_per_label_agree(victim):
    attack = foolbox.attacks.L2PGD(steps=3, random_start=False)

    def run(view, inputs, labels):
        return attack(shown(view), inputs, labels, epsilons=EPS)[1]

    together = run(for_label(victim.model, victim.labels), victim.inputs, victim.labels)
    apart = attack_per_label(run, victim.model, victim.inputs, victim.labels)
    torch.testing.assert_close(together, apart, atol=1e-3, rtol=0)


def test_targeted_pgd_reaches_some_wrong_class(victim):
    attack = foolbox.attacks.L2PGD(steps=6, rel_stepsize=0.3, random_start=False)
    judged = []

    def run(view, inputs, targets):
        criterion = foolbox.criteria.TargetedMisclassification(targets)
        _, points, success = attack(shown(view), inputs, criterion, epsilons=EPS)
        with torch.no_grad():
            output = victim.model(points)
        others = output.scatter(1, targets[:, None], -torch.inf).amax(dim=1)
        expected = output.gather(1, targets[:, None])[:, 0] > others
        judged.append((success, expected))
        return points

    points = attack_all_targets(run, victim.model, victim.inputs, victim.labels)
    assert len(judged) == 10
    for success, expected in judged:
        assert torch.equal(success, expected)
    evading = victim.evading(points)
    assert evading.sum() >= victim.evading(victim.inputs).sum() + 3
    assert (sizes(points, victim) <= EPS * 1.0001).all()


def test_criterion_makes_a_decision_based_attack_exact(victim):
    attack = foolbox.attacks.BoundaryAttack(steps=150)
    criterion = AcceptedMisclassification(victim.labels)
    starts = victim.far_starts()
    model = shown(victim.model)
    _, points, success = attack(
        model, victim.inputs, criterion, epsilons=None, starting_points=starts
    )
    assert torch.equal(success, victim.evading(points))
    assert success.all()  # it never leaves the evading side
    assert (sizes(points, victim) < 0.9 * sizes(starts, victim)).float().mean() > 0.5


def test_criterion_says_what_we_say_of_ties_and_rejections():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randint(-2, 3, (20_000, 6), generator=generator).float()
    labels = torch.randint(5, (20_000,), generator=generator)
    criterion = AcceptedMisclassification(labels)
    found = criterion(outputs, outputs)
    assert isinstance(criterion, foolbox.criteria.Misclassification)
    assert torch.equal(found, evades(outputs, labels, reject=True))
    plain = foolbox.criteria.Misclassification(labels)(outputs, outputs)
    assert (plain & ~found).any()  # also counts rejections
    with pytest.raises(ValueError, match="labels must be a torch tensor"):
        AcceptedMisclassification([1, 2])
