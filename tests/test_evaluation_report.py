import base64
import csv
import math
from html.parser import HTMLParser

import pytest
import torch
from matplotlib.image import imread
from sklearn.metrics import roc_auc_score

from torchdnr.decisions import REJECT
from torchdnr.evaluation import (
    LINE_SEARCH_PGD,
    Attack,
    AttackCurve,
    Refinement,
    SecurityCurve,
    attack_costs,
    format_table,
    load_results,
    measure,
    plot_curves,
    plot_examples,
    save_csv,
    save_html,
    save_results,
    security_evaluation,
)
from torchdnr.evaluation.checks.context import choose_eps
from torchdnr.evaluation.curve import most_telling_eps

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


CHECKS = {
    "DNN": {
        "status": "pass",
        "checks": [
            {"name": "stable", "status": "pass", "counts": {}, "message": "All well.", "advice": ""}
        ],
    },
    "DNR": {
        "status": "fail",
        "checks": [
            {"name": "a", "status": "pass", "counts": {}, "message": "Fine.", "advice": ""},
            {
                "name": "b",
                "status": "skipped",
                "counts": {},
                "message": "No.",
                "advice": "Give it.",
            },
            {"name": "c", "status": "warn", "counts": {}, "message": "Odd & 1 < 2.", "advice": ""},
            {
                "name": "d",
                "status": "fail",
                "counts": {},
                "message": "<b>Broken",
                "advice": "Mend.",
            },
        ],
    },
}


class Page(HTMLParser):
    """The text of a page in order, and what it loads; fails where tags do not match."""

    VOID = "meta", "img", "br", "link", "input"

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.loads, self.tables = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.loads += [value for key, value in attrs if key in ("src", "href")]
        assert tag not in ("script", "link", "iframe")
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            assert "url(" not in data and "@import" not in data
        else:
            self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return " ".join("".join(self.words).split())


def write_page(tmp_path, checks=CHECKS, **options):
    plot_curves(CURVES, tmp_path / "curve.png")
    options = {
        "settings": {
            "classifiers": {"DNR": {"test_accuracy": 0.9, "threshold": 0.25}},
            "environment": {"torch": "2", "processor": "<fast>"},
            "run": {"dataset": "mnist"},
        },
        "measures": {},
        "figures": {"Accuracy & more": tmp_path / "curve.png"},
        "title": "A <title>",
        "command": "python attack.py --eps 0 1 'a<b'",
    } | options
    save_html(tmp_path / "report.html", CURVES, checks=checks, **options)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_needs_nothing_else_and_holds_the_numbers(tmp_path):
    text = write_page(tmp_path)
    page = Page(text)
    assert len(page.loads) == 1 and page.loads[0].startswith("data:image/png;base64,")
    assert (
        base64.b64decode(page.loads[0].partition(",")[2]) == (tmp_path / "curve.png").read_bytes()
    )
    worst = page.tables[0]
    assert [row[0] for row in worst[1:]] == ["0", "0.5", "1", "2"]
    for index, row in enumerate(worst[1:]):
        curves = [CURVES["DNN"].accuracy, CURVES["DNR"].accuracy, CURVES["DNR"].rejection_rate]
        assert [cell.split()[0] for cell in row[1:]] == [f"{100 * r[index]:.1f}" for r in curves]
        low, high = CURVES["DNR"].accuracy_interval[index]
        assert f"[{100 * low:.1f}, {100 * high:.1f}]" in row[2]
    own = CURVES["DNR"].attacks[LINE_SEARCH_PGD]
    low, high = own.accuracy_interval[1]
    of_dnr = [row for table in page.tables[1:] for row in table if row[0] == LINE_SEARCH_PGD][-1]
    assert of_dnr[2].startswith(
        f"{100 * own.accuracy[1]:.1f} [{100 * low:.1f}, {100 * high:.1f}] ("
    )
    for wanted in ("A <title>", "<fast>", "python attack.py --eps 0 1 'a<b'", "accepted and wrong"):
        assert wanted in page.text  # escaped in the source, as written for the reader
    assert "<fast>" not in text


def test_of_a_long_setting_the_beginning_is_shown(tmp_path):
    run = {"classes": [f"class {k}" for k in range(1000)], "layers": ["a", "b"]}
    text = Page(write_page(tmp_path, settings={"run": run})).text
    assert "'class 19', and 980 more]" in text and "class 20" not in text
    assert "['a', 'b']" in text


def test_failed_checks_come_first_and_stand_beside_the_numbers(tmp_path):
    page = Page(write_page(tmp_path))
    text = page.text
    before, table = text.index("Worst case over all attacks"), text.index("All checks")
    places = [text.index(word) for word in ("fail: d. <b>Broken", "Mend.", "warn: c. Odd & 1 < 2.")]
    assert places == sorted(places) and places[-1] < before
    assert "Fine." not in text[:before]
    assert "DNR: accuracy, % checks: 1 fail, 1 warn" in page.tables[0][0][2]
    assert "checks: pass" in page.tables[0][0][1]
    names = [row[0].split() for row in page.tables[-4][1:]]
    listed = text[table:]
    assert [listed.index(word) for word in ("<b>Broken", "Odd &", "Fine.", "Give it.")] == sorted(
        listed.index(word) for word in ("<b>Broken", "Odd &", "Fine.", "Give it.")
    )
    assert ["fail", "d"] in names


def test_a_check_that_broke_off_and_an_attack_left_out_are_seen(tmp_path):
    entry = {"name": "noise control", "status": "skipped", "counts": {"errors": 1}, "advice": ""}
    checks = {"DNR": {"status": "warn", "checks": [entry | {"message": "Broke off: no memory."}]}}
    curve = make_curve()
    curve.settings["left_out"] = ["smoothed PGD"]
    save_html(
        tmp_path / "page.html", {"DNR": curve}, settings={}, checks=checks, measures={}, figures={},
        title="t", command="c",
    )  # fmt: skip
    text = Page((tmp_path / "page.html").read_text()).text
    above = text[: text.index("Worst case over all attacks")]
    assert "Broke off: no memory." in above and "No check found a reason" not in above
    assert "smoothed PGD" in above
    assert "left out, as the model lacks what they need: smoothed PGD" in format_table({"D": curve})


def test_a_page_without_checks_says_so(tmp_path):
    text = Page(write_page(tmp_path, checks={})).text
    assert text.count("not checked") == 4 and "no checks were made" in text
    curves = {"DNR": make_curve()}
    curves["DNR"].attacks[LINE_SEARCH_PGD].violations[1] = 3
    save_html(
        tmp_path / "other.html", curves, settings={}, checks={}, measures={}, figures={},
        title="t", command="c",
    )  # fmt: skip
    text = Page((tmp_path / "other.html").read_text()).text
    assert "line-search PGD left the ball or the box 3 times" in text


def test_a_page_that_cannot_be_written_leaves_the_earlier_one(tmp_path):
    text = write_page(tmp_path)
    with pytest.raises(OSError, match=r"gone\.png"):
        write_page(tmp_path, figures={"gone": tmp_path / "gone.png"})
    assert (tmp_path / "report.html").read_text() == text
    with pytest.raises(ValueError, match="curves is empty"):
        save_html(
            tmp_path / "report.html", {}, settings={}, checks={}, measures={}, figures={},
            title="t", command="c",
        )  # fmt: skip


def test_the_table_for_programs_has_a_row_per_classifier_attack_and_eps(tmp_path):
    save_csv(tmp_path / "results.csv", CURVES)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * len(EPS)
    assert [row["attack"] for row in rows[:: len(EPS)]][:3] == [
        LINE_SEARCH_PGD, "boundary walk", "worst case"
    ]  # fmt: skip
    for row in rows:
        curve = CURVES[row["classifier"]]
        alone = curve.attacks.get(row["attack"], curve)
        index = EPS.index(float(row["eps"]))
        for rate in ("accuracy", "rejection_rate", "evasion_rate"):
            assert float(row[rate]) == getattr(alone, rate)[index]
        low, high = alone.accuracy_interval[index]
        assert (float(row["accuracy_low"]), float(row["accuracy_high"])) == (low, high)
        assert float(row["seconds"]) == (3.0 if row["attack"] == "worst case" else 1.5)
        assert row["norm"] == "2" and row["samples"] == "50"


def test_every_report_tells_what_attacks_added_below_the_norms_found(tmp_path):
    curve = make_curve()
    curve.refinements["APGD"] = Refinement(
        tried=41, nearer=3, seconds=7.0, forwards=900, backwards=800, violations=2
    )
    curves = {"DNR": curve}
    text = "APGD: nearer on 3 of the 41 samples tried below the norms found"
    cost = "(7 s, 900 forwards, 800 backwards)"
    warning = "APGD left the ball or the box 2 times"
    table = format_table(curves)
    assert all(part in table for part in (text, cost, f"WARNING: {warning}"))
    assert "APGD" not in table.splitlines()[0]  # it has no column
    save_html(
        tmp_path / "report.html", curves, settings={}, checks={}, measures={}, figures={},
        title="t", command="c",
    )  # fmt: skip
    page = Page((tmp_path / "report.html").read_text()).text
    assert all(part in page for part in (text, cost, warning))
    row = attack_costs(curves)[-1]
    assert (row["attack"], row["tried"], row["nearer"], row["violations"]) == ("APGD", 41, 3, 2)
    assert row["forwards_per_sample"] == 18 and "evasion" not in row
    save_csv(tmp_path / "results.csv", curves)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["attack"] == "worst case"]
    first = next(index for index, eps in enumerate(EPS) if eps > 0)
    expected = [3.0 + 7.0 * (index == first) for index in range(len(EPS))]
    assert [float(row["seconds"]) for row in rows] == expected
    plot_curves(curves, tmp_path / "curve.png", attack="APGD")  # draws what there is


def test_measures_of_an_evaluation(tmp_path):
    torch.manual_seed(0)
    inputs, more = torch.rand(30, 2), torch.rand(50, 2)

    def scores(x):
        side = x[:, :1] - 0.5
        return torch.cat([-side, side, side.new_full(side.shape, 0.05)], dim=1)

    def true(x):
        return (x[:, 0] > 0.5).long()

    def cross(model, points, labels, eps, start):
        step = torch.zeros_like(points)
        step[:, 0] = eps * (1 - 2 * labels.to(points))
        return (points + step).clamp(0, 1)

    curve = security_evaluation(
        scores, inputs, true(inputs), [0, 0.2, 0.9], reject=True, attacks={"cross": Attack(cross)},
        progress=False,
    )  # fmt: skip
    found = measure(scores, inputs, curve, calibration=(more, true(more)), batch_size=7)
    assert found.median_evasion_norm.value == curve.median_evasion_norm
    clean, points = scores(inputs), scores(curve.adversarial[1])
    right, wrong = clean[:, :2].argmax(1) == true(inputs), points[:, :2].argmax(1) != true(inputs)
    suspicious = torch.cat([-clean[right, :2].amax(1), -points[right & wrong, :2].amax(1)])
    target = torch.cat([torch.zeros(int(right.sum())), torch.ones(int((right & wrong).sum()))])
    assert found.detection[0.2].auroc.value == pytest.approx(roc_auc_score(target, suspicious))
    accepted = (clean[:, :2].amax(1) > 0.05) | (points[:, :2].amax(1) > 0.05)
    evading = (points[:, :2].amax(1) > 0.05) & wrong
    expected = (evading & accepted).sum() / accepted.sum()
    assert found.robust_error[0.2]["own"].value == pytest.approx(expected.item())
    assert set(found.robust_error[0.9]) == {"own", "99%", "98%", "95%"}
    assert 0 not in found.detection and set(found.error_if_accepted) == {0, 0.2, 0.9}
    page = write_page(tmp_path, measures={"DNR": found.to_dict()})
    area = f"{found.detection[0.2].auroc.value:.3g}"
    assert any(row[0] == "DNR, eps 0.2" and row[1].startswith(area) for table in Page(page).tables
               for row in table)  # fmt: skip
    curve.adversarial = None
    with pytest.raises(ValueError, match="curve must hold its adversarial points"):
        measure(scores, inputs, curve)


def test_an_attack_that_changes_no_class_leaves_nothing_to_detect():
    inputs = torch.rand(8, 2)

    def stay(model, points, labels, eps, start):
        return points

    def scores(x):
        return torch.cat([x[:, :1], 1 - x[:, :1]], dim=1)

    labels = scores(inputs).argmax(1)
    options = {"attacks": {"stay": Attack(stay)}, "progress": False}
    curve = security_evaluation(scores, inputs, labels, [0, 0.1], **options)
    found = measure(scores, inputs, curve)
    assert found.detection == {0.1: None} and found.to_dict()["detection"] == {"0.1": None}
    assert math.isinf(found.median_evasion_norm.value)


@pytest.mark.parametrize(("one", "other"), [(0.3, 0.7), (0.4, 0.6), (0.2, 0.2), (0.5, 0.5)])
def test_figures_and_checks_speak_of_the_same_eps(one, other):
    """Also where two are equally near to an accuracy of one half: then of the larger."""
    for rates in ((1, one, other, 0), (1, other, one, 0)):
        curve = make_curve()
        wrong = torch.arange(50)[None] >= 50 * torch.tensor(rates)[:, None].double().round(
            decimals=3
        )
        curve.predictions = torch.where(wrong, (curve.labels + 1) % 10, curve.labels)
        assert curve.accuracy == list(rates)
        assert most_telling_eps(curve) == curve.eps[choose_eps(curve, None)] == 1.0
