"""`python -m mmpeft.pocket.rebuild WORK_FOLDER`: see the package's description."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from mmpeft.errors import ConfigError, MmpeftError

# Waiting threads that spin slow a shared machine down many times; read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from mmpeft.pocket.rebuild.recipe import SMOKE, Plan, rebuild

app = App(name="python -m mmpeft.pocket.rebuild", help="Rebuild the embedded pocket base, stage by stage.")


@app.default
def main(
    work: Path, *, smoke: bool = False, plan: Annotated[Plan | None, Parameter(name="*")] = None
) -> None:
    """Rebuild the pocket base in a work folder; what is already made there is kept.

    Args:
        work: folder that holds every stage's result; the base is in its `pocket`.
        smoke: a few steps on a few concepts, to see that every stage runs.
    """
    if smoke and plan is not None:
        raise ConfigError("--smoke has its own plan; leave the other options out")
    print(json.dumps(rebuild(work, SMOKE if smoke else plan or Plan()), indent=2))


if __name__ == "__main__":
    try:
        app()
    except MmpeftError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
