"""Parts of README.md that scripts write, each between two markers."""

import re
import sys
from pathlib import Path

from torchdnr.files import atomic_write_bytes

README = Path(__file__).parents[1] / "README.md"


def rewrite(markers: tuple[str, str], section: str, readme: Path = README) -> int:
    """Put a section between its markers.

    Args:
        markers: The lines before and after it.
        section: Markdown.
        readme: The file.

    Returns:
        Exit code: 0; 2 if the markers are missing, which standard error then tells.
    """
    begin, end = markers
    between = re.compile("(?<=" + re.escape(begin) + r").*?(?=" + re.escape(end) + ")", re.S)
    found = readme.read_text()
    if not between.search(found):
        print(f"README.md has no markers {begin} and {end}: add both", file=sys.stderr)
        return 2
    atomic_write_bytes(readme, between.sub(lambda _: f"\n{section}\n", found).encode())
    return 0
