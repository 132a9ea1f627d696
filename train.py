"""Train the paper's network, then fit DNR and NR on it: `python train.py --help`."""

import sys

from torchdnr.cli.train import main

if __name__ == "__main__":
    sys.exit(main(processes=None))
