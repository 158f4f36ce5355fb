"""Live mixing side by side with PEFT, in one run: single layers and the whole UNet at the true size of SD 1.5.

    python benchmarks/live_branch.py                       # layers: some minutes; writes runs/live_branch/layers.json
    python benchmarks/live_branch.py --unet --latents 64   # the UNet, latency of a new mix, fuse and unfuse
    python benchmarks/live_branch.py --dtype bfloat16

Every round runs all sides one after the other; a figure is the median over the rounds, a ratio that of two medians.
Weights are noise, adapters have rank 16. "unused capacity" is one live adapter with seven more's ranks reserved.
"""

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import mmpeft
from mmpeft.adapter import Adapter
from mmpeft.injection import live_layers, weight_shape
from mmpeft.methods.lora import LoraLayer

OUT = Path("runs/live_branch")
RANK, MANY = 16, 8
# (kind, side of the latents or tokens, in, out): the layers of SD 1.5 at 512 x 512 pixels, by how often they are there
LAYERS = (
    ("linear", 4096, 320, 320),
    ("linear", 4096, 320, 2560),
    ("linear", 4096, 1280, 320),
    ("linear", 1024, 640, 640),
    ("linear", 256, 1280, 1280),
    ("linear", 64, 1280, 1280),
    ("linear", 77, 768, 320),
    ("linear", 77, 768, 1280),
    ("linear", 1, 1280, 1280),
    ("conv", 64, 320, 320),
    ("conv", 32, 640, 640),
    ("conv", 16, 1280, 1280),
    ("conv", 8, 1280, 1280),
)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]


def alternate(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Time all sides in turn; give the median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if number:  # the first round warms up
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(each) for name, each in times.items()}


def twin(model: nn.Module) -> nn.Module:
    """Copy the modules, not the weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def random_adapter(model: nn.Module, component: str, targets: list[str], seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for disk, live in live_layers(component, model).items():
        if not any(disk == target or disk.endswith(f".{target}") for target in targets):
            continue
        out, inputs, *kernel = weight_shape(model.get_submodule(live))
        A = 0.02 * torch.randn(RANK, inputs, *kernel, generator=generator)
        B = 0.02 * torch.randn(out, RANK, *[1] * len(kernel), generator=generator)
        layers[f"{component}.{disk}"] = LoraLayer(A, B, float(RANK))
    return Adapter(layers)


def banks(
    model: nn.Module, component: str, targets: list[str]
) -> dict[str, tuple[nn.Module, mmpeft.AdapterBank]]:
    """Give the base with one adapter live, with many, and with one beside reserved ranks."""
    made = {}
    for title, count, capacity in (
        ("one", 1, None),
        ("many", MANY, None),
        ("one, unused capacity", 1, MANY * RANK),
    ):
        ours = twin(model)
        bank = mmpeft.attach(ours, capacity=capacity)
        for number in range(count):
            bank.load(random_adapter(ours, component, targets, number), f"a{number}")
        bank.mix({f"a{number}": 0.5 + 0.1 * number for number in range(count)})
        made[title] = ours, bank
    return made


def with_peft(model: nn.Module, targets: list[str]) -> nn.Module:
    theirs = twin(model)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets), theirs)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.02)
    return theirs.to(next(model.parameters()).dtype).eval()


@torch.no_grad()
def measure_layer(kind: str, size: int, inputs: int, out: int, dtype: torch.dtype, rounds: int) -> dict:
    model = nn.Sequential(
        nn.Linear(inputs, out) if kind == "linear" else nn.Conv2d(inputs, out, 3, padding=1)
    ).to(dtype)
    # a batch of 2: guidance
    x = torch.randn(2, size, inputs) if kind == "linear" else torch.randn(2, inputs, size, size)
    x = x.to(dtype)
    sides: dict[str, Callable[[], Tensor]] = {"base": lambda: model(x)}
    theirs = with_peft(model, ["0"])
    sides["peft, one"] = lambda: theirs(x)
    for title, (ours, _) in banks(model, "language_model", ["0"]).items():
        sides[title] = lambda ours=ours: ours(x)
    once = alternate(sides, 1)["base"]
    times = alternate(sides, max(5, min(rounds, int(4000 / once))))
    return {"layer": f"{kind} {size} {inputs}->{out}", "milliseconds": times, **ratios(times)}


def ratios(times: dict[str, float]) -> dict[str, float]:
    return {title: times[title] / times["peft, one"] for title in times if title not in ("base", "peft, one")}


def sd15_unet(dtype: torch.dtype) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.set_default_dtype(dtype)
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
        down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    )
    torch.set_default_dtype(torch.float32)
    return unet.eval()


@torch.no_grad()
def measure_unet(targets: list[str], latents: int, dtype: torch.dtype, rounds: int) -> dict:
    unet = sd15_unet(dtype)
    inputs = torch.randn(2, 4, latents, latents).to(dtype), 500, torch.randn(2, 77, 768).to(dtype)
    theirs = with_peft(unet, targets)
    made = banks(unet, "unet", targets)
    sides: dict[str, Callable[[], object]] = {
        "base": lambda: unet(*inputs),
        "peft, one": lambda: theirs(*inputs),
    }
    for title, (ours, _) in made.items():
        sides[title] = lambda ours=ours: ours(*inputs)
    times = alternate(sides, rounds)
    _, bank = made["many"]
    names = list(bank.adapters)
    weights = [{name: 0.1 * (i + j) for i, name in enumerate(names)} for j in range(2)]
    changes = alternate({"mix of eight": lambda: [bank.mix(w) for w in weights]}, 10)
    fusing = alternate({"fuse and unfuse": lambda: (bank.fuse(), bank.unfuse())}, 2)
    return {
        "targets": targets,
        "milliseconds": times,
        **ratios(times),
        "milliseconds of a new mix": changes["mix of eight"] / 2,
        "milliseconds of fuse and unfuse": fusing["fuse and unfuse"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--unet", action="store_true")
    parser.add_argument("--latents", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=None)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    dtype = getattr(torch, options.dtype)
    OUT.mkdir(parents=True, exist_ok=True)
    if options.unet:
        results = {
            title: measure_unet(targets, options.latents, dtype, options.rounds or 5)
            for title, targets in (("attention", ATTENTION), ("everything", EVERYTHING))
        }
        rows = list(results.items())
    else:
        results = [measure_layer(*layer, dtype, options.rounds or 60) for layer in LAYERS]
        rows = [(r["layer"], r) for r in results]
    title = f"{'unet' if options.unet else 'layers'}-{options.dtype}-{torch.get_num_threads()}"
    (OUT / f"{title}.json").write_text(json.dumps(results, indent=2) + "\n")
    heads = ["one", "many", "one, unused capacity"]
    print(f"| {title} | base ms | PEFT's one ms | ours, one | ours, eight | one with unused capacity |")
    print("|---|---|---|---|---|---|")
    for name, row in rows:
        cells = [f"{row['milliseconds'][t]:.2f}" for t in ("base", "peft, one")]
        cells += [f"{row[t]:.2f}" for t in heads]
        print(f"| {name} | " + " | ".join(cells) + " |")
    if options.unet:
        for name, row in rows:
            print(name, {k: round(v, 2) for k, v in row.items() if k.startswith("milliseconds of")})


if __name__ == "__main__":
    main()
