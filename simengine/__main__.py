"""`python -m simengine`."""

import sys

from simengine.cli import main

if __name__ == "__main__":
    sys.exit(main())
