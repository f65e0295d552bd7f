"""``python -m bench.kernels``: the same as ``grass bench kernels``."""

import sys

from grass.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "kernels", *sys.argv[1:]]))
