"""Train and score two styles and a subject on the embedded base; the README's table comes from here.

    python benchmarks/adapters.py             # about fifteen minutes; writes runs/adapters/results.json and a picture each
"""

import json
from pathlib import Path

from mmpeft.bank import attach
from mmpeft.trainers import quickstart
from mmpeft.trainers.quickstart import Run

OUT = Path("runs/adapters")
STYLES = [
    quickstart.STYLE,
    Run("fluent-3d", "style", "in the style of clay", quickstart.STYLE.settings),
    Run("fluent-flat", "style", "in the style of felt", quickstart.STYLE.settings),
]
