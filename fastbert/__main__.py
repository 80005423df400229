"""`python -m fastbert`: the command line, where the `fastbert` script is not on the path."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
