import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from benchmarks.ood import __main__ as measures
from benchmarks.ood import images as ood
from benchmarks.ood.report import drawn_detectors, headline, page, plot_severities


def squares(n, size=28):
    """Make dark images with a bright square, at places of its own in each."""
    images = torch.zeros(n, 1, size, size)
    for index, (top, left) in enumerate(torch.randint(6, size - 12, (n, 2)).tolist()):
        images[index, 0, top : top + 6, left : left + 6] = 0.9
    return images


# --- images ---


def name_of(beginning):
    (name,) = (name for name in ood.CORRUPTIONS if name.startswith(beginning))
    return name


def corrupt(images, beginning, strength):
    return ood.corrupt(images, name_of(beginning), strength, seed=0)


def test_geometric_corruptions_are_what_their_names_say():
    images = squares(4)
    turned = corrupt(images, "rotation", 90)
    torch.testing.assert_close(turned, images.rot90(1, (2, 3)), atol=1e-4, rtol=0)
    shifted = corrupt(images, "shift", 0.25)
    assert torch.equal(shifted[..., 7:], images[..., :-7]) and not shifted[..., :7].any()
    covered = corrupt(torch.ones(2, 1, 28, 28), "black square", 0.5)
    assert not covered[..., 7:21, 7:21].any() and covered.sum() == 2 * (28**2 - 14**2)
    blocks = corrupt(torch.rand(2, 1, 28, 28), "pixelate", 0.25)
    assert torch.equal(
        blocks, blocks[..., ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3)
    )


def test_changes_of_the_pixels_are_what_their_names_say():
    images = squares(4)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    faded = corrupt(images, "contrast", 0.4)
    torch.testing.assert_close(faded, 0.4 * images + 0.6 * mean)
    noisy = corrupt(torch.full((20, 1, 28, 28), 0.5), "Gaussian noise", 0.1)
    assert noisy.std().item() == pytest.approx(0.1, rel=0.03)
    assert noisy.mean().item() == pytest.approx(0.5, abs=0.01)
    point = torch.zeros(1, 1, 28, 28)
    point[..., 14, 14] = 1
    blurred = corrupt(point, "Gaussian blur", 1.5)[0, 0].double()
    place = torch.arange(28) - 14.0
    assert (blurred.sum(dim=0) @ place.square().double()).item() == pytest.approx(1.5**2, rel=0.02)


def test_corruptions_grow_stay_in_range_and_repeat():
    images, labels = squares(6), torch.arange(6)
    torch.manual_seed(5)
    sets = list(ood.corrupted_sets(images, labels, seed=3))
    again = list(ood.corrupted_sets(images, labels, seed=3))
    assert len(sets) == 5 * len(ood.CORRUPTIONS) == 35
    for one, two in zip(sets, again, strict=True):
        assert one.images.shape == images.shape and one.labels is labels
        assert one.images.min() >= 0 and one.images.max() <= 1
        assert torch.equal(one.images, two.images)
    assert not torch.equal(sets[0].images, next(ood.corrupted_sets(images, labels, 4)).images)
    for name in ood.CORRUPTIONS:
        if name.startswith(("rotation", "shift")):  # a turned square may look like itself
            continue
        changes = [(s.images - images).norm().item() for s in sets if s.name == name]
        assert changes == sorted(changes) and changes[0] > 0
    with pytest.raises(ValueError, match="no corruption 'fog'; choose from: Gaussian noise"):
        ood.corrupt(images, "fog", 1.0, seed=0)


def test_noise_has_the_spread_that_it_should():
    uniform, gaussian = ood.noise_images(torch.zeros(40, 1, 28, 28), seed=0)
    assert uniform.images.mean().item() == pytest.approx(0.5, abs=0.01)
    assert uniform.images.std().item() == pytest.approx(12**-0.5, rel=0.02)
    cut = (gaussian.images == 0).double().mean().item()
    assert cut == pytest.approx(0.1587, abs=0.01)  # more than one deviation below the mean
    same, _ = ood.noise_images(torch.zeros(40, 1, 28, 28), seed=0)
    assert torch.equal(uniform.images, same.images)


def test_other_sets_are_brought_to_the_size_of_the_digits(tmp_path):
    def unreachable():
        raise RuntimeError("no network\nhere")

    colours = np.zeros((30, 32, 32, 3), np.uint8)
    colours[..., 1] = 200  # green weighs 0.587 in grey
    np.savez(tmp_path / "c.npz", x_train=colours, y_train=np.arange(30) % 2, x_test=colours,
             y_test=np.arange(30) % 2)  # fmt: skip
    loaders = ood.loaders(tmp_path, f"npz:{tmp_path}/c.npz")
    for name in ("Fashion-MNIST", "MNIST's test digits"):
        loaders[name] = (loaders[name][0], unreachable)
    like = torch.zeros(20, 1, 28, 28)
    sets, missing = ood.other_sets(like, loaders, seed=0)
    reason = "RuntimeError: no network here"
    assert missing == {"Fashion-MNIST": reason, "MNIST's test digits": reason}
    grey, digits = sets
    assert grey.images.shape == digits.images.shape == (20, 1, 28, 28)
    torch.testing.assert_close(
        grey.images, torch.full_like(like, 0.587 * 200 / 255), atol=0.003, rtol=0
    )
    assert grey.labels is None and digits.labels.shape == (20,)
    assert digits.images.min() >= 0 and 0.9 < digits.images.max() <= 1


# --- measures ---


def oracle(negatives, positives):
    labels = [0] * len(negatives) + [1] * len(positives)
    scores = torch.cat([negatives, positives]).numpy()
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    return roc_auc_score(labels, scores), fpr[tpr >= 0.95 - 1e-12].min()


def test_unknown_is_positive_and_the_numbers_are_those_of_scikit_learn():
    clean = {name: torch.randn(80).double() for name in ("DNR", "NR", "energy")}
    unknown = {name: torch.randn(50).double() + 1 for name in clean}
    found = measures.measure_set(clean, unknown)
    areas = {}
    for name, entry in found.items():
        areas[name], fpr = oracle(clean[name], unknown[name])
        assert entry["auroc"][0] == pytest.approx(areas[name], abs=1e-5) and areas[name] > 0.6
        assert entry["fpr"][0] == pytest.approx(fpr, abs=1e-5)
        for value, low, high in entry.values():
            assert low < value < high
    for name in ("NR", "energy"):
        assert found[name]["dnr_ahead"][0] == pytest.approx(areas["DNR"] - areas[name], abs=1e-5)
    assert found["NR"]["rejected"][0] == pytest.approx((unknown["NR"] >= 0).double().mean().item())
    assert "rejected" not in found["energy"] and "dnr_ahead" not in found["DNR"]


def toy_score(images):
    """Take darkness for what is unknown, and the brighter half for the label."""
    mean = images.mean(dim=(1, 2, 3)).double()
    left, right = (part.mean(dim=(1, 2, 3)) for part in images.chunk(2, dim=3))
    return {"DNR": 0.05 - mean, "NR": 0.02 - mean, "energy": mean}, (right > left).long()


def toy_entries(n=40):
    images = squares(n) * torch.linspace(0.5, 1, n)[:, None, None, None]
    labels = toy_score(images)[1]
    labels[0] = 1 - labels[0]
    half = n // 2
    sets = [
        *ood.noise_images(images, 0),
        *ood.corrupted_sets(images[half:], labels[half:], 0),
    ]
    return images, sets, measures.measure_all(toy_score, images, labels, sets)


def test_corrupted_images_are_told_from_the_other_half():
    images, sets, (first, *entries) = toy_entries()
    clean = toy_score(images)[0]
    assert first["accuracy"][0] == pytest.approx(39 / 40) and first["images"] == 40
    rejected = (clean["DNR"] >= 0).double().mean().item()
    assert first["detectors"]["DNR"]["rejected"][0] == pytest.approx(rejected)
    for unknown, entry in zip(sets, entries, strict=True):
        corrupted = entry["kind"] == "corrupted"
        count = 20 if corrupted else 40
        assert entry["clean_images"] == entry["images"] == count
        scores, predicted = toy_score(unknown.images)
        area, fpr = oracle(clean["DNR"][:count], scores["DNR"])
        assert entry["detectors"]["DNR"]["auroc"][0] == pytest.approx(area, abs=1e-5)
        assert entry["detectors"]["DNR"]["fpr"][0] == pytest.approx(fpr, abs=1e-5)
        if corrupted:
            right = (predicted == unknown.labels).double().mean().item()
            assert entry["accuracy"][0] == pytest.approx(right)
        else:
            assert entry["accuracy"] is None and entry["detectors"]["DNR"]["auroc"][0] == 0


# --- figure ---


def test_of_detectors_on_several_layers_the_best_is_drawn():
    areas = {"DNR": 0.9, "kNN, a": 0.6, "kNN, b": 0.8, "kNN, c": 0.7, "energy": 0.5}
    found = {name: {"auroc": [area, 0.0, 1.0]} for name, area in areas.items()}
    drawn = drawn_detectors([{"name": "clean"}, {"kind": "noise", "detectors": found}])
    assert drawn == ["DNR", "kNN, b", "energy"]


def test_the_figure_has_a_panel_for_each_corruption(tmp_path):
    *_, entries = toy_entries()
    figure = plot_severities(entries, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    panels = [axes for axes in figure.axes if axes.get_title()]
    titles = [name.partition(",")[0] for name in ood.CORRUPTIONS]
    assert [axes.get_title() for axes in panels] == titles
    line = next(line for line in panels[0].lines if line.get_label() == "energy")
    values = [e["detectors"]["energy"]["auroc"][0] for e in entries[3:8]]
    assert list(line.get_ydata()) == values
    right = f"{100 * entries[3]['accuracy'][0]:.0f}"
    assert panels[0].get_xticklabels()[0].get_text() == f"0.1\n({right} %)"
    with pytest.raises(ValueError, match="no corrupted images"):
        plot_severities(entries[:3], tmp_path / "none.png")


# --- text ---


def toy_results():
    """Make results in which DNR is ahead of NR and of kNN on one layer, and behind the others."""
    ahead = {
        "NR": 0.1,
        "energy": -0.1,
        "kNN, a": 0.1,
        "kNN, b": -0.1,
        "odd, a": -0.2,
        "odd, b": -0.2,
    }

    def entry(name, kind, strength=None):
        found = {d: {"dnr_ahead": [v, v - 0.05, v + 0.05]} for d, v in ahead.items()}
        found = {"DNR": {}, **found}
        for one in found.values():
            one |= {"auroc": [0.9, 0.8, 0.95], "fpr": [0.3, 0.2, 0.4], "rejected": [0.7, 0.6, 0.8]}
        size = {"images": 20, "clean_images": 20, "accuracy": [0.5, 0.4, 0.6]}
        return {"name": name, "kind": kind, "strength": strength, "detectors": found, **size}

    rejected = {name: {"rejected": [0.1, 0.0, 0.2]} for name in ("DNR", "NR")}
    clean = {"name": "clean", "images": 40, "accuracy": [0.97, 0.9, 1], "detectors": rejected}
    blurred = [entry("blur, pixels", "corrupted", value) for value in (1, 2, 3, 4, 5)]
    control = entry("MNIST's test digits", "digits of others")
    settings = {"seed": 7, "neighbours": 2, "fit_images": 60, "nr_layer": "b", "layers": ["a", "b"]}
    return {
        "run": {"dataset": "mnist-5k"},
        "settings": settings,
        "environment": {"threads": 1, "processor": "machine", "torch": "2", "device": "cpu"},
        "versions": {"pytorch-ood": "0.4.0"},
        "missing": {"Fashion-MNIST": "no network"},
        "note": None,
        "sets": [clean, entry("noise", "noise"), control, *blurred],
    }


def test_the_text_says_where_dnr_is_worse():
    text = page(toy_results())
    verdict = "worse than energy, kNN on b, odd on any layers; better than NR, kNN on a"
    assert f"DNR is {verdict}." in text and headline(toy_results()).endswith(verdict)
    assert "| energy | 0, 1 | 0, 5 | -10.0 |" in text and "| NR | 1, 0 | 5, 0 | +10.0 |" in text
    assert "seed 7; 40 clean" in text and "20 corrupted digits against 20" in text
    assert "could not be had: Fashion-MNIST." in text
    assert "| energy | 90.0 (80.0 to 95.0); 30.0 (20.0 to 40.0) |" in text
    assert "|  | blur, pixels 3 |" in text and "| kNN, b |" in text
    even = toy_results()
    for entry in even["sets"][1:]:
        entry["detectors"]["NR"]["dnr_ahead"] = [0.0, -0.1, 0.1]
    text = page(even)
    assert "better than kNN on a; neither better nor worse than NR." in text
