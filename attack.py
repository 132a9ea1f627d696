"""Attack a network, NR and DNR, and report what is left of them: `python attack.py --help`."""

import sys

from torchdnr.cli.attack import main

if __name__ == "__main__":
    sys.exit(main(processes=None))
