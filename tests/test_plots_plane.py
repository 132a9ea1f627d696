"""The figure of a toy of the plane."""

import pytest
import torch
from attack_toys import NORMS, RBFMap

from benchmarks.paper.plane import plot_plane


@pytest.mark.parametrize("norm", NORMS)
def test_draws_an_image(tmp_path, norm):
    toy = RBFMap()
    inputs, labels, _ = toy.samples(20)
    path = tmp_path / "plane.png"
    options = {"norm": norm, "paths": {"path": inputs[:3]}}
    found = {"a": inputs[1]}
    plot_plane(path, toy, inputs, labels, inputs[0], int(labels[0]), found, 0.3, **options)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


def test_refuses_what_is_not_in_the_plane(tmp_path):
    x = torch.rand(4, 3)
    with pytest.raises(ValueError, match=r"samples must be \(m, 2\) and source \(2,\)"):
        plot_plane(tmp_path / "p.png", RBFMap(), x, torch.zeros(4).long(), x[0], 0, {}, 0.3)
    assert not (tmp_path / "p.png").exists()
