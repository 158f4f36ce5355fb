"""The whole way, from a folder of images to the verified adapter, in a process that is killed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_task import content

CHILD = Path(__file__).parent / "image_child.py"
KILLS = (0.3, 0.6, 0.8, 0.97)


@pytest.mark.slow
def test_an_image_run_killed_anywhere_and_resumed_gives_the_same_adapter_byte_for_byte(
    tiny_sd_folder, tmp_path
):
    photos = tmp_path / "photos"
    photos.mkdir()
    random = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text("a cat, sitting, red")
    settings = {
        "train.steps": 6,
        "train.batch_size": 2,
        "train.checkpoint_every": 2,
        "train.ema": 0.9,
        "train.learning_rate": 0.01,
        "method.rank": 2,
        "method.dropout": 0.2,
        "data.trigger": "red ink",
        "data.caption_dropout": 0.2,
        "data.shuffle_tags": True,
        "validation.images": str(photos),
        "validation.every": 3,
        "preview.prompts": [{"prompt": "a cat, red ink"}],
        "preview.steps": 2,
    }
    told = {
        "images": str(photos),
        "base": str(tiny_sd_folder),
        "out": str(tmp_path / "runs"),
        "settings": settings,
        "kills": KILLS,
    }
    done = subprocess.run(
        [sys.executable, CHILD, json.dumps(told)], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    events = int((tmp_path / "runs" / "whole.count").read_text())
    assert events > 60  # otherwise they are not being counted
    for place in range(len(KILLS)):
        for name in ("adapter", "best"):
            killed, whole = tmp_path / "runs" / str(place) / name, tmp_path / "runs" / "whole" / name
            assert content(killed) == content(whole), f"killed at {KILLS[place]:.0%}: {name} differs"
