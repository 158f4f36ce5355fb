"""Makes `tiny_task` importable from the tests here, as it is from the scripts that they start."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
