"""Pages and tables of the paper's experiments."""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from benchmarks.common import Page, machine, table
from torchdnr.evaluation.line_up import ATTACKS

WORST, ALONE = "our line-up", "the paper's attack"
PLURAL = {
    "holds": "hold",
    "holds partly": "hold partly",
    "does not hold": "do not hold",
    "cannot be told": "undecided",
}
INTRODUCTION = """\
`python -m benchmarks.paper {dataset}` repeats the experiments of Sotgiu et al.: networks, 5 runs
with other samples, hyper-parameters by 5-fold cross-validation, theta on images that serve for
nothing else, attacks of growing size, Figs. 3 to 6, and every claim of the paper, under the paper's
attack and under our line-up. It goes on where it was stopped, and machines can share the runs.
These are runs of `--quick`, which has fewer samples; the 5 runs of 1,000 attacked images each are
not recorded.

So few samples cannot show everything, and the verdicts say so: an exact sign test over the images,
at 5 % over all eps of a claim; that no accuracy is left is believed where its 95 % interval ends
below 10 %. Cells are accuracy in percent on the attacked images, in brackets the share rejected; at
eps = 0 a reject is an error, under attack it is right."""


def page(content: Mapping[str, Any]) -> str:
    """Format one data set's numbers.

    Args:
        content: What ``write_report`` wrote.

    Returns:
        Markdown: for each variant the curves, the verdicts, the figures, numbers and costs.
    """
    dataset = content["protocol"]["dataset"]
    parts = [INTRODUCTION.format(dataset=dataset), ""]
    for variant, found in content["variants"].items():
        about = content["protocol"]["variants"][variant]["about"]
        parts += [f'## Variant "{variant}"', "", f"{about}. {_facts(content, variant)}", ""]
        parts += [_curve_table(found, "github"), "", _verdict_table(found, "github"), ""]
        parts += [*_figures(f"{dataset}-quick-{variant}", example_figure(content["protocol"])), ""]
        parts += ["### The numbers behind the verdicts", "", _number_table(found, "github"), ""]
        parts += ["### What each stage cost", "", _cost_table(content["cost"][variant], "github")]
        parts += ["", _notes(content, variant), ""]
    return _narrow("\n".join(parts).rstrip())


def headline(content: Mapping[str, Any]) -> str:
    """Count the verdicts on the paper's claims under our line-up."""
    parts = []
    for variant, found in content["variants"].items():
        verdicts = [claim["verdict"] for claim in found["claims"][WORST]]
        counts = [(verdicts.count(verdict), word) for verdict, word in PLURAL.items()]
        named = ", ".join(f"{count} {word}" for count, word in counts if count)
        parts.append(f"{variant} classifiers: {named}")
    return f"the paper's {len(verdicts)} claims under our attacks: {'; '.join(parts)}"


def one_run_page(content: Mapping[str, Any]) -> str:
    """Format what one run took from nothing.

    Args:
        content: What ``write_report`` wrote.

    Returns:
        Markdown: the command, its minutes, the networks, and what each stage cost.
    """
    protocol = content["protocol"]
    parts = [
        f"`python -m benchmarks.paper {protocol['dataset']} --quick` from nothing, with nothing "
        f"beside it: {_minutes(content):.0f} minutes on {machine(content['environments'][0])}.",
    ]
    for variant, found in content["variants"].items():
        parts += ["", f'## Variant "{variant}"', "", f"{_facts(content, variant)}", ""]
        parts += [
            _curve_table(found, "github"),
            "",
            _cost_table(content["cost"][variant], "github"),
        ]
    return _narrow("\n".join(parts))


def one_run_headline(content: Mapping[str, Any]) -> str:
    """Name the minutes, and how good the networks are."""
    networks = [found["network"]["test_accuracy"] for found in content["variants"].values()]
    right = " and ".join(f"{100 * accuracy:.2f}" for accuracy in networks)
    return (
        f"{_minutes(content):.0f} minutes on {content['environments'][0]['threads']} cores "
        f"(networks {right} % right)"
    )


def _minutes(content: Mapping[str, Any]) -> float:
    """Add up all stages; those of an attack alone are parts of "attack"."""
    return sum(
        call["seconds"] / 60
        for classifiers in content["cost"].values()
        for stages in classifiers.values()
        for stage, calls in stages.items()
        if not stage.startswith("attack: ")
        for call in calls
    )


def _narrow(text: str) -> str:
    """Drop the padding that lines up a table's columns: it only makes long lines."""
    return re.sub(r"(?<=\|)-+(?=\|)", "---", re.sub(r" {2,}", " ", text))


def example_figure(protocol: Mapping[str, Any]) -> int:
    """Choose which of the paper's figures shows the images: 5 for MNIST, 6 for CIFAR-10."""
    return 5 if protocol["dataset"] == "mnist" else 6


def _figures(name: str, number: int) -> list[str]:
    return [
        f"![Fig. 3: accuracy and rejection rate over eps]({name}-fig3.png)",
        "",
        f"[Fig. 4: accuracy over the false rejection rate]({name}-fig4.png), "
        f"[Fig. {number}: attacked images]({name}-fig{number}.png)",
    ]


def as_text(content: Mapping[str, Any]) -> str:
    """Format one data set's numbers for a terminal."""
    parts = []
    for variant, found in content["variants"].items():
        about = content["protocol"]["variants"][variant]["about"]
        parts += [f"{variant}: {about}", _facts(content, variant), ""]
        parts += [_curve_table(found, "simple"), ""]
        parts += [_verdict_table(found, "simple", width=60), ""]
        parts += [_number_table(found, "simple", width=44), ""]
        parts += [_cost_table(content["cost"][variant], "simple"), ""]
        parts += [_notes(content, variant), ""]
    return "\n".join(parts)


def _facts(content: Mapping[str, Any], variant: str) -> str:
    protocol, found = content["protocol"], content["variants"][variant]
    trainings = protocol["variants"][variant]["trainings"]
    epochs = " + ".join(str(training["epochs"]) for training in trainings)
    network, runs = found["network"], len(found["runs"])
    attacks = ", ".join(ATTACKS[name].label for name in protocol["attacks"])
    machines = "; ".join(
        f"{one['device']} ({one['threads']} threads), torch {one['torch']}"
        for one in content["environments"]
    )
    text = (
        f"{runs} run{'s' * (runs > 1)} of {protocol['runs']}; {protocol['svm_samples']:,} images "
        f"for the SVMs, {protocol['threshold_samples']:,} for theta, {protocol['attacked']:,} "
        f"attacked; layers {', '.join(protocol['variants'][variant]['layers'])} of "
        f"{network['name']}, {epochs} epochs on "
        f"{protocol['network_samples']:,} images, {100 * network['test_accuracy']:.2f} % right on "
        f"the whole test set. On {protocol['test_samples']:,} clean test images: "
        f"{'; '.join(_clean(found, name) for name in found['clean'][0])}. Our line-up: {attacks}. "
        f"{machines}{_code(content['code'])}."
    )
    note = protocol["note"].rstrip(".")
    return f"{text} {note}." if note else text


def _code(versions: Sequence[str]) -> str:
    """Say so where the library changed between the pieces."""
    few = len(versions) < 2
    return "" if few else f"; pieces made by {len(versions)} versions of the code"


def _clean(found: Mapping[str, Any], name: str) -> str:
    def mean(key: str) -> str:
        return f"{100 * statistics.mean(run[name][key] for run in found['clean']):.1f} %"

    rejected = f", {mean('rejection_rate')} rejected" if name != "DNN" else ""
    return f"{name} {mean('accuracy')} right{rejected}"


def _curve_table(found: Mapping[str, Any], style: str) -> str:
    worst, alone = found["curves"][WORST], found["curves"][ALONE]
    header = ["eps", *(f"{name}, {WORST}" for name in worst), *(f"{name}, paper" for name in alone)]
    columns = [*worst.items(), *alone.items()]
    rows = [
        [f"{eps:g}", *(_cell(name, curve, index) for name, curve in columns)]
        for index, eps in enumerate(worst["DNN"]["eps"])
    ]
    return tabulate(rows, header, tablefmt=style, disable_numparse=True)


def _cell(name: str, curve: Mapping[str, Any], index: int) -> str:
    """Accuracy, its deviation over several runs, and the rejected share in brackets."""
    rate = curve["accuracy"]
    text = f"{100 * rate['mean'][index]:.1f}"
    if rate["standard_deviation"] is not None:
        text += f" ± {100 * rate['standard_deviation'][index]:.1f}"
    if name != "DNN":
        text += f" ({100 * curve['rejection_rate']['mean'][index]:.0f})"
    return text


def _by_claim(found: Mapping[str, Any]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Pair what each claim comes to under the paper's attack, if anything, and our line-up."""
    alone = {entry["claim"]: entry for entry in found["claims"][ALONE]}
    nothing = {"verdict": "-", "numbers": "-"}
    return {
        entry["claim"]: (alone.get(entry["claim"], nothing), entry)
        for entry in found["claims"][WORST]
    }


def _verdict_table(found: Mapping[str, Any], style: str, width: int | None = None) -> str:
    rows = [[claim, *map(_verdict, pair)] for claim, pair in _by_claim(found).items()]
    header = ["what the paper says", f"under {ALONE}", f"under {WORST}"]
    widths = None if width is None else [width, 14, 14]
    return tabulate(rows, header, tablefmt=style, disable_numparse=True, maxcolwidths=widths)


def _verdict(entry: Mapping[str, Any]) -> str:
    needed = entry.get("needed")  # files of earlier versions have none
    return entry["verdict"] + (f" (about {needed:,} images would)" if needed else "")


def _number_table(found: Mapping[str, Any], style: str, width: int | None = None) -> str:
    rows = [
        [claim, *(entry["numbers"] for entry in pair)] for claim, pair in _by_claim(found).items()
    ]
    header = ["what the paper says", f"numbers, {ALONE}", f"numbers, {WORST}"]
    widths = None if width is None else [width // 2, width, width]
    return tabulate(rows, header, tablefmt=style, disable_numparse=True, maxcolwidths=widths)


def _cost_table(costs: Mapping[str, Mapping[str, Any]], style: str) -> str:
    rows = []
    for name, stages in costs.items():
        for stage, entry in stages.items():
            if entry:
                rows.append([name, stage, _seconds(entry), _memory(entry)])
    header = ["classifier", "stage", "seconds", "peak memory in MiB"]
    return tabulate(rows, header, tablefmt=style, disable_numparse=True)


def _notes(content: Mapping[str, Any], variant: str) -> str:
    """Say what the costs leave out, and what the authors' library needs where that is known."""
    searched = content["protocol"]["variants"][variant]["hyperparameters"] is None
    text = 'Memory is that of the whole process, the attacks\' seconds are part of "attack".'
    if searched:
        text += " NR takes (C, gamma) from DNR's search of the same layer."
    known = content["reference"]
    if not known or content["protocol"]["dataset"] != "mnist":
        return text
    spent = ", ".join(f"{seconds:.1f} s at {eps}" for eps, seconds in known["attack"].items())
    text += (
        " On the DNR of the default run (benchmarks.attacks.secml) the authors' library "
        f"needs, per digit and line-search attack, processor seconds of one thread: {spent}"
    )
    if "fit" in known:
        fit = known["fit"]
        theirs, ours = (
            f"{fit[name]['seconds']:.1f} s and {_memory([fit[name]])} MiB"
            for name in ("secml", "ours")
        )
        text += (
            f"; to fit DNR with given (C, gamma) to {fit['samples']:,} digits {theirs}, where ours "
            f"needs {ours}"
        )
    return f"{text}."


def _seconds(runs: Sequence[Mapping[str, Any]]) -> str:
    return f"{statistics.mean(run['seconds'] for run in runs):.1f}"


def _memory(runs: Sequence[Mapping[str, Any]]) -> str:
    known = [run["peak_memory_mib"] for run in runs if run["peak_memory_mib"] is not None]
    return f"{max(known):,.0f}" if known else "-"


# --- Fig. 2 ---


def figure_2_page(result: Mapping[str, Any]) -> str:
    """Format the attacks on a toy of the plane, the contents of fig2.json."""
    rows = [
        [name, f"{attack['norm']:.3f}", "yes" if attack["accepted and wrong"] else "no"]
        for name, attack in result["attacks"].items()
    ]
    return "\n".join(
        [
            "The paper's Fig. 2 on a toy made for it (`python -m benchmarks.paper.toy_2d`): NR on "
            f"three classes of the plane, attacked within {result['eps']:g} of one sample. The "
            "paper's attack ends, on the black path, at the point of highest confidence in the "
            "ball, the boundary walk at the nearest one that is accepted.",
            "",
            "![Decision regions with a reject option, the objective, and three attacks](fig2.png)",
            "",
            *table(["attack", "distance", "accepted and wrong"], rows),
            "",
            f"{machine(result['environment'])}.",
        ]
    )


def figure_2_headline(result: Mapping[str, Any]) -> str:
    """Name the distances at which two attacks evade."""
    found = {name: attack["norm"] for name, attack in result["attacks"].items()}
    first, *_, last = found
    return (
        f"the paper's attack evades at distance {found[first]:.2f}, the {last} at {found[last]:.2f}"
    )


PAGES = {
    "paper/mnist-quick-one-run": Page(
        "The paper's experiments on MNIST, one run", one_run_page, one_run_headline
    ),
    "paper/mnist": Page("The paper's experiments on MNIST", page, headline),
    "paper/cifar10": Page("The paper's experiments on CIFAR-10", page, headline),
    "paper/fig2": Page("The paper's Fig. 2", figure_2_page, figure_2_headline),
}
