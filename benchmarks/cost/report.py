"""Pages on what DNR costs: forward passes, growth of a fit, compression."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.common import Page, machine, table
from torchdnr.evaluation.metrics import wilson_interval

Record = Mapping[str, Any]

# --- forward passes ---

FORWARD = """\
With few images a DNR reads all its support vectors for little work; in batches it costs little on
a large network. `net.to(memory_format=torch.channels_last)`, or `--channels-last` of `train.py`,
`attack.py` and `python -m torchdnr.predict`, gives the same scores but for rounding, and
`torch.compile(model)` nearly the same: the tables show what either gains. A compiled gradient is
slower than a plain one on this CPU, so try before you use it for attacks.
`python -m benchmarks.cost forward` measures it again."""


def forward_page(result: Record) -> str:
    """Format what DNR costs beside its network, the contents of forward-cpu.json."""
    settings = result["settings"]
    lines = [
        FORWARD,
        "",
        f"{machine(result['environment'])}; {settings['vectors']:,} support vectors in each SVM "
        "(made up: nothing is fitted, and the networks have random weights, which does not change "
        "the times). Processor time, medians; other programs ran beside it.",
        "",
        "- Network: milliseconds per batch of the bare network, usual format / `channels_last`.",
        "- Overhead: time of DNR over that of its network, less 1, in percent, usual format / "
        "`channels_last`; in brackets the bound, the matrix products alone that exact scores and "
        "gradients need.",
        "- Compiled: time under `torch.compile` over that without, in percent, network / DNR, "
        "usual format; compiled scores differ from the others by at most "
        f"{_largest_difference(result, 'scores'):.0e} of the largest, gradients by at most "
        f"{_largest_difference(result, 'gradient'):.0e}.",
        "- Shares: network, kernels, combiner and the rest (hooks, copies, reductions, noise) of "
        "DNR's time in the usual format, in percent.",
        "",
        *table(
            [
                *("network", "classes", "batch", "pass", "network, ms", "overhead (bound), %"),
                *("compiled, %", "shares, %"),
            ],
            [
                _forward_row(case, n, mode, entry[mode])
                for case in result["cases"]
                for n, entry in case["batches"].items()
                for mode in ("forward", "gradient")
            ],
        ),
        "",
        f"Target: an overhead of at most {100 * settings['target']['overhead']:.0f} % on "
        f"{settings['target']['network']}, forward, usual format:",
        "",
        *_target_lines(result),
    ]
    return "\n".join(lines)


def forward_headline(result: Record) -> str:
    """Name the overhead of a forward pass where there is a target for it, one image and many."""
    cases = [(n, measured) for classes, n, measured in _target_cases(result) if classes == 10]
    overheads = " and ".join(f"{100 * one['overhead']:.0f} %" for _, one in cases)
    batches = " and ".join(n for n, _ in cases)
    return (
        f"on {result['settings']['target']['network']} DNR adds {overheads} to a forward pass, "
        f"in batches of {batches}"
    )


def _largest_difference(result: Record, what: str) -> float:
    entries = (entry for case in result["cases"] for entry in case["batches"].values())
    return max(entry["compiled_difference"][what] for entry in entries)


def _forward_row(case: Record, n: str, mode: str, measured: Record) -> list[str]:
    forms = [measured[name] for name in ("DNR", "DNR, channels_last")]
    times = measured["seconds"]
    seconds = [times[name] for name in ("network", "network, channels_last")]
    compiled = [times[f"{name}, compiled"] / times[name] for name in ("network", "DNR")]
    return [
        case["network"],
        f"{case['classes']:,}",
        n,
        mode,
        " / ".join(f"{1_000 * value:,.1f}" for value in seconds),
        " / ".join(f"{100 * form['overhead']:.0f} ({100 * form['bound']:.0f})" for form in forms),
        " / ".join(f"{100 * ratio:.0f}" for ratio in compiled),
        ", ".join(f"{100 * share:.0f}" for share in measured["share"].values()),
    ]


def _target_cases(result: Record) -> Iterator[tuple[int, str, Record]]:
    """Yield classes, batch size and DNR's forward pass of the network that has a target."""
    for case in result["cases"]:
        if case["network"] == result["settings"]["target"]["network"]:
            for n, entry in case["batches"].items():
                yield case["classes"], n, entry["forward"]["DNR"]


def _target_lines(result: Record) -> Iterator[str]:
    """Say where the target is reached, and by how much it is missed elsewhere."""
    for classes, n, measured in _target_cases(result):
        over = measured["overhead"] - result["settings"]["target"]["overhead"]
        verdict = "reached" if over <= 0 else f"missed by {100 * over:.0f} points"
        low, high = (f"{100 * value:.0f}" for value in measured["quartiles"])
        yield (
            f"- {classes:,} classes, batch of {n}: {100 * measured['overhead']:.0f} % (quartiles "
            f"{low} to {high}), {verdict}; the products alone take {100 * measured['bound']:.0f} %"
        )


# --- growth of a fit ---

SCALE = """\
A fit never holds the whole kernel: rows are evaluated as they are needed, within `memory_limit`,
and many classes are solved in groups. `python -m benchmarks.cost scale` measures how it grows.
Digits as pixels end where they do because a fit to more did not come to an end in the time there
was: within this limit the kernel rows that it needs do not fit into memory together."""
SIZES = {"samples": ("n", "images"), "layer": ("n", "samples"), "classes": ("classes", "classes")}
GROWING = "processor_seconds", "peak_memory_mib", "support_vectors", "kernel_rows"


def scale_page(result: Record) -> str:
    """Format how a fit grows, the contents of scale.json."""
    settings, failures = result["settings"], _failures(result)
    where = machine({**result["environment"], "threads": settings["threads"]})
    conditions = (
        f'One layer\'s SVM, C = 10, gamma = "scale", on {where}; '
        f"`memory_limit` {settings['memory_limit'] / 2**30:g} GiB; seconds of the processor, "
        "memory of the whole process. "
    )
    missed = f"{failures} problems missed the tolerance."
    lines = [SCALE, "", conditions + (missed if failures else "All fits met the tolerance.")]
    for kind, (size, title) in SIZES.items():
        entries = sorted(result["sections"][kind].values(), key=lambda one: one[size])
        first, growth = entries[0], result["growth"][kind]
        what = {
            "samples": "MNIST digits as pixels, 10 classes, d = 784; beyond 60,000 moved copies",
            "layer": f"Gaussian clusters, d = {first['d']} as of a layer, 10 classes",
            "classes": f"Gaussian clusters, {first['n']:,} samples, d = {first['d']}",
        }[kind]
        exponents = [
            f"*{growth[name]['exponent']:.2f}*" if name in growth else "*-*" for name in GROWING
        ]
        lines += [
            "",
            f"{what}:",
            "",
            *table(
                [title, "seconds", "memory, GiB", "support vectors", "kernel rows evaluated"],
                [
                    *(_scale_row(entry, size) for entry in entries),
                    ["*exponent, last four*", *exponents],
                ],
            ),
        ]
    return "\n".join([*lines, "", _estimate(result["estimate"])])


def scale_headline(result: Record) -> str:
    """Name the largest fit and the exponents of time."""
    largest = max(result["sections"]["layer"].values(), key=lambda entry: entry["n"])
    exponents = [result["growth"][kind]["processor_seconds"]["exponent"] for kind in SIZES]
    return (
        f"{largest['n']:,} samples of a layer fit in {largest['processor_seconds']:.0f} s; time "
        f"grows with samples to the power {exponents[1]:.1f} (clusters) to {exponents[0]:.1f} "
        f"(pixels), with classes to the power {exponents[2]:.1f}"
    )


def _failures(result: Record) -> int:
    sections = result["sections"].values()
    return sum(entry["not_converged"] for section in sections for entry in section.values())


def _scale_row(entry: Record, size: str) -> list[str]:
    memory = entry["peak_memory_mib"]
    return [
        f"{entry[size]:,}",
        f"{entry['processor_seconds']:.1f}",
        "-" if memory is None else f"{memory / 1024:.2f}",
        f"{entry['support_vectors']:,}",
        f"{entry['kernel_rows']:,}",
    ]


def _estimate(estimate: Record) -> str:
    whole, subset, gpu = estimate["all"], estimate["subset"], estimate["gpu"]
    fits = "is more than" if whole["state_gib"] > gpu["memory_gib"] else "just fits into"

    def span(entry: Record, what: str) -> str:
        return f"{readable(entry['layer'][what])} to {readable(entry['samples'][what])}"

    return (
        f"**ImageNet, estimated, not measured**: {whole['images']:,} images, 1,000 classes, one "
        "layer, given (C, gamma). Carried on by these exponents a fit takes "
        f"{span(whole, 'processor_hours')} of such a core, if it grows as that to clusters or as "
        f"that to digits. An {gpu['name']} multiplies matrices {estimate['faster']:,.0f} times as "
        "fast; if all of a fit gained as much, which it will not, it would take "
        f"{span(whole, 'hours_one_gpu')} on one and {span(whole, 'hours_eight_gpus')} on eight. "
        f"Its state in float64 takes {whole['state_gib']:.0f} GiB on every GPU, which {fits} the "
        f"{gpu['memory_gib']} of one, and a search over 20 points in 5 folds takes many times all "
        f"that. {subset['images']:,} of the images take {span(subset, 'processor_hours')} of a "
        f"core and {subset['state_gib']:.1f} GiB: fit on such a part. No fit has run on a GPU yet."
    )


def readable(hours: float) -> str:
    """Format a duration in the unit that fits."""
    for unit, name in ((24.0, "days"), (1.0, "hours"), (1 / 60, "minutes")):
        if hours >= 2 * unit:
            return f"{hours / unit:.0f} {name}"
    return f"{3600 * hours:.0f} seconds"


# --- compression ---

COMPRESS = """\
`model.compress(images, factor=10)` puts prototypes in the place of the support vectors; theta is
set again afterwards. `python -m benchmarks.cost compress --run runs/mnist-5k` measures what that
loses. Attack a compressed classifier again before you trust it: the points found on the original
say nothing of it, as the list at the end shows. The whole model gains little, for the
network takes the time."""


def compress_page(result: Record) -> str:
    """Format what compression lost and gained, the contents of compress-cpu.json."""
    models, samples = result["models"], result["settings"]["samples"]
    first = next(iter(models.values()))
    eps = [value for value in first["attack"]["eps"] if value > 0]
    low, high = wilson_interval(0.5, samples)
    lines = [
        COMPRESS,
        "",
        f"Data set {result['run']['dataset']}, seed {result['run']['seed']}; "
        f"{machine(result['environment'])}. Theta set again on the same calibration images. Clean: "
        "accuracy in percent (rejected share) on "
        f"{first['test_samples']:,} test images. Under attack: accuracy in percent, worst case of "
        f"the default line-up run afresh on each model, {samples} of those images "
        f"(95 % interval at 50: {100 * low:.0f} to {100 * high:.0f}), and the median norm at which "
        "an image evades. Times faster: processor time of one thread for the SVMs and for the "
        f"whole model, forward / with gradient, {first['speed']['rows']} images.",
        "",
        *table(
            [
                *("classifier", "vectors", "R^2 of test scores", "same label", "clean"),
                *(f"eps {value:g}" for value in eps),
                *("median norm", "SVMs, times faster", "model, times faster"),
            ],
            [_compress_row(name, entry, models[entry["of"]]) for name, entry in models.items()],
        ),
        "",
        "Images under attack that evade after compression only, and before it only:",
        "",
        *_what_was_lost(models),
    ]
    return "\n".join(lines)


def compress_headline(result: Record) -> str:
    """Name the smallest DNR that loses nothing which the attacked images could show."""
    models, samples = result["models"], result["settings"]["samples"]
    accuracy = models["DNR"]["attack"]["accuracy"]
    same = [
        (entry["factor"], name)
        for name, entry in models.items()
        if entry["of"] == "DNR" and entry["attack"]["accuracy"][1:] == accuracy[1:]
    ]
    factor, name = max(same)
    return (
        f"{models[name]['total_vectors']:,} instead of {models['DNR']['total_vectors']:,} support "
        f"vectors ({factor} times fewer) lose nothing that {samples} attacked digits could show"
    )


def _compress_row(name: str, entry: Record, original: Record) -> list[str]:
    final = list(entry["losses"]["test"].values())[-1] if "losses" in entry else None
    attack = entry["attack"]
    speeds = []
    for part in ("SVMs", "model"):
        calls = [f"{part}, {what}" for what in ("forward", "gradient")]
        before, after = original["speed"]["seconds"], entry["speed"]["seconds"]
        ratios = " / ".join(f"{before[call] / after[call]:.1f}" for call in calls)
        speeds.append(ratios if final else "1")
    return [
        name,
        f"{entry['total_vectors']:,}",
        f"{final['r2']:.4f}" if final else "-",
        f"{100 * final['label_agreement']:.1f}" if final else "-",
        f"{100 * entry['test_accuracy']:.1f} ({100 * entry['test_rejection_rate']:.1f})",
        *(
            f"{100 * rate:.0f}"
            for rate, eps in zip(attack["accuracy"], attack["eps"], strict=True)
            if eps > 0
        ),
        f"{float(attack['median_evasion_norm']):.2f}",
        *speeds,
    ]


def _what_was_lost(models: Record) -> Iterator[str]:
    """Count the images whose decision under attack changed, over all eps, size by size."""
    for name, entry in models.items():
        attack = entry["attack"]
        if "newly_evaded" not in attack:
            continue
        columns = attack["eps"], attack["newly_evaded"], attack["no_longer_evaded"]
        counts = "; ".join(
            f"eps {eps:g}: {new} and {old}"
            for eps, new, old in zip(*columns, strict=True)
            if eps > 0
        )
        moved = sum(attack["transferred"])
        yield f"- {name}: {counts}; evaded by the original's points alone: {moved}"


PAGES = {
    "forward": Page("What DNR costs beside its network", forward_page, forward_headline),
    "scale": Page("Many samples, many classes", scale_page, scale_headline),
    "compress": Page("Fewer support vectors", compress_page, compress_headline),
}
