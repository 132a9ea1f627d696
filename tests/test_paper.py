"""The repetition of the paper's experiments: claims by hand-made outcomes, the protocol small."""

import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch

from torchdnr.data import Dataset, load_dataset
from torchdnr.evaluation.curve import read_json
from torchdnr.training import TrainingSettings

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
from benchmarks.paper import __main__ as paper
from benchmarks.paper import claims as paper_claims
from benchmarks.paper import report as paper_report
from benchmarks.paper import run as paper_run
from benchmarks.paper import settings as paper_settings
from benchmarks.paper import study as paper_study
from benchmarks.paper.claims import FAILS, HOLDS, OPEN, PARTLY, Outcomes, judge_claims
from benchmarks.paper.tables import WORST

EPS = [0, 1, 2]
N = 100


def outcomes(right, rejected):
    """Build outcomes in which the first so many samples are right, or rejected, at each eps."""
    order = torch.arange(N)
    return Outcomes(
        EPS,
        torch.stack([order < count for count in right]),
        torch.stack([order < count for count in rejected]),
        order,
    )


CLEAN = {"DNN": torch.arange(N) < 99, "NR": torch.arange(N) < 88, "DNR": torch.arange(N) < 89}
AS_THE_PAPER = {
    "DNN": outcomes([99, 5, 0], [0, 0, 0]),
    "NR": outcomes([88, 40, 0], [10, 35, 0]),
    "DNR": outcomes([89, 60, 0], [10, 20, 0]),
}


def verdicts(found, at=(1,), sweeps=None, clean=CLEAN):
    claims = judge_claims(clean, torch.arange(N), found, at, sweeps)
    return {claim.claim: claim.verdict for claim in claims}


def test_outcomes_as_in_the_paper_hold():
    assert set(verdicts(AS_THE_PAPER).values()) == {HOLDS}


@pytest.mark.parametrize(
    ("change", "claim", "verdict"),
    [
        ({"DNR": outcomes([89, 30, 20], [10, 20, 0])}, "DNR is slightly more", PARTLY),
        ({"DNR": outcomes([89, 20, 0], [10, 20, 0])}, "DNR is slightly more", FAILS),
        ({"DNR": outcomes([89, 60, 30], [10, 20, 0])}, "no accuracy at all", PARTLY),
        ({"NR": outcomes([88, 40, 0], [10, 35, 60])}, "first rise", PARTLY),
        ({"NR": outcomes([88, 40, 0], [60, 35, 0])}, "first rise", PARTLY),
        ({"NR": outcomes([88, 40, 0], [10, 12, 9])}, "first rise", PARTLY),
        ({"NR": outcomes([88, 40, 0], [10, 15, 0])}, "NR rejects more", OPEN),
        ({"NR": outcomes([88, 40, 0], [10, 5, 0])}, "NR rejects more", FAILS),
        ({"NR": outcomes([88, 5, 0], [10, 35, 0])}, "attack, NR is more accurate", OPEN),
    ],
)
def test_other_outcomes_do_not(change, claim, verdict):
    found = verdicts({**AS_THE_PAPER, **change})
    assert [value for key, value in found.items() if claim in key] == [verdict]


def test_rates_that_only_fall_do_not_first_rise():
    falling = outcomes([88, 40, 0], [60, 35, 0])
    found = verdicts({**AS_THE_PAPER, "NR": falling, "DNR": falling})
    assert [value for key, value in found.items() if "first rise" in key] == [FAILS]


def test_rates_that_neither_rise_nor_fall_cannot_be_told():
    level = outcomes([88, 40, 0], [10, 12, 10])
    found = verdicts({**AS_THE_PAPER, "NR": level, "DNR": level})
    assert [value for key, value in found.items() if "first rise" in key] == [OPEN]


def test_few_samples_do_not_show_that_no_accuracy_is_left():
    for n, left, verdict in ((20, 0, OPEN), (100, 0, HOLDS), (100, 1, HOLDS), (100, 10, FAILS)):
        right = torch.stack([torch.ones(n, dtype=torch.bool), torch.arange(n) < left])
        one = Outcomes([0, 1], right, torch.zeros_like(right), torch.arange(n))
        found = verdicts({"DNN": one, "NR": one, "DNR": one})
        assert [value for key, value in found.items() if "no accuracy" in key] == [verdict]


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [((99, 88, 89), HOLDS), ((99, 88, 99), PARTLY), ((99, 95, 95), OPEN), ((80, 95, 95), FAILS)],
)
def test_without_attack_all_test_images_count(counts, verdict):
    clean = {
        name: torch.arange(N) < count
        for name, count in zip(("DNN", "NR", "DNR"), counts, strict=True)
    }
    found = verdicts(AS_THE_PAPER, clean=clean)
    assert [value for key, value in found.items() if "without attack" in key] == [verdict]


def test_five_samples_that_differ_decide_nothing_and_six_do():
    for more, verdict in ((5, OPEN), (6, HOLDS)):
        close = {**AS_THE_PAPER, "DNR": outcomes([89, 40 + more, 0], [10, 34, 0])}
        found = verdicts(close)
        assert found["under attack, DNR is slightly more accurate than NR"] == verdict


def test_an_image_that_several_runs_draw_counts_once():
    """Six of them decide; one image six times, or three twice, does not."""
    for images, verdict in (([0, 1, 2, 3, 4, 5], HOLDS), ([0] * 6, OPEN), ([0, 1, 2] * 2, OPEN)):
        drawn = torch.arange(N)
        drawn[:6] = torch.tensor(images)
        right = torch.ones(2, N, dtype=torch.bool)
        behind = right & (torch.arange(N) >= 6)
        none = torch.zeros_like(right)
        nr, dnr = Outcomes([0, 1], behind, none, drawn), Outcomes([0, 1], right, none, drawn)
        found = verdicts({"DNN": nr, "NR": nr, "DNR": dnr})
        assert found["under attack, DNR is slightly more accurate than NR"] == verdict


def test_a_difference_that_is_certain_to_be_small_fails_a_claim():
    n = 4000
    order = torch.arange(n)
    none = torch.stack([order < 0] * 2)
    one = Outcomes([0, 1], torch.stack([order < 3600, order < 2000]), none, order)
    two = Outcomes([0, 1], torch.stack([order < 3600, order < 2002]), none, order)
    found = verdicts({"DNN": one, "NR": one, "DNR": two}, at=(1,))
    assert found["under attack, DNR is slightly more accurate than NR"] == FAILS


def test_the_numbers_of_a_claim_are_those_of_the_outcomes():
    claims = {
        c.claim: c.numbers for c in judge_claims(CLEAN, torch.arange(N), AS_THE_PAPER, (1,), None)
    }
    told = claims["under attack, DNR is slightly more accurate than NR"]
    assert told == "accuracy in percent: 60.0 against 40.0 at 1, 0.0 against 0.0 at 2 (ahead at 1)"


def test_gather_counts_a_reject_as_an_error_without_attack_and_as_right_under_it():
    class Run:
        eps = (0.0, 1.0)
        labels = torch.tensor([0, 1, 2])
        predictions = torch.tensor([[0, -1, 1], [0, -1, 1]])

    found = paper_claims.gather([Run(), Run()], [torch.tensor([7, 8, 9]), torch.tensor([1, 8, 2])])
    assert found.images.tolist() == [7, 8, 9, 1, 8, 2]
    assert found.right.tolist() == [[True, False, False] * 2, [True, True, False] * 2]
    assert found.rejected.tolist() == [[False, True, False] * 2] * 2


def test_the_trade_is_judged_by_the_ends_of_the_sweep_if_attacked_again():
    def sweep(low, high, again):
        def entry(value):
            return {"value": value, "low": value - 0.05, "high": value + 0.05}

        row = [[entry(low), entry(high)]]
        return {
            "eps": [1],
            "accuracy": row,
            "reattacked_accuracy": row if again else None,
            "false_rejection_rate": [entry(0.05), entry(0.4)],
        }

    key = "a higher theta buys accuracy under attack for clean samples rejected"
    for ends, again, verdict in (
        ((0.2, 0.6), True, HOLDS),
        ((0.5, 0.55), True, OPEN),
        ((0.2, 0.6), False, OPEN),
    ):
        sweeps = {"NR": sweep(*ends, again), "DNR": sweep(*ends, again)}
        assert verdicts(AS_THE_PAPER, sweeps=sweeps)[key] == verdict


@pytest.fixture(scope="module")
def digits():
    data = load_dataset("mnist-5k")
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    train, test = order[:4000], order[4000:]
    return Dataset(
        "mnist",
        data.classes,
        data.images_train[train],
        data.labels_train[train],
        data.images_train[test],
        data.labels_train[test],
    )


def small_protocol():
    training = TrainingSettings(
        epochs=2, lr=0.05, momentum=0.9, batch_size=64, schedule="one-cycle"
    )
    later = replace(paper_settings.MNIST.variants["later"], trainings=(training,))
    return replace(
        paper_settings.MNIST,
        variants={"later": later},
        runs=2,
        network_samples=600,
        svm_samples=200,
        threshold_samples=60,
        test_samples=80,
        attacked=4,
        eps=(0, 1, 4),
        sweep_eps=(1, 4),
        nr_rejects_more_at=(1,),
        attacks=("line-search-pgd",),
    )


def make(digits, folder, results, protocol=None):
    protocol = protocol or small_protocol()
    study = paper_study.Study(protocol, digits, folder, torch.device("cpu"), False)
    study.claim_folder()
    for variant in protocol.variants:
        for run in range(protocol.runs):
            paper_run.finish(study, variant, run, reattack=False)
    text = paper_report.write_report(study, "small", results)
    return study, text, read_json(results / "small.json")


@pytest.fixture(scope="module")
def small(digits, tmp_path_factory):
    folder, results = (tmp_path_factory.mktemp(name) for name in ("study", "results"))
    return *make(digits, folder, results), results


def test_the_same_command_gives_the_same_numbers(small, digits, tmp_path):
    *_, content, results = small
    _, _, again = make(digits, tmp_path / "study", tmp_path)
    content, again = ({k: v for k, v in one.items() if k != "cost"} for one in (content, again))
    assert again == content
    figures = {path.name for path in results.glob("*.png")}
    assert figures == {f"small-later-fig{number}.png" for number in (3, 4, 5)}


def test_the_networks_and_layers_of_cifar10_with_a_search(digits, tmp_path):
    """The paper's variant, on digits that are made as large and as colourful as its images."""

    def enlarged(images):
        return torch.nn.functional.pad(images, (2, 2, 2, 2)).repeat(1, 3, 1, 1)

    data = replace(
        digits,
        images_train=enlarged(digits.images_train),
        images_test=enlarged(digits.images_test),
    )
    training = paper_settings.QUICK_TRAININGS["cifar10"][0]
    trainings = replace(training, epochs=2), replace(training, epochs=1, lr=0.01)
    protocol = replace(
        paper_settings.CIFAR10,
        variants={"paper": replace(paper_settings.CIFAR10.variants["paper"], trainings=trainings)},
        runs=1,
        network_samples=400,
        svm_samples=100,
        threshold_samples=40,
        test_samples=40,
        attacked=2,
        eps=(0, 0.2),
        sweep_eps=(0.2,),
        nr_rejects_more_at=(0.2,),
        attacks=("line-search-pgd",),
    )
    _, text, content = make(data, tmp_path / "study", tmp_path / "results", protocol)
    assert "CIFAR10Net, 2 + 1 epochs on 400 images" in text
    (clean,) = content["variants"]["paper"]["clean"]
    assert set(clean["DNR"]["selection"]) == {*protocol.variants["paper"].layers, "combiner"}
    assert clean["DNR"]["support_vectors"]["combiner"] > 0
    last = protocol.variants["paper"].layers[-1]
    assert clean["NR"]["selection"] == {last: clean["DNR"]["selection"][last]}
    assert "search" in content["cost"]["paper"]["DNR"]
    assert content["code"] == [paper_study.code_digest()]


def test_pieces_of_changed_code_are_told(small, digits, tmp_path, monkeypatch):
    study, *_ = small
    copy = replace(study, folder=tmp_path / "copy")
    shutil.copytree(study.folder, copy.folder)
    run = paper_study.run_folder(copy, "later", 1)
    (run / "results.json").unlink()
    for checkpoint in run.glob("attack-dnr*"):
        checkpoint.unlink()
    monkeypatch.setattr(paper_study, "code_digest", lambda: "other")
    paper_run.finish(copy, "later", 1, reattack=False)
    text = paper_report.write_report(copy, "small", tmp_path)
    assert "pieces made by 2 versions of the code" in text
    assert "other" in read_json(tmp_path / "small.json")["code"]


def test_a_variant_of_other_settings_is_left_out_visibly(digits, tmp_path):
    later = small_protocol().variants["later"]
    both = replace(small_protocol(), variants={"later": later, "second": later}, runs=1)
    study, *_ = make(digits, tmp_path / "study", tmp_path, both)
    fewer = replace(study, protocol=replace(both, attacked=2))
    paper_run.finish(fewer, "later", 0, reattack=False)
    with pytest.raises(ValueError, match="another attack"):
        paper_report.write_report(fewer, "fewer", tmp_path)
    with pytest.warns(UserWarning, match="leaves out second: .* another attack"):
        paper_report.write_report(fewer, "fewer", tmp_path, ["later"])
    assert list(read_json(tmp_path / "fewer.json")["variants"]) == ["later"]


def test_what_is_done_is_not_done_again(small, monkeypatch):
    study, *_ = small

    def never(*_args, **_options):
        raise AssertionError("made again")

    for name in ("train_network", "security_evaluations", "threshold_sweep"):
        monkeypatch.setattr(paper_run, name, never)
    monkeypatch.setattr(paper_run.DNR, "fit", never)
    paper_run.finish(study, "later", 0, reattack=False)


def test_a_run_that_was_stopped_goes_on(digits, tmp_path, small, monkeypatch):
    """Stopped within an attack, it repeats neither the training nor the eps that were done."""
    *_, content, _ = small
    study = paper_study.Study(small_protocol(), digits, tmp_path, torch.device("cpu"), False)
    study.claim_folder()
    build, calls = paper_run.build_line_up, []

    class Stop(Exception):
        pass

    def adapted(stop_after):
        def built(*arguments, **options):
            found = build(*arguments, **options)
            return {name: replace(one, run=counted(one.run)) for name, one in found.items()}

        def counted(run):
            def called(*arguments):
                if len(calls) == stop_after:
                    raise Stop
                calls.append(arguments[3])
                return run(*arguments)

            return called

        return built

    monkeypatch.setattr(paper_run, "build_line_up", adapted(4))
    with pytest.raises(Stop):
        paper_run.finish(study, "later", 0, reattack=False)
    assert len(calls) == 4
    monkeypatch.setattr(paper_run, "build_line_up", adapted(10**6))
    monkeypatch.setattr(paper_run, "train_network", None)
    paper_run.finish(study, "later", 0, reattack=False)
    assert calls[4:] == [4]  # all that was missing: the larger eps of DNR
    curves, settings = paper_report.load_results(
        paper_study.run_folder(study, "later", 0) / "results.json"
    )
    assert (
        paper_report._without(settings["clean"], "right")
        == content["variants"]["later"]["clean"][0]
    )
    accuracy = content["variants"]["later"]["curves"][WORST]["DNR"]["accuracy"]
    assert curves["DNR"].accuracy == accuracy["runs"][0]


def test_every_stage_has_its_cost(small):
    _, _, content, _ = small
    cost = content["cost"]["later"]
    attacks = {"attack", "attack: line-search PGD"}
    assert set(cost["DNN"]) == {"network", *attacks}
    both = {"features", "fit", "threshold", "theta sweep", *attacks}
    assert set(cost["NR"]) == both
    assert set(cost["DNR"]) == both | {"stacking"}
    assert all(entry["seconds"] > 0 for entry in cost["DNR"]["attack"])


def test_the_text_tells_verdicts_and_rates(small):
    _, text, content, _ = small
    assert "later: network, layers and hyper-parameters" in text
    claims = content["variants"]["later"]["claims"][WORST]
    assert len(claims) == 8
    assert all(claim["verdict"] in (HOLDS, PARTLY, FAILS, OPEN) for claim in claims)
    assert "2 runs of 2" in text


def test_the_samples_of_a_run_are_disjoint_and_differ_between_runs(digits, tmp_path):
    # Every image carries its row in its first two pixels.
    rows = torch.arange(4000)
    marked = torch.zeros(4000, 1, 28, 28, dtype=torch.uint8)
    marked[:, 0, 0, 0], marked[:, 0, 0, 1] = rows // 256, rows % 256
    test = marked[:1000].clone()
    test[:, 0, 0, 2] = 255
    data = replace(digits, images_train=marked, images_test=test)
    study = paper_study.Study(small_protocol(), data, tmp_path, torch.device("cpu"), progress=False)

    def names(images):
        pixels = (255 * images[:, 0, 0, :3]).round().long()
        return {tuple(row) for row in pixels.tolist()}

    network = names(data.select(study.network_rows())[0])
    found = [{key: names(x) for key, (x, _) in study.samples(run).items()} for run in (0, 1)]
    for parts in found:
        sets = [network, *parts.values()]
        sizes = {"svm": 200, "threshold": 60, "test": 80}
        assert {key: len(value) for key, value in parts.items()} == sizes
        assert len(set.union(*sets)) == sum(map(len, sets))
        assert all(marker == 255 for *_, marker in parts["test"])
        assert all(marker == 0 for *_, marker in parts["threshold"])
    assert all(found[0][key] != found[1][key] for key in found[0])


def test_a_folder_of_other_experiments_is_refused(small, digits):
    study, *_ = small
    other = replace(study, protocol=replace(study.protocol, svm_samples=100))
    with pytest.raises(ValueError, match="other svm_samples"):
        other.claim_folder()


def test_other_attacks_keep_the_classifiers_and_are_made_anew(small, monkeypatch):
    study, *_ = small
    other = replace(study, protocol=replace(study.protocol, attacked=3))
    other.claim_folder()

    class Attacked(Exception):
        pass

    def attacked(*_args, **_options):
        raise Attacked

    monkeypatch.setattr(paper_run, "security_evaluations", attacked)
    with pytest.raises(Attacked):
        paper_run.finish(other, "later", 0, reattack=False)
    with pytest.raises(ValueError, match="another attack"):
        paper_report.write_report(other, "none", study.folder / "none")


def test_a_run_copied_under_another_number_is_refused(small, tmp_path):
    study, *_ = small
    shutil.copytree(study.folder, tmp_path / "copy")
    copy = replace(study, folder=tmp_path / "copy")
    shutil.rmtree(paper_study.run_folder(copy, "later", 1))
    shutil.copytree(
        paper_study.run_folder(copy, "later", 0), paper_study.run_folder(copy, "later", 1)
    )
    with pytest.raises(ValueError, match="another run"):
        paper_report.write_report(copy, "none", tmp_path)


def test_nothing_complete_is_an_error(small, tmp_path):
    study, *_ = small
    with pytest.raises(ValueError, match="no run"):
        paper_report.write_report(replace(study, folder=tmp_path), "none", tmp_path)


def test_errors_are_one_line_for_the_user(capsys):
    assert paper.main(["mnist", "--runs", "7", "--quiet"]) == 2
    assert capsys.readouterr().err == "error: --runs must be in 0..4, got [7]\n"


def test_options_reach_the_protocol():
    def settled(*arguments):
        return paper.settle(paper.make_parser().parse_args(arguments))

    full, short = settled("mnist"), settled("mnist", "--quick")
    assert (full.runs, full.svm_samples, full.attacked) == (5, 10_000, 1_000)
    assert (short.runs, short.svm_samples) == (5, 2_000)
    assert [one.epochs for one in full.variants["paper"].trainings] == [50]
    changed = settled("cifar10", "--epochs", "20", "4", "--attacked", "30", "--attack", "fmn")
    trainings = changed.variants["paper"].trainings
    assert [(one.epochs, one.lr, one.schedule) for one in trainings] == [
        (20, 0.05, "one-cycle"),
        (4, 0.02, "one-cycle"),
    ]
    assert (changed.attacked, changed.attacks) == (30, ("line-search-pgd", "fmn"))
    with pytest.raises(ValueError, match=r"0\.\.4"):
        settled("mnist", "--runs", "5")
    with pytest.raises(ValueError, match=r"1\.\.1000"):
        settled("mnist", "--attacked", "-5")
    with pytest.raises(ValueError, match="paper, later"):
        settled("mnist", "--variants", "first")


@pytest.mark.parametrize(
    "path", sorted((BENCHMARKS / "results/paper").glob("[mc]*.json")), ids=lambda path: path.stem
)
def test_the_readme_has_the_committed_numbers(path):
    begin, end = paper_report.markers(path.stem)
    section = paper_report.readme_section(path.stem, read_json(path))
    assert f"{begin}\n{section}\n{end}" in (BENCHMARKS.parent / "README.md").read_text()


MNIST_RESULTS = sorted((BENCHMARKS / "results/paper").glob("mnist*.json"))


@pytest.mark.xfail(
    reason="two of the five runs leave DNR 87.7 %, one of the later variant 87.6 %, and the later "
    "network is at 98.75 %",
    strict=True,
)
@pytest.mark.parametrize("path", MNIST_RESULTS, ids=lambda path: path.stem)
def test_the_committed_classifiers_of_mnist_are_good_enough_to_be_attacked(path):
    for found in read_json(path)["variants"].values():
        assert found["network"]["test_accuracy"] >= 0.988
        for run in found["clean"]:
            for name in ("NR", "DNR"):
                assert run[name]["accuracy"] >= 0.88
                assert 0.07 <= run[name]["rejection_rate"] <= 0.13


@pytest.mark.parametrize("path", MNIST_RESULTS, ids=lambda path: path.stem)
def test_on_average_the_committed_classifiers_of_mnist_are_good_enough(path):
    variants = read_json(path)["variants"]
    assert variants["paper"]["network"]["test_accuracy"] >= 0.988
    for found in variants.values():
        for name in ("NR", "DNR"):
            assert fmean(run[name]["accuracy"] for run in found["clean"]) >= 0.88
            assert all(0.07 <= run[name]["rejection_rate"] <= 0.13 for run in found["clean"])


def test_the_command_for_two_cores_took_fifteen_minutes_and_found_good_classifiers():
    found = read_json(BENCHMARKS / "results/mnist-quick-one-run.json")
    assert [environment["threads"] for environment in found["environments"]] == [2]
    seconds = sum(
        call["seconds"]
        for classifiers in found["cost"].values()
        for stages in classifiers.values()
        for stage, calls in stages.items()
        if not stage.startswith("attack: ")  # parts of "attack"
        for call in calls
    )
    assert seconds <= 20 * 60
    accuracies = []
    for variant in found["variants"].values():
        assert variant["runs"] == [0]
        assert variant["network"]["test_accuracy"] >= 0.988
        accuracies.append(variant["network"]["test_accuracy"])
        for name in ("NR", "DNR"):
            assert variant["clean"][0][name]["accuracy"] >= 0.88
            assert 0.07 <= variant["clean"][0][name]["rejection_rate"] <= 0.13
    told = " ".join((BENCHMARKS.parent / "README.md").read_text().split())
    networks = " and ".join(f"{100 * accuracy:.2f}" for accuracy in accuracies)
    assert f"{round(seconds / 60)} minutes on 2 cores" in told
    assert f"(networks {networks} % right)" in told


def test_a_section_of_the_readme_is_replaced_or_added_after_the_last():
    text = "a\n<!-- paper x: written by benchmarks/paper.py -->\nold\n<!-- end of paper x -->\nb\n"
    assert paper_report.with_section(text, "x", "new") == text.replace("old", "new")
    begin, end = paper_report.markers("y")
    added = paper_report.with_section(text, "y", "more")
    assert added == text.replace("b\n", f"\n{begin}\nmore\n{end}\nb\n")
    assert paper_report.with_section(added, "y", "less") == added.replace("more", "less")
    with pytest.raises(ValueError, match="no place"):
        paper_report.with_section("a\n", "x", "new")


CIFAR10_RESULTS = sorted((BENCHMARKS / "results/paper").glob("cifar10*.json"))


@pytest.mark.parametrize("path", CIFAR10_RESULTS, ids=lambda path: path.stem)
def test_the_committed_results_of_cifar10_tell_of_its_images_and_reject_a_tenth(path):
    found = read_json(path)
    assert "103 of the images" in found["protocol"]["note"]
    for variant in found["variants"].values():
        for run in variant["clean"]:
            assert all(0.07 <= run[name]["rejection_rate"] <= 0.13 for name in ("NR", "DNR"))


@pytest.mark.parametrize("path", CIFAR10_RESULTS, ids=lambda path: path.stem)
def test_the_network_of_cifar10_is_right_on_85_percent(path):
    for variant in read_json(path)["variants"].values():
        assert variant["network"]["test_accuracy"] >= 0.85
