"""Page on what was measured on an accelerator."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.common import Page, machine, table

Record = Mapping[str, Any]
INTRODUCTION = """\
`python -m benchmarks.gpu --minutes {minutes:g} --out FILE` measures what fits into the minutes, the
most important first. A section that failed, or for which no time was left, says so."""


def page(result: Record) -> str:
    """Format the contents of gpu.json."""
    environment = result["environment"]
    where = f"{environment['device']}, CUDA {environment['cuda']}; {machine(environment)}."
    lines = [INTRODUCTION.format(**result["settings"]), "", where]
    for name, section in result["sections"].items():
        lines += ["", f"## {name}, {section['section_seconds']:.0f} s", ""]
        state = section.get("error") or section.get("skipped")
        lines += [state] if state else FORMATS[name](section)
    return "\n".join(lines)


def headline(result: Record) -> str:
    """Say how many sections there are, and how many failed."""
    sections = result["sections"]
    done = [name for name, section in sections.items() if not {"error", "skipped"} & set(section)]
    return (
        f"{len(done)} of {len(sections)} sections on {result['environment']['device']}: "
        f"{', '.join(done)}"
    )


def _tests(section: Record) -> list[str]:
    counts = ", ".join(f"{count} {kind}" for kind, count in section["counts"].items())
    stopped = section["exit_code"] is None
    ended = f"stopped after {section['stopped_after']:.0f} s" if stopped else "to the end"
    return [f"{counts or 'none'}, {ended}", *(f"- {failure}" for failure in section["failures"])]


def _fits(section: Record) -> list[str]:
    rows = []
    for d, entry in section["dimensions"].items():
        grid = entry.get("grid", {"seconds": None})["seconds"]
        shares = entry["kernels"]
        rows.append(
            [
                d,
                f"{entry['fit']:.2f}",
                "-" if grid is None else f"{grid:.1f}",
                f"{entry['certificate']['violation']:.1e}",
                f"{shares['gram']:.0%}",
                f"{shares['scores']:.0%}",
            ]
        )
    header = ["features", "fit, s", "grid search, s", "largest violation", "Gram", "scores"]
    peak = (
        f"{section['samples']:,} samples of 10 noisy clusters; the last two columns are shares of "
        f"the rate of a large float32 product, {section['peak_flops'] / 1e12:.2f} Tflop/s."
    )
    return [peak, "", *table(header, rows)]


def _pgd(section: Record) -> list[str]:
    rows = []
    for name, entry in section.items():
        if name == "section_seconds":
            continue
        waits = entry["waits_per_step"]
        for way, one in entry.items():
            if way != "waits_per_step":
                ratio = f"{one['ratio']:.2f}" if "ratio" in one else one["error"]
                bare = f"{1_000 * one['bare']:.1f}" if "bare" in one else "-"
                rows.append([name, way, ratio, bare, "-" if waits is None else f"{waits:g}"])
    header = ["classifier", "run", "time over that of its passes", "passes, ms", "waits per step"]
    return table(header, rows)


def _line_up(section: Record) -> list[str]:
    rows = [
        [
            name,
            f"{one['samples']:,}",
            f"{one['seconds']:.0f}",
            f"{one['right']:.1%} / {one['rejected']:.1%}",
            f"{one['median_norm']:.2f}",
        ]
        for name, one in section.items()
        if name != "section_seconds"
    ]
    return table(["classifier", "digits", "seconds", "right / rejected", "median norm"], rows)


def _training(section: Record) -> list[str]:
    return [
        f"One epoch of training to reject on {section['images']:,} digits: "
        f"{section['seconds']:.1f} s, {section['images_per_second']:,.0f} images/s"
    ]


def _photographs(section: Record) -> list[str]:
    return list(_photograph_lines(section))


def _photograph_lines(section: Record) -> Iterator[str]:
    yield f"Fit of a DNR on {section['images']:,} images: {section['fit']:.1f} s"
    yield ""
    rows = [
        [batch, f"{1_000 * one['network']:.1f}", f"{1_000 * one['DNR']:.1f}"]
        for batch, one in section["batches"].items()
    ]
    yield from table(["batch", "gradient of the network, ms", "of its DNR, ms"], rows)
    yield ""
    pgd = section["pgd"]
    yield f"PGD, {pgd['steps']} steps on {pgd['images']} images: {pgd['seconds']:.1f} s"


FORMATS = {
    "tests": _tests,
    "fits": _fits,
    "pgd": _pgd,
    "line-up": _line_up,
    "training": _training,
    "photographs": _photographs,
}

PAGES = {"gpu": Page("On a GPU", page, headline)}
