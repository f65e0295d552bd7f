import sys
from pathlib import Path

# The package `bench` is part of the source tree, not of the installed library.
ROOT = str(Path(__file__).parent.parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
