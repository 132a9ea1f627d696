import pytest
import torch
from torch import nn

from torchdnr.features.extraction import (
    ProjectionWarning,
    distortions,
    first_images,
    prepare_features,
)
from torchdnr.features.layers import LayerFeatures
from torchdnr.features.reductions import build_reduction, find_channels


class Maps(nn.Module):
    """A small network with maps of both layouts, tokens and rows."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.turn = nn.Identity()
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        maps = self.turn(self.conv(x).permute(0, 2, 3, 1))
        return self.head(self.norm(maps.flatten(1, 2)).mean(1))


@pytest.fixture
def net():
    return Maps()


def test_every_reduction_against_its_definition(net):
    images = torch.rand(4, 3, 8, 8)
    conv = net.conv(images)
    tokens = net.norm(conv.flatten(2).transpose(1, 2))
    quarters = conv.unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean(dim=(3, 5)).flatten(1)
    runs = torch.stack([part.mean(1) for part in tokens.split(16, dim=1)], dim=2).flatten(1)
    cases = [
        ("conv", "flatten", conv.flatten(1)),
        ("conv", "avg", conv.mean(dim=(2, 3))),
        ("conv", ("avg",), conv.mean(dim=(2, 3))),
        ("conv", ("avg", "channels_last"), conv.mean(dim=(1, 2))),  # told so, it obeys
        ("conv", ("grid", 2), quarters),
        ("conv", ("grid", 8), conv.flatten(1)),
        ("conv", ("grid", 1), conv.mean(dim=(2, 3))),
        ("turn", "avg", conv.mean(dim=(2, 3))),  # the same maps with channels last
        ("turn", ("grid", 2), quarters),
        ("norm", "avg", tokens.mean(1)),
        ("norm", ("avg", "channels_first"), tokens.mean(2)),
        ("norm", ("grid", 2), runs),
        ("head", "avg", net(images)),
        ("head", ("grid", 3), net(images)),
        ("conv", nn.Sequential(nn.Flatten(), nn.Linear(320, 7)), None),
    ]
    for layer, reduction, expected in cases:
        features = LayerFeatures(net, {layer: reduction})(images)
        if expected is None:
            expected = reduction(conv)
        torch.testing.assert_close(features[layer], expected, msg=f"{layer}, {reduction}")


def test_two_layers_with_two_reductions_and_plain_names(net):
    images = torch.rand(4, 3, 8, 8)
    features = LayerFeatures(net, {"norm": "avg", "conv": "flatten"})
    assert features.layers == ("norm", "conv")
    found = features(images)
    assert {name: z.shape[1] for name, z in found.items()} == {"norm": 5, "conv": 320}
    plain = LayerFeatures(net, ["norm", "conv"])(images)
    torch.testing.assert_close(found["conv"], plain["conv"])
    assert plain["norm"].shape == (4, 320)


def test_a_projection_is_drawn_once_and_belongs_to_its_size(net):
    images = torch.rand(4, 3, 8, 8)
    features = LayerFeatures(net, {"conv": ("project", 64)}, seed=5)
    first = features(images)["conv"]
    assert first.shape == (4, 64)
    assert torch.equal(features(images)["conv"], first)
    assert torch.equal(LayerFeatures(net, {"conv": ("project", 64)}, seed=5)(images)["conv"], first)
    other = LayerFeatures(net, {"conv": ("project", 64)}, seed=6)(images)["conv"]
    assert not torch.equal(other, first)
    with pytest.raises(ValueError, match=r"expected the 320 features per image.*got 500"):
        features(torch.rand(4, 3, 10, 10))
    with pytest.raises(ValueError, match=r"layer 'head': expected more than 64 .* got 2; use \"fl"):
        LayerFeatures(net, {"head": ("project", 64)})(images)


@pytest.mark.filterwarnings("ignore::torchdnr.features.extraction.ProjectionWarning")
def test_gradients_flow_through_every_reduction(net):
    net = net.double()
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    for reduction in ("flatten", "avg", ("grid", 2), ("grid", 3), ("project", 8)):
        features = prepare_features(LayerFeatures(net, {"conv": reduction}), [images.detach()])
        assert torch.autograd.gradcheck(lambda x, f=features: f(x)["conv"], images)


@pytest.mark.parametrize("given", ["flatten", "avg", ("grid", 2), ("grid", 3), ("project", 8)])
def test_prepared_reductions_can_be_traced(given):
    reduction, maps = build_reduction(given), torch.rand(2, 5, 4, 4)
    reduction.prepare(maps, square=True)
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(reduction, (maps,), dynamic_shapes=(batch,)).module()
    more = torch.rand(7, 5, 4, 4)
    torch.testing.assert_close(program(more), reduction(more))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8, 4, 4), "channels_first"),
        ((4, 4, 8), "channels_last"),
        ((8, 1, 1), "channels_first"),
        ((1, 1, 8), "channels_last"),
        ((1, 1, 1), "channels_first"),
        ((6, 8), "channels_last"),
        ((6, 8, 8, 8), "channels_first"),
    ],
)
def test_where_the_channels_of_square_images_are(shape, expected):
    assert find_channels(shape, square=True) == expected


@pytest.mark.parametrize(
    ("shape", "square", "why"),
    [
        ((4, 4, 4), True, "two sides must be"),
        ((8, 4, 5), True, "two sides"),
        ((4, 4, 8), False, "not"),
    ],
)
def test_a_map_that_does_not_tell_is_refused(shape, square, why):
    with pytest.raises(ValueError, match=rf"cannot tell.*{why}.*channels_first"):
        find_channels(shape, square)


def test_images_that_are_not_square_need_to_be_told(net):
    wide = torch.rand(2, 3, 4, 5)  # five channels: maps (5, 4, 5) and (4, 5, 5) would mislead
    with pytest.raises(ValueError, match=r"layer 'turn': cannot tell.*images are not square"):
        LayerFeatures(net, {"turn": "avg"})(wide)
    found = LayerFeatures(net, {"turn": ("avg", "channels_last")})(wide)
    torch.testing.assert_close(found["turn"], net.conv(wide).mean(dim=(2, 3)))


def test_a_grid_must_not_be_finer_than_the_output(net):
    images = torch.rand(2, 3, 3, 3)
    with pytest.raises(ValueError, match=r"grid of 4 x 4 parts needs .* got 3 x 3; use a smaller"):
        LayerFeatures(net, {"conv": ("grid", 4)})(images)
    with pytest.raises(ValueError, match=r"grid of 4 x 4 parts needs .* got 9;"):
        LayerFeatures(net, {"norm": ("grid", 4)})(images)


@pytest.mark.parametrize(
    "wrong",
    ["max", ("max",), ("grid",), ("grid", 2, "x"), ("avg", "x"), 3, None, (), ("avg", 1, 2)],
)
def test_what_is_no_reduction_is_refused(wrong):
    with pytest.raises(ValueError, match=r"a reduction must be \"flatten\"|channels must be"):
        build_reduction(wrong)


@pytest.mark.parametrize("size", [0, -1, 2.0, "2", True])
@pytest.mark.parametrize("name", ["grid", "project"])
def test_sizes_are_whole_numbers(name, size):
    with pytest.raises(ValueError, match=rf'\("{name}", size\) needs a whole number >= 1'):
        build_reduction((name, size))


def test_a_module_must_return_rows_and_runs_in_evaluation_mode(net):
    images = torch.rand(2, 3, 4, 4)
    own = nn.Sequential(nn.Flatten(), nn.Dropout(0.9)).train()
    features = LayerFeatures(net, {"conv": own})
    assert features.reductions[0] is own
    torch.testing.assert_close(features(images)["conv"], net.conv(images).flatten(1))
    assert own.training and own[1].training
    with pytest.raises(ValueError, match=r"reduction of layer 'conv' must .* got \(2, 5, 4, 4\)"):
        LayerFeatures(net, {"conv": nn.Identity()})(images)


def test_preparing_leaves_the_features_it_was_given(net):
    features = LayerFeatures(net, {"conv": ("project", 128), "turn": "avg"}, seed=1)
    assert features.describe() == (
        "conv: (...) -> project 128 -> ? features\nturn: (...) -> avg -> ? features"
    )
    small = prepare_features(features, [torch.rand(8, 3, 8, 8)])
    large = prepare_features(small, torch.rand(8, 3, 9, 9).split(5))
    assert not features.reductions[0].ready and not features.reductions[1].ready
    assert small.reductions[0].rows.shape[1] == 320 and large.reductions[0].rows.shape[1] == 405
    assert large.net is net
    assert large.describe() == (
        "conv: (5, 9, 9) -> project 128 -> 128 features\n"
        "turn: (9, 9, 5) -> avg channels_last -> 5 features"
    )
    assert large.sizes["conv"] == {"output": [5, 9, 9], "features": 128}


def test_a_projection_to_too_few_features_warns(net):
    images = torch.rand(20, 3, 8, 8)
    with pytest.warns(ProjectionWarning, match=r"layer 'conv' changes .* of 190 pairs .* by \d+%"):
        few = prepare_features(LayerFeatures(net, {"conv": ("project", 8)}), images.split(7))
    many = prepare_features(LayerFeatures(net, {"conv": ("project", 256)}), [images])
    assert distortions(few)["conv"]["rms"] > 0.1 > distortions(many)["conv"]["rms"] > 0
    assert distortions(LayerFeatures(net, ["conv"])) == {}


def test_a_network_that_fails_is_told_with_its_images(net):
    with pytest.raises(RuntimeError, match=r"expected input.*channels") as failure:
        prepare_features(LayerFeatures(net, ["conv"]), [torch.rand(2, 1, 8, 8)])
    assert "given images (2, 1, 8, 8)" in failure.value.__notes__[0]
    with pytest.raises(RuntimeError, match="no layers are chosen yet"):
        LayerFeatures(net, None)(torch.rand(2, 3, 8, 8))


def test_looking_at_the_first_batches_loses_none():
    batches = [(torch.full((30, 1), float(i)), None) for i in range(5)]
    sample, again = first_images(iter(batches))
    assert [len(part) for part in sample] == [30, 30, 4]  # no larger than the user's batches
    assert torch.cat(sample).unique().tolist() == [0.0, 1.0, 2.0]
    assert [batch[0][0, 0].item() for batch in again] == [0.0, 1.0, 2.0, 3.0, 4.0]
    sample, again = first_images(iter([(torch.arange(1000.0).view(-1, 1), None)]))
    assert len(list(again)) == 1
    assert sample[0].shape == (64, 1) and sample[0].max() > 900  # not the first 64 alone
    mixed = [(torch.rand(2, 3), None), (torch.rand(2, 4), None)]
    assert [part.shape for part in first_images(iter(mixed))[0]] == [(2, 3)]
