"""A whole image training for the tests: `python image_child.py '<json>'`.

Trains {out}/whole without a stop, then {out}/<n> for each n-th of {kills}: one session that dies by SIGKILL at that
share of its events, and one that resumes. {out}/whole.count has the number of events of a whole session.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

from train_child import Events

import mmpeft
import mmpeft.trainers.training  # loaded before the forks, not in each of them


def session(told: dict, out: Path, kill_at: int | None) -> int:
    events = Events(out, kill_at)
    events.listen()
    mmpeft.train(
        told["images"], base=told["base"], out=out, overrides=told["settings"], resume=kill_at is None
    )
    return events.count


def forked(told: dict, out: Path, kill_at: int | None) -> int:
    out.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        try:
            (out.with_suffix(".count")).write_text(str(session(told, out, kill_at)))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(child, 0)[1]


def main(told: dict) -> int:
    whole = Path(told["out"]) / "whole"
    if forked(told, whole, None):
        return 1
    events = int(whole.with_suffix(".count").read_text())
    for place, share in enumerate(told["kills"]):
        out = Path(told["out"]) / str(place)
        if forked(told, out, max(1, int(events * share))) != signal.SIGKILL or forked(told, out, None):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
