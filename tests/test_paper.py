"""The repetition of the paper's experiments: the protocol, small."""

import shutil
from dataclasses import replace

import pytest
import torch

from benchmarks.paper import __main__ as paper
from benchmarks.paper import merge, settings
from benchmarks.paper import run as runs
from benchmarks.paper.claims import FAILS, HOLDS, OPEN, PARTLY
from benchmarks.paper.report import WORST, one_run_page, page
from torchdnr.data import Dataset, load_dataset
from torchdnr.evaluation import build_line_up, load_results
from torchdnr.files import read_json
from torchdnr.models.training import TrainingSettings


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
    later = replace(settings.MNIST.variants["later"], trainings=(training,))
    return replace(
        settings.MNIST,
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
    study = runs.Study(protocol, digits, folder, torch.device("cpu"), False)
    study.claim_folder()
    for variant in protocol.variants:
        for run in range(protocol.runs):
            runs.finish(study, variant, run, reattack=False)
    text = merge.write_report(study, "small", results)
    return study, text, read_json(results / "small.json")


@pytest.fixture(scope="module")
def small(digits, tmp_path_factory):
    folder, results = (tmp_path_factory.mktemp(name) for name in ("study", "results"))
    return *make(digits, folder, results), results


@pytest.mark.slow
def test_the_same_command_gives_the_same_numbers(small, digits, tmp_path):
    *_, content, results = small
    _, _, again = make(digits, tmp_path / "study", tmp_path)
    content, again = ({k: v for k, v in one.items() if k != "cost"} for one in (content, again))
    assert again == content
    figures = {path.name for path in results.glob("*.png")}
    assert figures == {f"small-later-fig{number}.png" for number in (3, 4, 5)}


@pytest.mark.slow
def test_the_networks_and_layers_of_cifar10_with_a_search(digits, tmp_path):
    """The paper's variant, on digits that are made as large and as colourful as its images."""

    def enlarged(images):
        return torch.nn.functional.pad(images, (2, 2, 2, 2)).repeat(1, 3, 1, 1)

    data = replace(
        digits,
        images_train=enlarged(digits.images_train),
        images_test=enlarged(digits.images_test),
    )
    training = settings.QUICK_TRAININGS["cifar10"][0]
    trainings = replace(training, epochs=2), replace(training, epochs=1, lr=0.01)
    protocol = replace(
        settings.CIFAR10,
        variants={"paper": replace(settings.CIFAR10.variants["paper"], trainings=trainings)},
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
    assert content["code"] == [runs.code_digest()]


@pytest.mark.slow
def test_pieces_of_changed_code_are_counted(small, tmp_path):
    study, *_ = small
    copy = replace(study, folder=tmp_path / "copy", code="other")
    shutil.copytree(study.folder, copy.folder)
    run = runs.run_folder(copy, "later", 1)
    (run / "results.json").unlink()
    for checkpoint in run.glob("attack-dnr*"):
        checkpoint.unlink()
    runs.finish(copy, "later", 1, reattack=False)
    text = merge.write_report(copy, "small", tmp_path)
    assert "pieces made by 2 versions of the code" in text
    assert "other" in read_json(tmp_path / "small.json")["code"]


@pytest.mark.slow
def test_a_variant_of_other_settings_is_left_out_visibly(digits, tmp_path):
    later = small_protocol().variants["later"]
    both = replace(small_protocol(), variants={"later": later, "second": later}, runs=1)
    study, *_ = make(digits, tmp_path / "study", tmp_path, both)
    fewer = replace(study, protocol=replace(both, attacked=2))
    runs.finish(fewer, "later", 0, reattack=False)
    with pytest.raises(ValueError, match="another attack"):
        merge.write_report(fewer, "fewer", tmp_path)
    with pytest.warns(UserWarning, match="leaves out second: .* another attack"):
        merge.write_report(fewer, "fewer", tmp_path, ["later"])
    assert list(read_json(tmp_path / "fewer.json")["variants"]) == ["later"]


@pytest.mark.slow
def test_what_is_done_is_not_done_again(small):
    study, *_ = small

    def files():
        return {p: p.stat().st_mtime_ns for p in study.folder.rglob("*") if p.is_file()}

    def never(*_arguments, **_options):
        raise AssertionError("attacked again")

    before = files()  # every stage that runs adds to a file of costs
    runs.finish(replace(study, make_line_up=never), "later", 0, reattack=False)
    assert files() == before


class Stop(Exception):
    pass


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(digits, tmp_path, small):
    """Stopped within an attack, it repeats neither the training nor the eps that were done."""
    *_, content, _ = small
    calls = []

    def stopping(after):
        def built(*arguments, **options):
            line_up = build_line_up(*arguments, **options)
            return {name: replace(one, run=counted(one.run)) for name, one in line_up.items()}

        def counted(run):
            def called(*arguments, **given):
                if len(calls) == after:
                    raise Stop
                calls.append(arguments[3])
                return run(*arguments, **given)

            return called

        return built

    device = torch.device("cpu")
    study = runs.Study(small_protocol(), digits, tmp_path, device, False, make_line_up=stopping(4))
    study.claim_folder()
    with pytest.raises(Stop):
        runs.finish(study, "later", 0, reattack=False)
    assert len(calls) == 4
    (training,) = study.folder.glob("*Net-costs.json")
    spent = read_json(training)
    study = replace(study, make_line_up=stopping(10**6))
    runs.finish(study, "later", 0, reattack=False)
    assert calls[4:] == [4]  # all that was missing: the larger eps of DNR
    assert read_json(training) == spent  # not trained again
    curves, found = load_results(runs.run_folder(study, "later", 0) / "results.json")
    clean = {
        name: {key: value for key, value in entry.items() if key != "right"}
        for name, entry in found["clean"].items()
    }
    assert clean == content["variants"]["later"]["clean"][0]
    accuracy = content["variants"]["later"]["curves"][WORST]["DNR"]["accuracy"]
    assert curves["DNR"].accuracy == accuracy["runs"][0]


@pytest.mark.slow
def test_every_stage_has_its_cost(small):
    _, _, content, _ = small
    cost = content["cost"]["later"]
    attacks = {"attack", "attack: line-search PGD"}
    assert set(cost["DNN"]) == {"network", *attacks}
    both = {"features", "fit", "threshold", "theta sweep", *attacks}
    assert set(cost["NR"]) == both
    assert set(cost["DNR"]) == both | {"stacking"}
    assert all(entry["seconds"] > 0 for entry in cost["DNR"]["attack"])


@pytest.mark.slow
def test_the_text_holds_verdicts_and_rates(small):
    _, text, content, _ = small
    for markdown in (page(content), one_run_page(content)):
        assert "2 runs of 2" in markdown
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
    study = runs.Study(small_protocol(), data, tmp_path, torch.device("cpu"), progress=False)

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


@pytest.mark.slow
def test_a_folder_of_other_experiments_is_refused(small, digits):
    study, *_ = small
    other = replace(study, protocol=replace(study.protocol, svm_samples=100))
    with pytest.raises(ValueError, match="other svm_samples"):
        other.claim_folder()


@pytest.mark.slow
def test_other_attacks_keep_the_classifiers_and_are_made_anew(small):
    study, *_ = small

    def attacked(*_arguments, **_options):
        raise Stop

    protocol = replace(study.protocol, attacked=3)
    other = replace(study, protocol=protocol, make_line_up=attacked)
    other.claim_folder()
    with pytest.raises(Stop):
        runs.finish(other, "later", 0, reattack=False)
    with pytest.raises(ValueError, match="another attack"):
        merge.write_report(other, "none", study.folder / "none")


@pytest.mark.slow
def test_a_run_copied_under_another_number_is_refused(small, tmp_path):
    study, *_ = small
    shutil.copytree(study.folder, tmp_path / "copy")
    copy = replace(study, folder=tmp_path / "copy")
    shutil.rmtree(runs.run_folder(copy, "later", 1))
    shutil.copytree(runs.run_folder(copy, "later", 0), runs.run_folder(copy, "later", 1))
    with pytest.raises(ValueError, match="another run"):
        merge.write_report(copy, "none", tmp_path)


@pytest.mark.slow
def test_nothing_complete_is_an_error(small, tmp_path):
    study, *_ = small
    with pytest.raises(ValueError, match="no run"):
        merge.write_report(replace(study, folder=tmp_path), "none", tmp_path)


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
