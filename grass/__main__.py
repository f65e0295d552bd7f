"""`python -m grass`."""

import sys

from grass.cli import main

if __name__ == "__main__":
    sys.exit(main())
