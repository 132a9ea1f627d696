"""Label image files with a fitted classifier: ``python -m torchdnr.predict --help``."""

import sys

from torchdnr.cli.predict import main

if __name__ == "__main__":
    sys.exit(main())
