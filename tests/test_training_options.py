from itertools import pairwise

import pytest
import torch
from torch import nn

from torchdnr.features.layers import LayerFeatures
from torchdnr.models import ZOO_MNIST_LAYERS, ZooMNISTNet
from torchdnr.models.training import (
    SHIFT,
    TrainingSettings,
    relative_learning_rate,
    shift_and_mirror,
    train_network,
)


def test_constant_rises_over_the_warm_up_and_stays():
    rates = [relative_learning_rate("constant", step, warmup=4, total=10) for step in range(1, 11)]
    assert rates == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]
    assert relative_learning_rate("constant", 1, warmup=0, total=10) == 1


def test_one_cycle_rises_to_its_peak_and_falls_to_zero():
    rates = [relative_learning_rate("one-cycle", step, warmup=0, total=20) for step in range(1, 21)]
    peak = rates.index(1.0)
    assert peak == 5  # the sixth of twenty steps
    assert all(one < two for one, two in pairwise(rates[: peak + 1]))
    assert all(one > two for one, two in pairwise(rates[peak:]))
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert relative_learning_rate("one-cycle", 1, warmup=0, total=1) == 1


def test_every_augmented_image_is_a_shift_of_its_own_image_mirrored_or_not():
    torch.manual_seed(0)
    images = torch.rand(24, 2, 9, 7)
    changed = shift_and_mirror(images)
    assert changed.shape == images.shape
    seen = set()
    for image, found in zip(images, changed, strict=True):
        padded = nn.functional.pad(image, (SHIFT,) * 4)
        windows = {
            (top, left, mirrored): (window.flip(-1) if mirrored else window)
            for top in range(2 * SHIFT + 1)
            for left in range(2 * SHIFT + 1)
            for window in [padded[:, top : top + 9, left : left + 7]]
            for mirrored in (False, True)
        }
        matches = [key for key, window in windows.items() if torch.equal(window, found)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {mirrored for _, _, mirrored in seen} == {False, True}
    assert len(seen) > 15  # each image has its own


def test_a_stopped_training_with_both_options_goes_on_as_if_it_had_not_been(tmp_path):
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 2
    settings = TrainingSettings(
        epochs=3, lr=0.05, momentum=0.9, batch_size=10, schedule="one-cycle", augment=True
    )

    def build():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))

    whole = train_network(build(), images, labels, settings, progress=False)

    class Stop(Exception):
        pass

    class Stopping(nn.Sequential):
        steps = 0

        def forward(self, inputs):
            Stopping.steps += 1
            if Stopping.steps == 7:  # in the second of three epochs of four steps
                raise Stop
            return super().forward(inputs)

    path = tmp_path / "training.safetensors"
    with pytest.raises(Stop):
        train_network(Stopping(*build()), images, labels, settings, checkpoint=path, progress=False)
    again = train_network(build(), images, labels, settings, checkpoint=path, progress=False)
    for one, two in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="one-cycle"):
        TrainingSettings(epochs=1, lr=0.1, momentum=0.9, batch_size=1, schedule="cosine")


def test_the_zoo_network_has_the_published_feature_sizes():
    net = ZooMNISTNet()
    found = LayerFeatures(net, ZOO_MNIST_LAYERS)(torch.rand(2, 1, 28, 28))
    assert [values.shape for values in found.values()] == [(2, 1600), (2, 576), (2, 32)]
    assert net(torch.rand(2, 1, 28, 28)).shape == (2, 10)
