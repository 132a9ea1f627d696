"""Page on learning features for few samples, through the fit of a head."""

from collections.abc import Mapping
from typing import Any

from benchmarks.common import Page, machine, table

NAMES = {
    "svm": "`svm_scores`: one-vs-rest SVMs",
    "ridge": "kernel ridge regression, in closed form",
    "qpth": "the SVMs' QP without intercepts, by qpth",
}
INTRODUCTION = """\
`python -m benchmarks.few_shot` trains a network of three convolutions on episodes: {ways} classes
with {shots} samples each, on which a head is fitted, and {queries} queries of each class, whose
cross-entropy goes back through the fit into the network, the width of the RBF kernel and a factor
of the scores. Each head trains a network of its own, for {steps} steps of {batch} episodes, from
one start and on the same episodes. The {classes} training classes are the digits 0 to 4, turned by
multiples of 90 degrees (0 and 1 by one at most); the test is on the digits 5 to 9 of the test set,
of which the network has seen none: always the same five classes, so that chance is 20 %. C = {C:g}
for the SVMs, and the ridge is 1 / C. The interval is that of the mean over {episodes} test
episodes, the same for all heads; it says nothing about other starts of the network. Times are
those of the head alone, per episode, on the features of one network: the median of {repeats} calls
of {batch} episodes, taken in turn, in seconds of a processor. qpth computes in float64, in which
its tolerance is meant; so does `svm_scores` within its fit, whatever the features are in."""


def page(result: Mapping[str, Any]) -> str:
    """Format how well and how fast the heads learn, the contents of few-shot-cpu.json."""
    settings, heads, untrained = (result[key] for key in ("settings", "heads", "untrained"))
    rows = [
        [
            NAMES[name],
            _accuracy(entry),
            f"{1e3 * entry['forward_seconds']:.2g}",
            f"{1e3 * entry['both_seconds']:.2g}",
            f"{entry['training_seconds']:.0f}",
        ]
        for name, entry in heads.items()
        if "error" not in entry
    ]
    header = ["head", "right of new digits", "forward, ms", "forward and backward, ms"]
    lines = [
        INTRODUCTION.format(**settings, episodes=untrained["episodes"]),
        "",
        f"{machine(result['environment'])}, qpth {result['environment']['qpth']}.",
        "",
        *table([*header, "training, s"], rows),
        "",
        f"A network that is not trained at all, below `svm_scores`: {_accuracy(untrained)}.",
    ]
    n, d, classes = settings["fit_size"]
    lines += [
        "",
        f"The same derivatives of larger fits: {n:,} samples of {d} features in {classes} classes, "
        f"medians of {settings['fit_repeats']}, taken in turn, in seconds of a processor.",
        "",
        *table(
            [
                "C",
                "fit of the same accuracy, s",
                "fit in float32 to the default tolerance, s",
                "forward and backward, s",
                "times the fit of the same accuracy",
            ],
            [
                [
                    C,
                    *(f"{cost[name]:.2f}" for name in ("fit", "quick fit", "both")),
                    f"{cost['both'] / cost['fit']:.2f}",
                ]
                for C, cost in result["fits"].items()
            ],
        ),
    ]
    for name, entry in heads.items():
        if "error" in entry:
            lines += ["", f"{NAMES[name]} did not run: `{entry['error']}`"]
    return "\n".join(lines)


def headline(result: Mapping[str, Any]) -> str:
    """Format accuracy and time of the heads that ran."""
    ran = {name: entry for name, entry in result["heads"].items() if "error" not in entry}
    words = {"svm": "an SVM layer", "ridge": "ridge regression", "qpth": "qpth"}
    rates = ", ".join(f"{words[n]} {100 * entry['accuracy']:.1f} %" for n, entry in ran.items())
    times = " / ".join(f"{1e3 * entry['both_seconds']:.2g}" for entry in ran.values())
    return f"new digits from 5 samples each: {rates}; {times} ms an episode, forward and backward"


def _accuracy(entry: Mapping[str, Any]) -> str:
    return f"{100 * entry['accuracy']:.1f} % ± {100 * entry['half_width']:.1f}"


PAGES = {"few-shot": Page("An SVM as a layer, for few samples", page, headline)}
