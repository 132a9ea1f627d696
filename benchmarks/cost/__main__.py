"""Measure what DNR costs: `python -m benchmarks.cost {forward,scale,compress} [OPTIONS]`.

- forward: a forward pass and its gradient beside those of the bare network
- scale: how time and memory of a fit grow with samples and classes
- compress: what fewer support vectors lose and gain

Each has options of its own: `python -m benchmarks.cost forward --help`.
"""

import sys

from benchmarks.cost import compress, forward, scale

BENCHMARKS = {"forward": forward.main, "scale": scale.main, "compress": compress.main}

if __name__ == "__main__":
    name, *arguments = sys.argv[1:] or [""]
    if name not in BENCHMARKS:
        sys.exit(__doc__)
    sys.exit(BENCHMARKS[name](arguments))
