import copy

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import MaxVit, get_model, list_models

from torchdnr import DNR
from torchdnr.files import digest


def small_maxvit():
    """Build a MaxViT for 64 x 64 images: those with a name take 224 x 224 alone."""
    return MaxVit((64, 64), 16, 2, [24, 32, 48, 64], [1, 1, 2, 1], 8, 0.2)


# What the names of a family start with -> its smallest variant, its options, size of its images.
FAMILIES: dict[str, tuple] = {
    "alexnet": ("alexnet", {}, 64),
    "convnext_": ("convnext_tiny", {}, 32),
    "densenet": ("densenet121", {}, 32),
    "efficientnet_b": ("efficientnet_b0", {}, 32),
    "efficientnet_v2_": ("efficientnet_v2_s", {}, 32),
    "googlenet": ("googlenet", {"init_weights": False}, 32),
    "inception_": ("inception_v3", {"init_weights": False}, 75),
    "maxvit_": (small_maxvit, {}, 64),
    "mnasnet": ("mnasnet0_5", {}, 32),
    "mobilenet_v2": ("mobilenet_v2", {}, 32),
    "mobilenet_v3_": ("mobilenet_v3_small", {}, 32),
    "regnet_x_": ("regnet_x_400mf", {}, 32),
    "regnet_y_": ("regnet_y_400mf", {}, 32),
    "resnet": ("resnet18", {}, 32),
    "resnext": ("resnext50_32x4d", {}, 32),
    "shufflenet_": ("shufflenet_v2_x0_5", {}, 32),
    "squeezenet": ("squeezenet1_1", {}, 32),
    "swin_v2_": ("swin_v2_t", {}, 32),
    "swin_": ("swin_t", {}, 32),
    "vgg": ("vgg11", {}, 32),
    "vit_": ("vit_b_32", {"image_size": 64}, 64),
    "wide_resnet": ("wide_resnet50_2", {}, 32),
}
IN_NO_TIME = {"squeezenet"}
SLOW = pytest.mark.slow
# A search over one pair of multiples of gamma = "scale" is none, and fits a layer of any size.
QUICK = {"C_grid": [10.0], "gamma_grid": [0.2], "folds": 2, "stacking_folds": 2}


def test_every_classifier_of_torchvision_belongs_to_a_family():
    names = list_models(module=torchvision.models)
    homeless = [name for name in names if not name.startswith(tuple(FAMILIES))]
    assert not homeless, "add a variant of the new family to FAMILIES"
    assert all(name in names for name, _, _ in FAMILIES.values() if isinstance(name, str))


def images_of_three_classes(size):
    generator = torch.Generator().manual_seed(1)
    patterns = torch.rand(3, 3, 4, 4, generator=generator)
    labels = torch.arange(24) % 3
    images = nn.functional.interpolate(patterns, size=size)[labels]
    return 0.95 * images + 0.05 * torch.rand(images.shape, generator=generator), labels


def network(build, options, images):
    """Build a network in training mode whose batch norms know images: else its signals die out."""
    net = (build(**options) if callable(build) else get_model(build, **options)).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain average
            module.train()
    with torch.no_grad():
        net(images)
    return net.train()


def state_of(net):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
    flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    return digest(net.state_dict()), hooks, flags, all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    "family",
    [family if family in IN_NO_TIME else pytest.param(family, marks=SLOW) for family in FAMILIES],
)
def test_dnr_on_its_own_choice_of_layers(family, tmp_path):
    build, options, size = FAMILIES[family]
    images, labels = images_of_three_classes(size)
    net = network(build, options, images)
    next(net.parameters()).requires_grad_(False)
    net.get_submodule(next(name for name, _ in net.named_children())).eval()
    before = state_of(net)

    model = DNR(net, **QUICK)
    assert model.layers == () and model.num_classes == 0
    model.fit(images, labels).calibrate(images, 0.1)
    assert len(model.layers) == 3
    assert all(1 < size["features"] <= 4096 for size in model.features.sizes.values())
    with torch.no_grad():
        features = model.features(images).values()
        for svm, z in zip(model.base_svms, features, strict=True):
            right = svm(z).argmax(1) == labels
            assert right.double().mean() > 0.8  # the layer tells images apart
        assert model.scores(images).std(0).min() > 0.01

    inputs = images.clone().requires_grad_()
    scores = model(inputs)
    assert scores.shape == (24, 4) and scores.isfinite().all()
    (gradient,) = torch.autograd.grad(scores.gather(1, labels[:, None]).sum(), inputs)
    assert gradient.isfinite().all()
    assert gradient.abs().amax(dim=(1, 2, 3)).min() > 0

    model.save(tmp_path / "dnr")
    loaded = DNR.load(tmp_path / "dnr", net)
    assert torch.equal(loaded(images), model(images))
    assert loaded.features.describe() == model.features.describe()
    assert state_of(net) == before

    # The gradient is that of the scores: a central difference along it, in double precision.
    precise = copy.deepcopy(loaded).double()
    point = images[:1].double().requires_grad_()
    (gradient,) = torch.autograd.grad(precise.scores(point)[0, labels[0]], point)
    step = 1e-8 * gradient / gradient.norm()  # small: these networks are steep and have kinks
    with torch.no_grad():
        rise = precise.scores(point + step) - precise.scores(point - step)
    slope = (rise[0, labels[0]] / 2e-8).item()
    assert slope == pytest.approx(gradient.norm().item(), rel=1e-3)
