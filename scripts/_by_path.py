"""Let `python scripts/NAME.py` find the repository, as `python -m scripts.NAME` does.

Python looks for modules in the folder of the file that it runs. Each script imports this file
first, if it has no package: then it was run by its path.
"""

from __future__ import annotations

import sys
from pathlib import Path

# In place of the folder of the scripts, whose names could hide those of installed packages.
sys.path[0] = str(Path(__file__).resolve().parent.parent)
