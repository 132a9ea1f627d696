import pytest
import torch
from torch import nn
from torchvision.models import resnet18, swin_t

from torchdnr import layer_table
from torchdnr.features.layers import LayerFeatures


@pytest.mark.slow
def test_sizes_are_those_that_features_have():
    for net, size in ((resnet18(), 64), (swin_t(), 64)):
        table = layer_table(net, size, k=2)
        rows = {row.name: row for row in table.rows}
        chosen = ["layer3", "avgpool", "fc"] if "layer3" in rows else ["features.3", "norm", "head"]
        images = torch.rand(1, 3, size, size)
        outputs = LayerFeatures(net, chosen).outputs(images)
        for name in chosen:
            row = rows[name]
            assert row.output == tuple(outputs[name].shape[1:])
            for column, reduction in (
                ("flatten", "flatten"),
                ("avg", "avg"),
                ("grid", ("grid", 2)),
            ):
                if (expected := getattr(row, column)) is not None:
                    found = LayerFeatures(net, {name: reduction})(images)[name]
                    assert found.shape[1] == expected, (name, reduction)
                else:
                    with pytest.raises(ValueError):
                        LayerFeatures(net, {name: reduction})(images)
        assert [name for name in rows if name in chosen] == chosen  # in the order in which they end


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.unused = nn.Linear(2, 2)
        self.mixed = nn.Flatten(0, 1)
        self.pair = nn.LSTM(6, 4, batch_first=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        maps = self.drop(self.conv(x))
        self.mixed(maps)
        self.pair(maps.flatten(2).transpose(1, 2))
        return self.head(maps.mean(dim=(2, 3)))


def test_a_table_prints_aligned_with_what_cannot_be_used():
    net = Odd().train()
    net.drop.eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    table = layer_table(net, (4, 7), channels=2)
    assert [m.training for m in (net, net.conv, net.drop)] == [True, True, False]
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert sum(len(m._forward_hooks) for m in net.modules()) == 0
    assert str(table).splitlines() == [
        "layer  module   output     flatten  avg  grid 2",
        "-----  -------  ---------  -------  ---  ------",
        "conv   Conv2d   6 x 4 x 7      168    -       -",  # not square: channels first or last?
        "drop   Dropout  6 x 4 x 7      168    -       -",
        "pair   LSTM     28 x 4         112    4      16",
        "head   Linear   3                3    3       3",
        "not usable: unused (did not run)",
        "not usable: mixed (returns (6, 4, 7) for one image)",
    ]
    assert repr(table) == str(table)
    assert table.rows[0].output == (6, 4, 7) and table.rows[0].avg is None
    assert set(table.unusable) == {"unused", "mixed"}


def test_an_image_that_the_network_cannot_take():
    net = Odd()
    with pytest.raises(
        ValueError, match=r"fails on an image \(3, 4, 4\): .*2 channels.*; give the"
    ):
        layer_table(net, 4)
    assert sum(len(m._forward_hooks) for m in net.modules()) == 0
