import math
from collections import Counter
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from accelerator import accelerator, waits
from small_models import make_images, small_network
from torch import nn

from torchdnr import Adversary
from torchdnr.attacks.target import Target, evaluate
from torchdnr.models import ADVERSARIAL_TRAINING, WeakAttackWarning, train_network
from torchdnr.models.adversarial import (
    LOSSES,
    AdversarialLoss,
    attack_batch,
    soft_decision_objective,
)

QUICK = replace(ADVERSARIAL_TRAINING, epochs=2, batch_size=16, lr=5e-3)


def digits(n=60, seed=0):
    torch.manual_seed(seed)
    return make_images(n), torch.arange(n) % 3


def linear_target(weights, reject=False):
    def model(x):
        logits = x.flatten(1) @ weights
        return nn.functional.pad(logits, (0, 1)) if reject else logits

    return Target(model, soft_decision_objective, reject, 64)


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("far_starts", [0, 1])
def test_attacked_images_lie_in_the_ball_and_the_box(norm, far_starts):
    images, labels = digits()
    target = linear_target(torch.randn(64, 3))
    adversary = Adversary(eps=0.7, norm=norm, far_starts=far_starts)
    attacked = attack_batch(target, images, labels, adversary, 0.7)
    size = torch.linalg.vector_norm((attacked - images).flatten(1), norm, dim=1)
    assert size.max() <= 0.7 * (1 + 1e-5)
    assert 0 <= attacked.min() and attacked.max() <= 1
    before, after = (evaluate(target, x, labels).values for x in (images, attacked))
    assert (after < before).all()


def test_in_l2_it_finds_the_optimum_of_a_linear_model():
    torch.manual_seed(0)
    weights, images = (
        torch.randn(64, 2, dtype=torch.float64),
        torch.full((8, 1, 8, 8), 0.5).double(),
    )
    labels = torch.arange(8) % 2
    attacked = attack_batch(
        linear_target(weights), images, labels, Adversary(eps=0.3, steps=20), 0.3
    )
    direction = (weights[:, 1 - labels] - weights[:, labels]).T
    best = images.flatten(1) + 0.3 * direction / direction.norm(dim=1, keepdim=True)
    values = [evaluate(linear_target(weights), x, labels).values for x in (attacked, best)]
    reach = (values[1] - evaluate(linear_target(weights), images, labels).values).abs()
    assert ((values[0] - values[1]).abs() < 0.01 * reach).all()


def test_a_far_start_is_an_image_of_another_class_where_it_is_in_the_ball():
    images, labels = digits(12)
    adversary = Adversary(eps=100, far_starts=1, steps=1, step_sizes=(1e-9, 1e-9), neighbours=3)
    flat = linear_target(torch.zeros(64, 3))
    attacked = attack_batch(flat, images, labels, adversary, 100.0)
    distances = torch.cdist(attacked.flatten(1), images.flatten(1))
    assert distances.min(dim=1).values.max() < 1e-4
    assert (labels[distances.argmin(dim=1)] != labels).all()


def test_without_images_of_other_classes_attacks_start_at_random():
    images, _ = digits(12)
    labels = torch.zeros(12, dtype=torch.int64)
    target = linear_target(torch.randn(64, 3))
    attacked = attack_batch(target, images, labels, Adversary(eps=0.5, far_starts=1), 0.5)
    assert torch.isfinite(attacked).all()
    assert (
        evaluate(target, attacked, labels).values < evaluate(target, images, labels).values
    ).all()


def test_blocked_coordinates_take_no_part_of_a_step():
    """Half of the pixels are black and would have to become darker: the rest has the whole step."""
    images = torch.cat([torch.zeros(4, 1, 8, 4), torch.full((4, 1, 8, 4), 0.5)], dim=3)
    labels = torch.zeros(4, dtype=torch.int64)
    weights = torch.ones(64, 2)
    weights[:, 1] = -1  # every pixel wants to be darker
    weights = weights.reshape(8, 8, 2)
    weights[:, :4] *= 10
    target = linear_target(weights.reshape(64, 2))
    options = {"eps": 1.0, "far_starts": 0, "steps": 1, "step_sizes": (1.0, 1.0)}
    reached = {}
    for masked in (True, False):
        torch.manual_seed(0)
        adversary = Adversary(**options, masked=masked)
        moved = attack_batch(target, images, labels, adversary, 1.0)
        reached[masked] = evaluate(target, moved, labels).values.mean()
    assert reached[True] < reached[False]


def loss_on(name, logits, labels, size):
    """Compute a loss on attacked images through its public name."""
    output = nn.functional.pad(logits, (0, 1)) if name == "reject" else logits
    return LOSSES[name].attacked(output, labels, size)


def test_losses_are_those_of_their_definitions():
    torch.manual_seed(0)
    logits, labels = torch.randn(20, 4, dtype=torch.float64) * 3, torch.arange(20) % 3
    size = torch.rand(20, dtype=torch.float64)
    rows = torch.arange(20)
    with_zero = torch.cat([logits, torch.zeros(20, 1)], dim=1).softmax(dim=1)
    assert loss_on("reject", logits, labels, size).item() == pytest.approx(
        -(with_zero[rows, labels] + with_zero[:, -1]).log().mean().item()
    )
    plain = logits.softmax(dim=1)
    assert loss_on("class", logits, labels, size).item() == pytest.approx(
        -(plain[rows, labels] + plain[:, -1]).log().mean().item()
    )
    assert loss_on("plain", logits, labels, size).item() == pytest.approx(
        -plain[rows, labels].log().mean().item()
    )
    share = (1 - size) ** 10
    wanted = share[:, None] * torch.eye(4)[labels] + (1 - share[:, None]) / 4
    assert loss_on("confidence", logits, labels, size).item() == pytest.approx(
        -(wanted * plain.log()).sum(dim=1).mean().item()
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_all_parameters_are_exact(loss):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    images, labels = torch.rand(6, 1, 4, 4, dtype=torch.float64), torch.arange(6) % 3
    against = AdversarialLoss(net, Adversary(eps=0.5, loss=loss), images, labels)
    size = torch.rand(6, dtype=torch.float64)

    def value(*parameters):
        names = [name for name, _ in net.named_parameters()]
        given = dict(zip(names, parameters, strict=True))
        logits = torch.func.functional_call(net, given, (images,))
        output = nn.functional.pad(logits, (0, 1)) if loss == "reject" else logits
        clean = nn.functional.cross_entropy(output, labels)
        return against.loss.attacked(output, labels, size) + clean

    assert torch.autograd.gradcheck(value, tuple(net.parameters()))


def small_mlp(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, outputs))


@pytest.mark.parametrize("loss", LOSSES)
def test_training_makes_attacks_fail_and_keeps_clean_images_right(loss):
    images, labels = digits(90)
    net = small_mlp(4 if loss == "class" else 3)
    train_network(net, images, labels, replace(QUICK, epochs=12, lr=1e-2), progress=False)
    adversary = Adversary(eps=0.5, loss=loss, steps=4)

    def robust_loss():
        torch.manual_seed(1)
        against = AdversarialLoss(net, adversary, images, labels)
        return against(images, labels, 1.0)[1]["robust_loss"]

    before = robust_loss()
    train_network(
        net, images, labels, replace(QUICK, epochs=8, lr=1e-2), adversary=adversary, progress=False
    )
    assert robust_loss() < 0.95 * before
    assert (net(images)[:, :3].argmax(dim=1) == labels).float().mean() > 0.8


class Stopped(Exception):
    """Something ended the training."""


def trained(path, *, stop_after=None, seed=0):
    """Train a small network; return its weights, or stop the training after some epochs."""
    images, labels = digits()
    torch.manual_seed(0)
    net, calls = small_network(), 0

    def stop(module, args):
        nonlocal calls
        calls += module.training
        if (
            stop_after is not None and calls > stop_after * 2 * 4
        ):  # two passes a batch, four batches
            raise Stopped

    net.register_forward_pre_hook(stop)
    options = {"seed": seed, "checkpoint": path, "progress": False}
    train_network(net, images, labels, QUICK, adversary=Adversary(eps=0.5), **options)
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_a_stopped_training_goes_on_and_a_seed_decides_the_network(tmp_path):
    whole, path = trained(tmp_path / "whole.safetensors"), tmp_path / "stopped.safetensors"
    with pytest.raises(Stopped):
        trained(path, stop_after=1)
    assert torch.equal(trained(path), whole)
    assert not torch.equal(trained(tmp_path / "other.safetensors", seed=1), whole)


def test_a_checkpoint_of_another_adversary_is_refused(tmp_path):
    images, labels = digits()
    net = small_mlp()
    options = {"checkpoint": tmp_path / "c.safetensors", "progress": False}
    train_network(deepcopy(net), images, labels, QUICK, adversary=Adversary(eps=0.5), **options)
    with pytest.raises(ValueError, match="adversary"):
        train_network(net, images, labels, QUICK, adversary=Adversary(eps=0.6), **options)


def test_a_weak_attack_is_said():
    images, labels = digits(330)
    net = small_mlp()
    weak = Adversary(eps=3.0, steps=1, far_starts=0, step_sizes=(1e-3, 1e-3), ramp=0, loss="plain")
    train_network(net, images, labels, replace(QUICK, epochs=10), progress=False)
    with pytest.warns(WeakAttackWarning, match="boundary walk"):
        train_network(net, images, labels, QUICK, adversary=weak, progress=False)


def test_a_step_of_the_attack_waits_for_no_device():
    with accelerator() as device:
        images, labels = digits(15)
        images, labels = images.to(device), labels.to(device)
        weights = torch.randn(64, 3).to(device)
        target = linear_target(weights, reject=True)
        counts = []
        for steps in (2, 6):
            waits.clear()
            attack_batch(target, images, labels, Adversary(eps=0.5, steps=steps), 0.5)
            counts.append(sum(waits.values()))
    assert counts == [0, 0], dict(waits)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"eps": 0}, "eps > 0"),
        ({"loss": "madry"}, "loss in"),
        ({"norm": 3}, "norm 1, 2 or infinity"),
        ({"steps": 0}, "steps >= 1"),
        ({"far_starts": 1.5}, "far_starts"),
        ({"ramp": 1}, "ramp"),
    ],
)
def test_an_option_out_of_range_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        Adversary(**{"eps": 1.0, **options})


def test_a_network_without_an_output_that_rejects_is_refused():
    images, labels = digits()
    with pytest.raises(ValueError, match="a last output that rejects"):
        train_network(
            small_network(),
            images,
            labels,
            QUICK,
            adversary=Adversary(eps=1, loss="class"),
            progress=False,
        )


def test_eps_rises_from_a_fifth():
    adversary = Adversary(eps=2.0, ramp=0.5)
    assert [adversary.eps_at(share) for share in (0, 0.25, 0.5, 1)] == pytest.approx(
        [0.4, 1.2, 2.0, 2.0]
    )
    assert Adversary(eps=2.0, ramp=0).eps_at(0) == 2


def test_more_steps_of_training_wait_no_more_often():
    counts = []
    for n in (60, 90):
        with accelerator() as device:
            images, labels = digits(n)
            net = small_mlp()
            settings = replace(QUICK, epochs=1, batch_size=15)
            waits.clear()
            train_network(
                net,
                images.to(device),
                labels.to(device),
                settings,
                adversary=Adversary(eps=0.5, steps=3),
                device=device,
                progress=False,
            )
            counts.append(Counter({k: v for k, v in waits.items() if "models/" in k}))
            assert all(p.device.type == device.type for p in net.parameters())
    assert counts[0].total() == counts[1].total(), counts


def test_attacks_on_confidence_are_of_all_sizes_up_to_eps():
    images, labels = digits()
    net, seen = small_mlp(), []
    loss = AdversarialLoss(net, Adversary(eps=0.5, loss="confidence"), images, labels)
    net.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    loss(images, labels, 1.0)
    attacked = seen[-2]  # the last but one pass is on the attacked images, the last on clean ones
    sizes = (attacked - images).flatten(1).norm(dim=1) / 0.5
    assert sizes.min() < 0.2 and 0.8 < sizes.max() <= 1.001


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_that_of_clean_and_of_attacked_images(loss):
    images, labels = digits()
    net = small_mlp(4 if loss == "class" else 3)
    total, shown = AdversarialLoss(net, Adversary(eps=0.5, loss=loss), images, labels)(
        images, labels, 1.0
    )
    logits = nn.functional.pad(net(images), (0, 1)) if loss == "reject" else net(images)
    clean = nn.functional.cross_entropy(logits, labels) if loss != "plain" else 0
    assert total.item() == pytest.approx(float(shown["robust_loss"] + clean), rel=1e-5)
