"""The committed results: pages and README hold their numbers, and these are what they should be."""

import json
import re
import subprocess
from statistics import fmean

import pytest
import torch

from benchmarks.__main__ import find_page, index, page_text, result_names, summary
from benchmarks.common import RESULTS, ROOT
from benchmarks.training.report import DNR, END_TO_END, MAIN, PLAIN, ROBUST
from torchdnr.decisions import is_evasion
from torchdnr.evaluation import BOUNDARY_WALK, LINE_SEARCH_PGD, load_results

OTHER_NORM = "small, norm inf"
NAMES = result_names()
UNSTAMPED = {
    *("attack-cpu", "imagenette", "mnist-5k", "scale", "secml-cpu"),
    *("paper/cifar10-quick", "paper/fig2", "paper/mnist-quick", "paper/mnist-quick-one-run"),
}
"""Results made before they had to name their code, or by code with changes; to be made anew."""


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


# --- pages ---


@pytest.mark.parametrize("name", NAMES)
def test_a_page_holds_the_numbers_of_its_result(name):
    assert (RESULTS / f"{name}.md").read_text() == page_text(name), "run `python -m benchmarks`"


def test_the_table_of_the_readme_and_the_index_hold_the_results():
    assert len(NAMES) == 19
    assert f"\n{summary('benchmarks/results/')}\n" in (ROOT / "README.md").read_text()
    assert (RESULTS / "README.md").read_text() == index()


def test_the_head_of_the_readme_holds_the_record_of_training():
    head = " ".join((ROOT / "README.md").read_text().partition("## Try it")[0].split())
    small, other = (read("training-cpu")["studies"][key]["seeds"] for key in (MAIN, OTHER_NORM))
    names = {"DNR": DNR, "bare": PLAIN, "robust": ROBUST, "end": END_TO_END}
    runs = {key: [seed[name] for seed in small.values()] for key, name in names.items()}
    norm = {key: fmean(run["median"] for run in each) for key, each in runs.items()}
    right = {key: fmean(run["right"] for run in each) for key, each in runs.items()}
    assert f"l2 norm of {norm['DNR']:.2f}, and a bare network by {norm['bare']:.2f}." in head
    assert f"takes {norm['robust']:.2f}, DNR end to end {norm['end']:.2f}, both right" in head
    assert f"{right['robust']:.0%}" == f"{right['end']:.0%}" == "89%" and "on 89 % of" in head
    assert f"(DNR: {100 * right['DNR']:.0f} %)" in head
    rejected = {
        name: fmean(100 * share for _, share in other["0"][name]["examined"]["corrupted"].values())
        for name in (ROBUST, DNR)
    }
    assert f"{rejected[ROBUST]:.0f} % of corrupted digits" in head
    assert f"DNR: {rejected[DNR]:.0f} %)." in head


def test_every_page_has_a_result_and_every_figure_is_shown():
    pages = {p.relative_to(RESULTS).with_suffix("").as_posix() for p in RESULTS.rglob("*.md")}
    assert pages == {*NAMES, "README"}
    text = "".join(path.read_text() for path in RESULTS.rglob("*.md"))
    for path in RESULTS.rglob("*.[pj][np]g"):
        assert f"({path.name})" in text
        assert path.stat().st_size < 2_000_000


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted(RESULTS.rglob("*.md"))], ids=lambda path: path.stem
)
def test_the_files_that_a_page_links_to_exist(path):
    links = re.findall(r"\]\((?!http)([^)]+)\)", path.read_text())
    assert links
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_a_result_without_a_page_is_refused():
    with pytest.raises(ValueError, match=r"no page for new-cpu\.json; add one of: mnist-5k"):
        find_page("new-cpu")


def commits_of(content):
    """Yield every commit that is named anywhere in a result."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from [value] if key == "commit" else commits_of(value)
    elif isinstance(content, list):
        for value in content:
            yield from commits_of(value)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xfail(strict=True)) if name in UNSTAMPED else name
        for name in NAMES
    ],
)
def test_a_result_names_the_clean_commit_of_its_code_in_the_history_of_this_one(name):
    commits = set(commits_of(read(name)))
    assert commits and None not in commits
    assert not [commit for commit in commits if commit.endswith("-dirty")]
    shallow = subprocess.run(
        ["git", "rev-parse", "--is-shallow-repository"], cwd=ROOT, capture_output=True, check=False
    )
    if shallow.stdout.strip() == b"false":  # neither without git, nor without its history
        for commit in commits:
            command = ["git", "merge-base", "--is-ancestor", commit, "HEAD"]
            assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0, commit


# --- runs of attack.py ---


@pytest.mark.parametrize("name", ["mnist-5k", "imagenette"])
def test_in_a_recorded_run_the_worst_case_holds_every_attack(name):
    curves, _ = load_results(RESULTS / f"{name}.json")
    assert set(curves) == {"DNN", "NR", "DNR"}
    for curve in curves.values():
        assert {*curve.attacks, *curve.refinements} == {LINE_SEARCH_PGD, BOUNDARY_WALK, "APGD"}
        for attack in curve.attacks.values():
            for eps, worst, alone in zip(
                curve.eps, curve.predictions, attack.predictions, strict=True
            ):
                if eps > 0:
                    harmful = is_evasion(torch.as_tensor(alone), curve.labels)
                    assert is_evasion(torch.as_tensor(worst), curve.labels)[harmful].all()


def test_the_photographs_have_their_full_size():
    assert read("imagenette")["settings"]["run"]["image_shape"] == [3, 224, 224]


def test_recorded_attacks_of_other_libraries_evade_three_digits_that_ours_does_not():
    records = read("peers-cpu")["classifiers"]
    assert list(records) == ["DNN", "NR", "DNR", "robust network", "robust DNR"]
    missed = set()
    for name, record in records.items():
        assert len(record["peers"]) == 10
        for peer, entry in record["peers"].items():
            assert entry["table"].keys() == record["ours"].keys() == {"1", "1.5", "2", "2.5"}
            for eps, row in entry["table"].items():
                missed |= {(name, peer, eps, sample) for sample in row["peer_only"]}
    assert missed == {
        ("NR", "AutoAttack apgd-t", "1.5", 16),
        ("DNR", "AutoAttack apgd-t", "2", 28),
        ("robust network", "AutoAttack fab", "1.5", 16),
    }


# --- poisoning ---


def test_recorded_points_that_follow_gradients_harm_more_than_chance_in_all_runs():
    classifiers, missed = read("poisoning-cpu")["classifiers"], []
    assert {name: len(runs["0.05"]) for name, runs in classifiers.items()} == (
        dict.fromkeys(["DNN", "NR", "DNR"], 3)
    )
    for name, shares in classifiers.items():
        for share in ("0.01", "0.02", "0.05", "0.1"):
            for number, run in enumerate(shares[share]):
                accuracy = {kind: entry["accuracy"] for kind, entry in run["kinds"].items()}
                if accuracy["moved points"] >= min(
                    accuracy["random labels"], accuracy["random points"]
                ):
                    missed.append((name, share, number))
    assert missed == [("NR", "0.02", 0)]  # 10 points, which the page tells


# --- cost ---


def test_the_committed_forward_passes_are_of_a_clean_commit_and_right():
    result = read("forward-cpu")
    assert result["commit"] and not result["commit"].endswith("-dirty")
    assert result["settings"]["vectors"] == 5_000
    measured = {(case["network"], case["classes"]) for case in result["cases"]}
    assert {("squeezenet1_1", 10), ("squeezenet1_1", 1_000)} <= measured
    others = {"mobilenet_v3_small", "MNISTNet", "CIFAR10Net", "resnet18"}
    assert others <= {name for name, _ in measured}
    for case in result["cases"]:
        assert case["errors"]["scores"] < 1e-4 and case["errors"]["gradient"] < 1e-3
        assert set(case["batches"]) == {"1", "32"}
        for entry in case["batches"].values():
            assert entry["compiled_difference"]["scores"] < 1e-5
            # Of the whole network: one ReLU or max-pooling that rounding turns over shows in it.
            assert entry["compiled_difference"]["gradient"] < 0.1


def test_the_committed_fits_stay_inside_their_memory():
    sections = read("scale")["sections"]
    assert max(entry["n"] for entry in sections["layer"].values()) >= 100_000
    assert max(entry["classes"] for entry in sections["classes"].values()) >= 1_000
    for section in sections.values():
        for entry in section.values():
            assert entry["not_converged"] == 0
            assert entry["peak_memory_mib"] < 8 * 1024


def test_every_recorded_compression_shows_its_losses_beside_the_original():
    result = read("compress-cpu")
    models, samples = result["models"], result["settings"]["samples"]
    assert {entry["of"] for entry in models.values()} == {"DNR", "NR"}
    rows = page_text("compress-cpu").splitlines()
    for name, entry in models.items():
        attack = entry["attack"]
        assert len(attack["attacks"]) == 3  # never one alone
        assert all(len(row) == samples for row in attack["predictions"])
        (row,) = (row for row in rows if row.startswith(f"| {name} |"))
        assert all(f"| {100 * rate:.0f} |" in row for rate in attack["accuracy"][1:])
        if entry["factor"] > 1:
            original = models[entry["of"]]
            assert entry["losses"]["test"].keys() == original["vectors"].keys()
            assert entry["total_vectors"] < 1.1 * original["total_vectors"] / entry["factor"]
            changed = attack["newly_evaded"], attack["no_longer_evaded"]
            for index_, (new, gone) in enumerate(zip(*changed, strict=True)):
                share = attack["evasion_rate"][index_] - original["attack"]["evasion_rate"][index_]
                assert new - gone == round(samples * share)


# --- the paper's experiments ---


@pytest.mark.xfail(
    reason="two of the five runs leave DNR 87.7 %, one of the later variant 87.6 %, and the later "
    "network is at 98.75 %",
    strict=True,
)
def test_the_committed_classifiers_of_mnist_are_good_enough_to_be_attacked():
    for found in read("paper/mnist-quick")["variants"].values():
        assert found["network"]["test_accuracy"] >= 0.988
        for run in found["clean"]:
            for name in ("NR", "DNR"):
                assert run[name]["accuracy"] >= 0.88
                assert 0.07 <= run[name]["rejection_rate"] <= 0.13


def test_on_average_the_committed_classifiers_of_mnist_are_good_enough():
    variants = read("paper/mnist-quick")["variants"]
    assert variants["paper"]["network"]["test_accuracy"] >= 0.988
    for found in variants.values():
        for name in ("NR", "DNR"):
            assert fmean(run[name]["accuracy"] for run in found["clean"]) >= 0.88
            assert all(0.07 <= run[name]["rejection_rate"] <= 0.13 for run in found["clean"])


def test_the_command_for_two_cores_took_fifteen_minutes_and_found_good_classifiers():
    found = read("paper/mnist-quick-one-run")
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
    networks = " and ".join(f"{100 * accuracy:.2f}" for accuracy in accuracies)
    text = find_page("paper/mnist-quick-one-run").headline(found)
    assert f"{round(seconds / 60)} minutes on 2 cores (networks {networks} % right)" in text


def test_the_committed_classifiers_of_cifar10_reject_a_tenth_and_their_images_are_described():
    found = read("paper/cifar10-quick")
    assert "103 of the images" in found["protocol"]["note"]
    for variant in found["variants"].values():
        assert variant["network"]["test_accuracy"] >= 0.85
        for run in variant["clean"]:
            assert all(0.07 <= run[name]["rejection_rate"] <= 0.13 for name in ("NR", "DNR"))
