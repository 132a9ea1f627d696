"""Write the pages of all results: `python -m benchmarks`.

Beside every benchmarks/results/NAME.json a page NAME.md, and the index README.md. A benchmark
writes numbers only; run this after it. README.md at the top of the repository holds the table of
``summary``: after a new measurement put it in by hand, a test says where the two differ.
"""

import json
import sys
from pathlib import Path

from benchmarks import record_run
from benchmarks.attacks import report as attacks
from benchmarks.common import RESULTS, Page, table
from benchmarks.cost import report as cost
from benchmarks.few_shot import report as few_shot
from benchmarks.gpu import report as gpu
from benchmarks.ood import report as ood
from benchmarks.paper import report as paper
from benchmarks.poisoning import report as poisoning
from benchmarks.svm import report as svm
from benchmarks.training import report as training
from torchdnr.files import atomic_write_bytes

PAGES: dict[str, Page] = {
    **record_run.PAGES,
    **paper.PAGES,
    **attacks.PAGES,
    **training.PAGES,
    **poisoning.PAGES,
    **svm.PAGES,
    **cost.PAGES,
    **gpu.PAGES,
    **ood.PAGES,
    **few_shot.PAGES,
}
"""Beginning of a result's name to its page; the rest of the name tells the device or the size."""


def find_page(name: str) -> Page:
    """Look up the page of a result.

    Args:
        name: Path in benchmarks/results, without the suffix.

    Returns:
        The page with the longest matching name.

    Raises:
        ValueError: If there is none.
    """
    matches = [start for start in PAGES if name == start or name.startswith(f"{start}-")]
    if not matches:
        raise ValueError(f"no page for {name}.json; add one of: {', '.join(PAGES)}")
    return PAGES[max(matches, key=len)]


def result_names(results: Path = RESULTS) -> list[str]:
    """List the committed results, in the order of their pages."""
    paths = [path.relative_to(results).with_suffix("") for path in results.rglob("*.json")]
    order = list(PAGES.values())
    names = sorted(path.as_posix() for path in paths)
    return sorted(names, key=lambda name: order.index(find_page(name)))


def page_text(name: str, results: Path = RESULTS) -> str:
    """Format the page of a result."""
    page, result = find_page(name), json.loads((results / f"{name}.json").read_text())
    return f"# {page.title}\n\n{page.markdown(result)}\n\n[Raw numbers]({Path(name).name}.json)\n"


def summary(prefix: str = "") -> str:
    """Format one line per result.

    Args:
        prefix: Path from the file that holds the table to benchmarks/results.

    Returns:
        A table.
    """
    rows = []
    for name in result_names():
        page = find_page(name)
        result = json.loads((RESULTS / f"{name}.json").read_text())
        rows.append([f"[{page.title}]({prefix}{name}.md)", page.headline(result)])
    return "\n".join(table(["What was measured", "Result"], rows))


def index() -> str:
    """Format benchmarks/results/README.md."""
    return (
        "# Results\n\nEvery page is made from the JSON of the same name by `python -m benchmarks`; "
        f"each says which command measured it, on what.\n\n{summary()}\n"
    )


def main() -> None:
    """Write all pages and the index."""
    for name in result_names():
        atomic_write_bytes(RESULTS / f"{name}.md", page_text(name).encode())
    atomic_write_bytes(RESULTS / "README.md", index().encode())


if __name__ == "__main__":
    sys.exit(main())
