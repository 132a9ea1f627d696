"""Torchvision classifiers as networks on images in [0, 1]: normalised, with chosen outputs."""

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from torchdnr.models.backbones import build_backbone, load_weights

KEPT = [0, 217, 999]


@pytest.fixture(scope="module")
def published():
    """A network for the 1,000 classes of ImageNet, with weights of our own."""
    torch.manual_seed(0)
    return models.squeezenet1_1(weights=None).eval()


@pytest.fixture(params=["net.pth", "net.safetensors"])
def weights(request, published, tmp_path):
    path = tmp_path / request.param
    if path.suffix == ".pth":
        torch.save(published.state_dict(), path)
    else:
        save_file(published.state_dict(), path)
    return path


def test_a_backbone_normalises_and_keeps_the_chosen_outputs(published, weights):
    backbone = build_backbone("squeezenet1_1", 3, outputs=KEPT).eval()
    load_weights(backbone, "squeezenet1_1", weights)
    images = torch.rand(2, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (images - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(backbone(images), published(normalised)[:, KEPT])


def test_without_chosen_outputs_the_network_has_one_per_class():
    backbone = build_backbone("resnet18", 4).eval()
    assert backbone(torch.rand(2, 3, 32, 32)).shape == (2, 4)
    assert backbone.network.fc.out_features == 4


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_no_network_returns_auxiliary_outputs_while_it_is_trained(name):
    backbone = build_backbone(name, 2).train()
    assert backbone(torch.rand(2, 3, 80, 80)).shape == (2, 2)


def test_an_unknown_backbone_is_told_with_names_like_it():
    with pytest.raises(ValueError, match=r"no backbone 'resnet19'; choose from: .*resnet18"):
        build_backbone("resnet19", 2)


@pytest.mark.parametrize("outputs", [[0, 1], [0, 1, 1], [0, 1, 1000], [-1, 0, 1]])
def test_outputs_that_are_not_one_per_class_are_refused(outputs):
    with pytest.raises(ValueError, match=r"outputs must be 3 different numbers in 0\.\.999"):
        build_backbone("squeezenet1_1", 3, outputs=outputs)


def test_weights_of_another_network_are_refused_and_change_nothing(weights):
    for name, outputs in (("resnet18", KEPT), ("alexnet", None)):
        backbone = build_backbone(name, 3, outputs=outputs)
        before = {name: value.clone() for name, value in backbone.state_dict().items()}
        with pytest.raises(ValueError, match=r"does not fit this .*: expected .*, got "):
            load_weights(backbone, name, weights)
        assert all(torch.equal(before[k], v) for k, v in backbone.state_dict().items())


def test_weights_for_more_classes_say_what_to_do(weights):
    with pytest.raises(
        ValueError, match=r"expected \(3, 512, 1, 1\), got \(1000, 512, 1, 1\).*keep"
    ):
        load_weights(build_backbone("squeezenet1_1", 3), "squeezenet1_1", weights)


def test_published_weights_are_named_and_downloaded_by_torchvision(published, monkeypatch):
    asked = []

    def state(member, **options):
        asked.append((member.name, options["check_hash"]))
        return published.state_dict()

    enumeration = models.SqueezeNet1_1_Weights
    monkeypatch.setattr(enumeration, "get_state_dict", state)
    backbone = build_backbone("squeezenet1_1", 3, outputs=KEPT)
    load_weights(backbone, "squeezenet1_1", "DEFAULT")
    assert asked == [("IMAGENET1K_V1", True)]
    for key, value in published.state_dict().items():
        assert torch.equal(backbone.network.state_dict()[key], value)

    def offline(_member, **_options):
        raise OSError("no route to host")

    monkeypatch.setattr(enumeration, "get_state_dict", offline)
    with pytest.raises(ConnectionError, match=r"cannot download https://.*no route.*give a file"):
        load_weights(backbone, "squeezenet1_1", "DEFAULT")


class Malicious:
    def __reduce__(self):
        return print, ("run by a pickle",)


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_a_file_of_something_else_is_refused_and_runs_nothing(name, tmp_path, capsys):
    path = tmp_path / name
    backbone = build_backbone("squeezenet1_1", 3)
    with pytest.raises(
        FileNotFoundError, match="expected the weights of the backbone: a file, or a name"
    ):
        load_weights(backbone, "squeezenet1_1", path)
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="must be a state dict"):
        load_weights(backbone, "squeezenet1_1", path)
    torch.save({"a": Malicious()}, path)
    with pytest.raises(ValueError, match="must be a state dict"):
        load_weights(backbone, "squeezenet1_1", path)
    torch.save([torch.ones(1)], path)
    with pytest.raises(ValueError, match="must be a state dict"):
        load_weights(backbone, "squeezenet1_1", path)
    assert "run by a pickle" not in capsys.readouterr().out


def test_weights_that_torchvision_downloaded_run_nothing_either(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = models.SqueezeNet1_1_Weights.DEFAULT.url
    path = tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1]
    path.parent.mkdir(parents=True)
    torch.save({"a": Malicious()}, path)
    with pytest.raises(ValueError, match="must be tensors alone"):
        load_weights(build_backbone("squeezenet1_1", 3), "squeezenet1_1", "DEFAULT")
    assert "run by a pickle" not in capsys.readouterr().out
