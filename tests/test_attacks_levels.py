"""Adversarial images that still are when they come out of a file of 8 bits."""

import json
import math
from functools import cache, partial

import pytest
import torch
from attack_promises import sizes
from attack_toys import digits
from PIL import Image

from torchdnr.attacks import (
    EnsembleAttack,
    apgd,
    boundary_walk,
    evades,
    fmn,
    line_search_pgd,
    multi_target,
    noise,
    orthogonal_pgd,
    pgd,
    square,
    transfer,
)
from torchdnr.evaluation import SecurityCurve, save_images, security_evaluation
from torchdnr.evaluation.line_up import build_line_up
from torchdnr.evaluation.report.table import attack_rates, format_table, save_csv

EPS = {1: 2.0, 2: 0.6, math.inf: 16 / 255}


def rounded(points):
    return (points * 255).round() / 255


def on_levels(points):
    return torch.equal(rounded(points), points)


def evading(net, points, labels):
    with torch.no_grad():
        return evades(net(points), labels, False)


@pytest.mark.parametrize(
    "norm", [2, *(pytest.param(norm, marks=pytest.mark.slow) for norm in (1, math.inf))]
)
@pytest.mark.parametrize("attack", [boundary_walk, fmn])
def test_no_nearest_evasion_is_lost_in_a_file(attack, norm):
    net, images, labels, pool = digits()
    near = attack(net, images, labels, pool, norm=norm)
    assert evading(net, near, labels).all()
    lost = int((~evading(net, rounded(near), labels)).sum())
    kept = attack(net, images, labels, pool, norm=norm, levels=256)
    assert on_levels(kept)
    assert evading(net, kept, labels).all()  # where as many as `lost` were not
    growth = sizes(kept, images, norm) / sizes(near, images, norm)
    print(f"{attack.__name__}, norm {norm}: {lost} of 24 lost, growth {growth.mean():.4f}")
    assert lost >= 3 and growth.mean() <= 1.03


ATTACKS = {
    "pgd": partial(pgd, steps=15),
    "apgd": partial(apgd, steps=15),
    "line search": partial(line_search_pgd, steps=8),
    "noise": noise,
    "orthogonal": partial(orthogonal_pgd, steps=15),
    "square": partial(square, queries=100),
    "multi-target": partial(multi_target, steps=10, classes=2),
    "transfer": lambda model, *rest, **options: transfer(
        pgd, model, model, *rest, **options, steps=15
    ),
    "ensemble": EnsembleAttack({"pgd": partial(pgd, steps=8), "apgd": partial(apgd, steps=15)}),
}


@pytest.mark.parametrize(
    "norm", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in EPS if n != 2)]
)
@pytest.mark.parametrize("name", ATTACKS)
def test_points_on_levels_keep_to_ball_and_mask_and_evade_nearly_as_often(name, norm):
    net, images, labels, _ = digits()
    mask = torch.ones(8, 8)
    mask[:, 6:] = 0
    attack = partial(ATTACKS[name], net, images[:12], labels[:12], EPS[norm], norm=norm, mask=mask)
    points = attack(levels=256)
    assert on_levels(points)
    assert torch.equal(points[..., 6:], images[:12, ..., 6:])
    assert (sizes(points, images[:12], norm) <= EPS[norm] * (1 + 1e-5)).all()
    found, free = (int(evading(net, p, labels[:12]).sum()) for p in (points, attack()))
    assert found >= free - 1


def test_images_between_levels_are_refused():
    net, images, labels, _ = digits()
    with pytest.raises(ValueError, match=r"inputs must lie on 256 levels.*round them"):
        pgd(net, images * 0.999, labels, 0.1, levels=256)
    with pytest.raises(ValueError, match="levels must be >= 2"):
        pgd(net, images, labels, 0.1, levels=1)


@cache
def curve(levels=None):
    net, images, labels, pool = digits()
    line_up = build_line_up(["boundary-walk"], pool)
    eps = [0, 0.3, 0.6, 1.0, 2.0]
    return security_evaluation(
        net, images, labels, eps, attacks=line_up, levels=levels, progress=False, name="DNN"
    )


def test_every_report_tells_what_rounding_to_8_bits_leaves(tmp_path):
    net, _, labels, _ = digits()
    plain = curve()
    for points, predictions in zip(plain.adversarial, plain.rounded.predictions, strict=True):
        with torch.no_grad():
            assert torch.equal(net(rounded(points)).argmax(dim=1), predictions)
    lost = (plain.predictions != labels) & (plain.rounded.predictions == labels)
    assert lost.sum() >= 3  # something is lost, so the rates differ
    assert plain.rounded.evasion_rate[1:] != plain.evasion_rate[1:]
    assert "8-bit images" in format_table({"DNN": plain})
    rates = {
        row["eps"]: row for row in attack_rates({"DNN": plain}) if row["attack"] == "8-bit images"
    }
    shown = [rates[eps]["evasion"]["value"] for eps in plain.eps]
    assert shown == plain.rounded.evasion_rate
    save_csv(tmp_path / "rates.csv", {"DNN": plain})
    assert (tmp_path / "rates.csv").read_text().count("DNN,8-bit images") == len(plain.eps)
    again = SecurityCurve.from_dict(json.loads(json.dumps(plain.to_dict())))
    assert torch.equal(again.rounded.predictions, plain.rounded.predictions)


def test_on_levels_what_is_reported_is_what_the_files_hold(tmp_path):
    net, images, labels, _ = digits()
    found = curve(levels=256)
    assert on_levels(found.adversarial)
    assert torch.equal(found.rounded.predictions, found.predictions)
    assert found.evasion_rate[-1] >= curve().evasion_rate[-1]
    files = save_images(tmp_path, found)
    assert len(files) == 4 * len(images)
    for index, eps in ((0, 0.3), (23, 2.0)):
        (file,) = tmp_path.glob(f"dnn-eps-{eps:g}-sample-{index:05d}-*.png")
        pixels = torch.tensor(list(Image.open(file).getdata())).view(1, 1, 8, 8) / 255
        at = found.eps.index(eps)
        assert torch.equal(pixels[0], found.adversarial[at, index])
        with torch.no_grad():
            wrong = bool(net(pixels).argmax(dim=1) != labels[index])
        assert file.stem.endswith("evades" if wrong else "right")
