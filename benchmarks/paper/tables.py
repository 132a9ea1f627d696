"""Tables of the paper's experiments, as text and for README.md."""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from torchdnr.evaluation.known_attacks import ATTACKS

WORST, ALONE = "our line-up", "the paper's attack"


def readme_section(name: str, content: Mapping[str, Any]) -> str:
    """Format one data set's numbers for README.md."""
    dataset, _, size = name.partition("-")
    parts = [f"### {'MNIST' if dataset == 'mnist' else 'CIFAR-10'}{f', {size}' * bool(size)}", ""]
    for variant, found in content["variants"].items():
        about = content["protocol"]["variants"][variant]["about"]
        parts += [f"**{variant}**: {about}. {_facts(content, variant)}", ""]
        parts += [_curve_table(found, "github"), "", _verdict_table(found, "github"), ""]
        parts += [_figures(f"{name}-{variant}", content["protocol"]), ""]
        parts += _folded("The numbers behind the verdicts", _number_table(found, "github"))
        costs = f"{_cost_table(content['cost'][variant], 'github')}\n\n{_notes(content, variant)}"
        parts += _folded("What each stage cost", costs)
    text = "\n".join(parts).rstrip()
    # The padding that lines up a table's columns only makes long lines of it here.
    return re.sub(r"(?<=\|)-+(?=\|)", "---", re.sub(r" {2,}", " ", text))


def example_figure(protocol: Mapping[str, Any]) -> int:
    """Tell which of the paper's figures shows the images: 5 for MNIST, 6 for CIFAR-10."""
    return 5 if protocol["dataset"] == "mnist" else 6


def _figures(name: str, protocol: Mapping[str, Any]) -> str:
    path = f"benchmarks/results/paper/{name}"
    number = example_figure(protocol)
    return (
        f"![Fig. 3: accuracy and rejection rate over eps]({path}-fig3.png)\n\n"
        f"[Fig. 4: accuracy over the false rejection rate]({path}-fig4.png), "
        f"[Fig. {number}: attacked images]({path}-fig{number}.png), "
        f"[raw numbers](benchmarks/results/paper/{name.rsplit('-', 1)[0]}.json)"
    )


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


def _folded(title: str, text: str) -> list[str]:
    """Put text where a reader of README.md sees it on a click."""
    return [f"<details><summary>{title}</summary>", "", text, "", "</details>", ""]


def _by_claim(found: Mapping[str, Any]) -> dict[str, tuple[dict[str, str], dict[str, str]]]:
    """Pair what each claim comes to under the paper's attack, if anything, and our line-up."""
    alone = {entry["claim"]: entry for entry in found["claims"][ALONE]}
    nothing = {"verdict": "-", "numbers": "-"}
    return {
        entry["claim"]: (alone.get(entry["claim"], nothing), entry)
        for entry in found["claims"][WORST]
    }


def _verdict_table(found: Mapping[str, Any], style: str, width: int | None = None) -> str:
    rows = [
        [claim, *(entry["verdict"] for entry in pair)] for claim, pair in _by_claim(found).items()
    ]
    header = ["what the paper says", f"under {ALONE}", f"under {WORST}"]
    widths = None if width is None else [width, 14, 14]
    return tabulate(rows, header, tablefmt=style, disable_numparse=True, maxcolwidths=widths)


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
        " On the DNR of the default run (bench_secml.py) the authors' library "
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
