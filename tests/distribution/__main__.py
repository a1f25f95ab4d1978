"""`python -m tests.distribution FOLDER`: look through its wheel and its sdist; exit code 1 if one is wrong."""

import sys
from pathlib import Path

from .contents import faults

found = faults(Path(sys.argv[1]))
sys.stdout.write(("\n".join(found) or "the wheel and the sdist hold what they should") + "\n")
raise SystemExit(1 if found else 0)
