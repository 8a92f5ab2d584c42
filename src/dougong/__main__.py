"""`python -m dougong` is the command line."""

import sys

from dougong.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
