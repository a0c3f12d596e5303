"""`python -m arks`."""

import sys

from arks.cli import main

if __name__ == "__main__":
    sys.exit(main())
