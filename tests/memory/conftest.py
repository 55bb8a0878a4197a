"""Lets the tests of the memory, in whatever folder, import ``oracle``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
