import math

import pytest
import torch
from matplotlib.image import imread

from torchdnr.evaluation import (
    LINE_SEARCH_PGD,
    AttackCurve,
    SecurityCurve,
    format_table,
    load_results,
    plot_curves,
    plot_examples,
    save_results,
)
from torchdnr.rejection import REJECT

EPS = [0.0, 0.5, 1.0, 2.0]


def make_curve(rejects=True, seed=0, eps=EPS, attacks=(LINE_SEARCH_PGD, "boundary walk")):
    """A curve of 50 samples whose decisions get worse as eps grows, by more for the worst case."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (50,), generator=generator)
    draw = torch.rand(50, generator=generator)
    costs = {name: [0] * len(eps) for name in ("forwards", "backwards", "violations")}

    def predict(strength):
        rows = []
        for value in eps:
            wrong = torch.where(draw < strength * value, (labels + 1) % 10, labels)
            rejected = (draw > 0.9) | ((draw > 0.5) & (0 < value < 1.5))
            rows.append(wrong.masked_fill(rejected & torch.tensor(rejects), REJECT))
        return {
            "eps": eps,
            "labels": labels,
            "predictions": torch.stack(rows),
            "mean_norm": list(eps),
        }

    return SecurityCurve(
        **predict(0.45),
        name="DNR",
        norm=2.0,
        rejects=rejects,
        attacks={
            name: AttackCurve(
                **predict(0.1 + 0.3 * index),
                minimum_norm=bool(index),
                seconds=[1.5] * len(eps),
                **costs,
                settings={},
            )
            for index, name in enumerate(attacks)
        },
        evasion_norm=torch.where(draw < 0.9, draw.double() / 0.45, math.inf),
        settings={"seed": seed},
        environment={},
        seconds=6.0,
    )


CURVES = {"DNN": make_curve(rejects=False), "DNR": make_curve()}


def test_table_has_a_row_per_eps_and_classifier_with_the_rates_of_each_attack():
    table = format_table(CURVES)
    rows = [line for line in table.splitlines() if line.startswith("     1  ")]
    assert len(rows) == 2 and "DNN" in rows[0] and "DNR" in rows[1]
    curve = CURVES["DNR"]
    expected = []
    for part in (*curve.attacks.values(), curve):
        expected += [f"{100 * part.accuracy[2]:.1f}", f"{100 * part.rejection_rate[2]:.1f}"]
    assert rows[1].replace("|", "").split()[2:] == expected
    assert rows[0].replace("|", "").split()[3::2] == ["-", "-", "-"]  # it never rejects
    header = table.splitlines()[0]
    assert all(name in header for name in (LINE_SEARCH_PGD, "boundary walk", "worst case"))
    assert len({line.index("|") for line in table.splitlines() if "|" in line}) == 1
    assert "eps = 0 (no attack): share given its true class, to reject is an error" in table
    assert "50 samples" in table and "median evasion norm" in table
    assert "Every defence has to fail" in table


def test_table_copes_with_other_attacks_and_eps_and_shouts_at_violations():
    other = make_curve(eps=[0.0, 3.0], attacks=("square",))
    other.attacks["square"].violations[1] = 4
    other.evasion_norm[:] = math.inf
    table = format_table({"DNR": make_curve(), "other": other})
    rows = [line for line in table.splitlines() if line.startswith("     3  ")]
    assert len(rows) == 1 and rows[0].count(" - ") >= 1
    assert "WARNING: square left the ball or the box 4 times" in table
    assert "median evasion norm not reached" in table
    with pytest.raises(ValueError, match="curves is empty"):
        format_table({})


def test_results_of_all_classifiers_go_into_one_file_and_back(tmp_path):
    path = tmp_path / "results.json"
    save_results(path, CURVES, {"dataset": "mnist"})
    curves, settings = load_results(path)
    assert settings == {"dataset": "mnist"}
    assert format_table(curves) == format_table(CURVES)
    (tmp_path / "file").write_text("{}")
    with pytest.raises(ValueError, match="does not hold results"):
        load_results(tmp_path / "file")
    with pytest.raises(OSError, match="writable"):
        save_results(tmp_path / "file" / "results.json", CURVES)


def ink(path):
    image = imread(path)[..., :3]
    assert image.shape[0] > 200 and image.shape[1] > 200
    return (image < 0.9).any(axis=2).mean()


@pytest.mark.parametrize(
    "curves",
    [
        CURVES,
        {"DNN": CURVES["DNN"]},
        {"NR": [make_curve(seed=1), make_curve(seed=2)], "DNN": CURVES["DNN"]},
        {"wide": make_curve(eps=[0.0, 0.05, 0.2, 2.0], attacks=("square",))},
    ],
    ids=["two", "no rejection", "several runs", "wide range of eps"],
)
def test_curves_are_drawn(tmp_path, curves):
    path = tmp_path / "curve.png"
    path.write_text("an older file is replaced")
    plot_curves(curves, path)
    assert 0.01 < ink(path) < 0.5
    assert [file.name for file in tmp_path.iterdir()] == ["curve.png"]


def test_a_curve_draws_itself_in_the_format_that_the_suffix_names(tmp_path):
    CURVES["DNR"].plot(tmp_path / "curve.svg")
    assert "<svg" in (tmp_path / "curve.svg").read_text()


def test_plots_refuse_what_cannot_be_drawn(tmp_path):
    with pytest.raises(ValueError, match="curves is empty"):
        plot_curves({}, tmp_path / "curve.png")
    with pytest.raises(ValueError, match="the runs of NR must be over the same eps"):
        plot_curves({"NR": [make_curve(), make_curve(eps=[0.0, 1.0])]}, tmp_path / "curve.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="writable"):
        plot_curves(CURVES, tmp_path / "file" / "curve.png")
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"inputs must be \(n, 1, H, W\)"):
        plot_examples(tmp_path / "x.png", torch.rand(2, 4, 8, 8), labels, {}, {}, 1.0)
    with pytest.raises(ValueError, match="adversarial images of DNR must be"):
        plot_examples(
            tmp_path / "x.png",
            torch.rand(2, 1, 8, 8),
            labels,
            {"DNR": torch.rand(2, 1, 8, 9)},
            {"DNR": labels},
            1.0,
        )


@pytest.mark.parametrize("channels", [1, 3])
def test_examples_are_drawn_in_grey_and_in_colour(tmp_path, channels):
    inputs = torch.rand(2, channels, 8, 8)
    labels = torch.tensor([0, 1])
    adversarials = {"DNN": inputs, "DNR": (inputs + 0.1).clamp(0, 1)}
    predictions = {"DNN": labels, "DNR": torch.tensor([REJECT, 0])}
    names = ["cat", "dog"] if channels == 3 else None
    path = tmp_path / "examples.png"
    plot_examples(path, inputs, labels, adversarials, predictions, 1.0, names)
    assert ink(path) > 0.1
    assert [file.name for file in tmp_path.iterdir()] == ["examples.png"]
