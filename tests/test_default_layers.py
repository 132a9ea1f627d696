import pytest
import torch
from torch import nn

from torchdnr import DNR, NR
from torchdnr.features import choice as default_layers
from torchdnr.svm import NotFittedError


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.inner(x) + x)


class Branched(nn.Module):
    """Residual blocks, an auxiliary head that runs in evaluation mode too, and a dropout."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(10)))
        self.aux = nn.Sequential(nn.Flatten(), nn.Linear(width * 64, 20), nn.Linear(20, 4))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        maps = self.blocks(self.stem(x))
        auxiliary = self.aux(maps)
        return self.head(self.drop(maps).mean(dim=(2, 3))), auxiliary


def test_late_layers_on_all_paths_and_nothing_else():
    # Depth: stem 1, blocks 2 to 11, heads beyond. Windows of the deepest, 11: to 9.2, to 7.3.
    chosen = default_layers(Branched(), torch.rand(2, 3, 8, 8))
    assert chosen == {"blocks.5": "flatten", "blocks.7": "flatten", "blocks": "flatten"}


def test_large_layers_are_averaged_or_projected():
    images = torch.rand(1, 3, 8, 8)
    assert set(default_layers(Branched(80), images).values()) == {"avg"}
    # 8 channels on 8 x 8 maps: nothing tells which side is which, and 512 values stay flat; on
    # images that are not square the averages are not known either.
    wide = torch.rand(1, 3, 8, 100)
    net = Branched()
    net.aux = nn.Identity()
    assert set(default_layers(net, wide).values()) == {("project", 1024)}


@pytest.mark.parametrize("width", [1, 2, 3])
def test_short_networks_have_fewer_layers(width):
    layers = [nn.Flatten()]
    layers += [nn.Linear(12 if i == 0 else 5, 5) for i in range(width)]
    net = nn.Sequential(*layers, nn.ReLU(), nn.Linear(5, 2))
    names = [str(i + 1) for i in range(width)]
    assert list(default_layers(net, torch.rand(1, 3, 2, 2))) == names[-3:]


def test_networks_without_a_choice_say_so():
    images = torch.rand(1, 3, 2, 2)
    only_scores = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(ValueError, match="found no layer to choose"):
        default_layers(only_scores, images)

    class Detached(nn.Module):
        def forward(self, x):
            return x.flatten(1).detach()

    with pytest.raises(ValueError, match="cannot follow the network"):
        default_layers(Detached(), images)
    with pytest.raises(ValueError, match=r"fails on an image \(3, 2, 2\)"):
        default_layers(nn.Linear(5, 5), images)


def test_dnr_without_layers_chooses_at_its_first_fit(tmp_path):
    net = Branched().train()
    net.stem.weight.requires_grad_(False)
    images, labels = torch.rand(30, 3, 8, 8), torch.arange(30) % 2
    images[labels == 1] *= 0.5
    # The auxiliary scores must not reach the SVMs: forward takes the first of the two outputs.
    model = DNR(net, hyperparameters={"combiner": (1.0, 0.1)}, C_grid=[1.0], gamma_grid=[1.0])
    assert model.layers == () and "fit chooses" in model.features.describe()
    with pytest.raises(NotFittedError):
        model.scores(images)
    with torch.no_grad():  # as in a user's evaluation loop
        model.fit(images, labels)
    assert model.layers == ("blocks.5", "blocks.7", "blocks")
    assert list(model.selection) == [*model.layers, "combiner"]
    assert model.features.sizes["blocks"] == {"output": [8, 8, 8], "features": 512}
    assert net.training and not net.stem.weight.requires_grad and net.head.weight.requires_grad
    assert net.head.weight.grad is None
    model.save(tmp_path / "dnr")
    loaded = DNR.load(tmp_path / "dnr", net)
    assert torch.equal(loaded.scores(images), model.scores(images))


def test_hyperparameters_of_layers_that_were_not_chosen():
    images, labels = torch.rand(8, 3, 8, 8), torch.arange(8) % 2
    model = DNR(Branched(), hyperparameters={"stem": (1.0, 0.1)})
    with pytest.raises(
        ValueError, match=r"named after one of \['blocks.5', .*'combiner'\], got \['st"
    ):
        model.fit(images, labels)
    with pytest.raises(ValueError, match=r"must be \(C, gamma\)"):
        DNR(Branched(), hyperparameters={"stem": 3.0})
    with pytest.raises(ValueError, match="NR takes the name of one layer"):
        NR(Branched(), None)
