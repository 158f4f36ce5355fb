"""What a live adapter costs at one layer, at each of SD 1.5's shapes, beside PEFT's; reserved ranks too.

    python benchmarks/live_branch.py [float32|bfloat16]    # two minutes of one core; writes results/live_branch-*.json

At 512 x 512 pixels with guidance (a batch of 2), adapters of rank 16; `make bench-fusion` has whole UNets. "Reserved":
one adapter with room for seven more, which `attach(capacity=...)` makes for compiled models. Without OMP_NUM_THREADS=1
it measures all threads, in the time that passes.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fusion
import torch
from torch import nn

import mmpeft

RESULTS = Path(__file__).parent / "results"
# the weight's shape, and a convolution's side or a linear layer's tokens
LAYERS = (
    ((320, 320), 4096),
    ((2560, 320), 4096),
    ((320, 1280), 4096),
    ((640, 640), 1024),
    ((1280, 1280), 256),
    ((1280, 1280), 64),
    ((320, 768), 77),
    ((1280, 768), 77),
    ((1280, 1280), 1),
    ((320, 320, 3, 3), 64),
    ((640, 640, 3, 3), 32),
    ((1280, 1280, 3, 3), 16),
    ((1280, 1280, 3, 3), 8),
)


@torch.no_grad()
def measure(shape: tuple[int, ...], size: int, dtype: torch.dtype) -> dict[str, float]:
    """Give the milliseconds of the base and of PEFT's one, and ours as shares of PEFT's one."""
    model = nn.Sequential(fusion.layer_of(shape)).to(dtype)
    x = torch.randn(2, size, shape[1]) if len(shape) == 2 else torch.randn(2, shape[1], size, size)
    x = x.to(dtype)
    shapes = {"language_model.0": shape}
    models = {
        "base": model,
        "peft, one": fusion.with_peft(model, ("0",)),
        "one": fusion.with_bank(model, shapes, 1),
        "eight": fusion.with_bank(model, shapes, fusion.MANY),
        "reserved": with_reserve(model, shapes),
    }
    sides: dict[str, Callable[[], Any]] = {name: lambda m=m: m(x) for name, m in models.items()}
    once = fusion.alternate(sides, 1)["base"]
    times = fusion.alternate(sides, max(7, min(200, int(1000 / once))))
    theirs = times["peft, one"]
    return {title: ms if title in ("base", "peft, one") else ms / theirs for title, ms in times.items()}


def with_reserve(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    ours = fusion.twin(model)
    bank = mmpeft.attach(ours, capacity=fusion.MANY * fusion.RANK)
    bank.load(fusion.adapter_for(shapes, 0), "a")
    bank.mix(a=1.0)
    return ours


def main() -> None:
    warnings.simplefilter("ignore")
    name = sys.argv[1] if len(sys.argv) > 1 else "float32"
    if torch.get_num_threads() > 1:
        fusion.clock = time.perf_counter
    rows = {}
    print("| layer | base | PEFT's one | one | eight | one, seven reserved |\n|---|---|---|---|---|---|")
    for shape, size in LAYERS:
        title = (
            f"{' x '.join(map(str, shape))}, {f'{size} x {size}' if len(shape) == 4 else f'{size} tokens'}"
        )
        rows[title] = row = measure(shape, size, getattr(torch, name))
        print(
            f"| {title} | {row['base']:.2f} ms | {row['peft, one']:.2f} ms "
            f"| {row['one']:.2f} | {row['eight']:.2f} | {row['reserved']:.2f} |",
            flush=True,
        )
    threads = torch.get_num_threads()
    file = RESULTS / f"live_branch-{name}{'' if threads == 1 else f'-{threads}-threads'}.json"
    file.write_text(json.dumps(fusion.rounded(rows), indent=2) + "\n")


if __name__ == "__main__":
    main()
