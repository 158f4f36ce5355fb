"""Composition, live mixing and fusing side by side with PEFT and diffusers, in one run on one core.

    make bench-fusion      # four minutes of one core; writes results/fusion.json and the README's table from it

Weights are noise in the shapes of Stable Diffusion 1.5, adapters have rank 16. The sides of a comparison take turns,
round by round; a figure is the median of the rounds in processor time, a ratio that of two medians. Milliseconds belong
to the machine, ratios less.
"""

import copy
import json
import math
import os
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fusion_table import RANK, table
from readme_table import place
from sd15_shapes import unet_of_sd15

RESULTS = Path(__file__).parent / "results" / "fusion.json"
MANY = 8
WEIGHTS = (1.0, 0.7, -0.5, 0.3)
CYCLES = 100
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
EVERYTHING = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2")
SVD_LAYERS = (
    (320, 320),
    (640, 640),
    (1280, 1280),
    (1280, 768),
    (320, 1280),
    (320, 320, 3, 3),
    (640, 320, 3, 3),
)
# Seconds each for PEFT, so measured once and only for the sum; those that are larger still are not measured at all.
SVD_LARGE = ((640, 768), (2560, 320), (640, 2560), (5120, 640), (640, 640, 3, 3), (1280, 5120), (10240, 1280))
# (title, the weight's shape, a convolution's side or a linear layer's tokens)
LIVE_LAYERS = (
    ("linear 320, 4096 tokens", (320, 320), 4096),
    ("linear 1280, 256 tokens", (1280, 1280), 256),
    ("conv 320, 32 x 32", (320, 320, 3, 3), 32),
    ("conv 1280, 8 x 8", (1280, 1280, 3, 3), 8),
)


# What the processor spent on this process: with one thread it is the time that passes on a quiet machine, and it stays
# that on a busy one.
clock = time.process_time


def alternate(sides: dict[str, Callable[[], object]], rounds: int, *, warm: bool = True) -> dict[str, float]:
    """Let all sides take turns; give the median milliseconds of each, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(0 if warm else 1, rounds + 1):
        for name, run in sides.items():
            start = clock()
            run()
            if number:
                times[name].append(1000 * (clock() - start))
    return {name: statistics.median(each) for name, each in times.items()}


def lora(shape: tuple[int, ...], seed: int) -> Any:
    """Draw a LoRA layer whose singular values fall by a fifth from one to the next."""
    import torch

    from mmpeft.methods.lora import LoraLayer

    generator = torch.Generator().manual_seed(seed)
    fall = 0.8 ** torch.arange(RANK).float()
    A = torch.randn(RANK, *shape[1:], generator=generator) / math.sqrt(math.prod(shape[1:]))
    B = 0.1 * torch.randn(shape[0], RANK, generator=generator) * fall
    return LoraLayer(A, B.reshape(*B.shape, *[1] * (len(shape) - 2)), float(RANK))


def adapter_for(shapes: dict[str, tuple[int, ...]], seed: int) -> Any:
    from mmpeft.adapter import Adapter

    return Adapter({name: lora(shape, 1000 * seed + n) for n, (name, shape) in enumerate(shapes.items())})


def layer_of(shape: tuple[int, ...]) -> Any:
    from torch import nn

    out, inputs, *kernel = shape
    return nn.Conv2d(inputs, out, tuple(kernel), padding=1) if kernel else nn.Linear(inputs, out)


def peft_svd(shape: tuple[int, ...], adapters: list[Any]) -> tuple[Callable[..., None], Callable[[], Any]]:
    """Load adapters into PEFT on a model of one layer; give its fusion, and what reads the result's change."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    model = get_peft_model(nn.Sequential(layer_of(shape)), config, adapter_name="a0")
    names = [f"a{n}" for n in range(len(adapters))]
    for name in names[1:]:
        model.add_adapter(name, config)
    (wrapped,) = (module for module in model.modules() if hasattr(module, "lora_A"))
    with torch.no_grad():
        for name, layer in zip(names, adapters, strict=True):
            wrapped.lora_A[name].weight.copy_(layer.lora_A)
            wrapped.lora_B[name].weight.copy_(layer.lora_B)

    def fuse(**how: Any) -> None:
        if "fused" in model.peft_config:
            model.delete_adapter("fused")
        model.add_weighted_adapter(
            names, list(WEIGHTS), "fused", combination_type="svd", svd_rank=RANK, **how
        )

    def change() -> Any:
        B, A = wrapped.lora_B["fused"].weight, wrapped.lora_A["fused"].weight
        return (B.flatten(1) @ A.flatten(1)).detach()

    return fuse, change


def measure_svd() -> list[dict[str, Any]]:
    """(a) One layer's best rank-16 approximation of four weighted adapters."""
    from mmpeft import plugins

    strategy = plugins.get("strategy", "svd")
    rows = []
    for shape in SVD_LAYERS:
        layers = [lora(shape, n) for n in range(len(WEIGHTS))]
        deltas = [(layer.delta(), weight) for layer, weight in zip(layers, WEIGHTS, strict=True)]
        exact = sum(weight * delta.dense().double() for delta, weight in deltas).flatten(1)
        fuse, change = peft_svd(shape, layers)
        sides = {
            # ten in a row, as a composition goes on from layer to layer
            "ours": lambda deltas=deltas: [strategy(deltas, rank=RANK) for _ in range(10)],
            "peft": fuse,
            "peft, thin": lambda fuse=fuse: fuse(svd_full_matrices=False),
        }
        times = alternate(sides, 3)
        times["ours"] /= 10
        fuse()
        found = {"ours": strategy(deltas, rank=RANK).dense().flatten(1), "peft": change()}
        errors = {name: float((each.double() - exact).norm() / exact.norm()) for name, each in found.items()}
        rows.append(
            {
                "layer": list(shape),
                "milliseconds": times,
                "error": errors,
                "ratio": times["peft"] / times["ours"],
                "ratio to thin": times["peft, thin"] / times["ours"],
            }
        )
        print(shape, rows[-1], flush=True)
    return rows


def target_shapes(model: Any, targets: Iterable[str], component: str = "unet") -> dict[str, tuple[int, ...]]:
    from mmpeft.injection import shapes

    targets = tuple(targets)
    named = {name: f".{name}" for name in shapes({component: model})}
    every = shapes({component: model})
    return {
        name: every[name]
        for name, dotted in named.items()
        if dotted.endswith(tuple(f".{t}" for t in targets))
    }


def measure_composition(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """(b) A whole adapter of four SD 1.5-shaped ones, against PEFT's time extrapolated from the layers of (a).

    A layer that was not sampled counts as the slowest sampled one that is no larger, which is less than it takes.
    """
    import torch

    import mmpeft
    from mmpeft.delta import matrix_shape

    shapes = target_shapes(unet_of_sd15(torch.float32, "meta"), EVERYTHING)
    adapters = [adapter_for(shapes, seed) for seed in range(len(WEIGHTS))]
    start = clock()
    _, report = mmpeft.compose(list(zip(adapters, WEIGHTS, strict=True)), "svd", rank=RANK)
    seconds = clock() - start
    sampled = {matrix_shape(row["layer"]): row["milliseconds"]["peft"] / 1000 for row in rows}
    for shape in SVD_LARGE:
        fuse, _ = peft_svd(shape, [lora(shape, n) for n in range(len(WEIGHTS))])
        sampled[matrix_shape(shape)] = alternate({"": fuse}, 1, warm=False)[""] / 1000
    counts = Counter(map(matrix_shape, shapes.values()))
    dense = sum(
        count * sampled.get(shape, max(t for other, t in sampled.items() if work(other) <= work(shape)))
        for shape, count in counts.items()
    )
    return {
        "layers": len(shapes),
        "layers whose shape was timed": sum(count for shape, count in counts.items() if shape in sampled),
        "seconds": seconds,
        "error": float(report.error),
        "peft seconds, at least": dense,
    }


def work(matrix: tuple[int, int]) -> int:
    """Say what a dense singular value decomposition grows with."""
    return math.prod(matrix) * min(matrix)


def twin(model: Any) -> Any:
    """Copy the modules, not the weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def with_peft(model: Any, targets: tuple[str, ...]) -> Any:
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    theirs = twin(model)
    inject_adapter_in_model(
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(targets), init_lora_weights="gaussian"),
        theirs,
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return theirs.to(next(model.parameters()).dtype).eval()


def with_bank(model: Any, shapes: dict[str, tuple[int, ...]], count: int) -> Any:
    import mmpeft

    ours = twin(model)
    bank = mmpeft.attach(ours)
    for number in range(count):
        bank.load(adapter_for(shapes, number), f"a{number}")
    bank.mix({f"a{number}": 0.5 + 0.1 * number for number in range(count)})
    return ours


def measure_live(
    model: Any, component: str, targets: tuple[str, ...], inputs: tuple[Any, ...], rounds: int
) -> dict[str, Any]:
    """(c) One and eight live adapters, against PEFT's one."""
    import torch

    shapes = target_shapes(model, targets, component)
    models = {
        "base": model,
        "peft, one": with_peft(model, targets),
        "ours, one": with_bank(model, shapes, 1),
        "ours, eight": with_bank(model, shapes, MANY),
    }
    with torch.no_grad():
        times = alternate({name: lambda m=m: m(*inputs) for name, m in models.items()}, rounds)
    theirs = times["peft, one"]
    result = {
        "milliseconds": times,
        "one": times["ours, one"] / theirs,
        "eight": times["ours, eight"] / theirs,
    }
    print(result, flush=True)
    return result


def measure_all_live() -> dict[str, Any]:
    import torch
    from torch import nn

    from mmpeft.backbones.stable_diffusion_files import load_pipeline

    results = {}
    for title, shape, size in LIVE_LAYERS:
        x = torch.randn(2, size, shape[1]) if len(shape) == 2 else torch.randn(2, shape[1], size, size)
        results[title] = measure_live(nn.Sequential(layer_of(shape)), "language_model", ("0",), (x,), 30)
    unet = load_pipeline("pocket").unet
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    inputs = torch.randn(2, unet.config.in_channels, side, side), 500, torch.randn(2, 32, width)
    results["pocket UNet"] = measure_live(unet, "unet", EVERYTHING, inputs, 20)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        inputs = torch.randn(1, 4, 32, 32).to(dtype), 500, torch.randn(1, 77, 768).to(dtype)
        results[f"SD 1.5 UNet at 256 px, {name}"] = measure_live(
            unet_of_sd15(dtype), "unet", EVERYTHING, inputs, 5
        )
    return results


def pocket(dtype: Any) -> Any:
    from mmpeft.backbones.stable_diffusion_files import load_pipeline

    return load_pipeline("pocket").to(dtype)


def measure_switching(folder: Path) -> dict[str, Any]:
    """(d) A new mix of eight, another one of eight, and a ninth loaded from its file, with its first prediction."""
    import torch

    import mmpeft

    ours, theirs = pocket(torch.float32), pocket(torch.float32)
    shapes = target_shapes(ours.unet, ATTENTION)
    bank = mmpeft.attach(ours)
    names = [f"a{number}" for number in range(MANY)]
    for number, name in enumerate(names):
        adapter_for(shapes, number).save(folder / name)
        bank.load(folder / name, name)
        theirs.load_lora_weights(folder / name, adapter_name=name)
    adapter_for(shapes, MANY).save(folder / "new")
    unet = ours.unet
    inputs = (
        torch.randn(2, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size),
        500,
        torch.randn(2, 32, unet.config.cross_attention_dim),
    )
    turn = iter(range(10**6))

    def predict(pipeline: Any) -> None:
        with torch.no_grad():
            pipeline.unet(*inputs)

    def new_mix() -> list[float]:
        step = next(turn)
        return [0.1 * ((number + step) % MANY) + 0.1 for number in range(MANY)]

    def load_ours() -> None:
        bank.load(folder / "new", "new")
        bank.mix(new=1.0)

    def load_theirs() -> None:
        theirs.load_lora_weights(folder / "new", adapter_name="new")
        theirs.set_adapters("new")

    def unload() -> None:
        bank.unload("new")
        theirs.delete_adapters("new")

    bank.mix(dict.fromkeys(names, 0.1))
    predict(ours)
    mixing = alternate(
        {
            "ours": lambda: bank.mix(dict(zip(names, new_mix(), strict=True))),
            "diffusers": lambda: theirs.set_adapters(names, new_mix()),
        },
        20,
    )
    switching = alternate(
        {
            "ours": lambda: bank.mix({names[next(turn) % MANY]: 1.0}),
            "diffusers": lambda: theirs.set_adapters(names[next(turn) % MANY]),
        },
        20,
    )
    loading = alternate({"ours": load_ours, "diffusers": load_theirs, "": unload}, 5)
    # what is put off until the next prediction counts here
    using = alternate(
        {
            "ours": lambda: (load_ours(), predict(ours)),
            "diffusers": lambda: (load_theirs(), predict(theirs)),
            "": unload,
        },
        5,
    )
    found = {
        "new mix of eight": mixing,
        "switch among eight": switching,
        "load": loading,
        "load and predict": using,
    }
    return {
        title: {
            "milliseconds": {name: each for name, each in times.items() if name},
            "ratio": times["diffusers"] / times["ours"],
            "against load_lora_weights": loading["diffusers"] / times["ours"],
        }
        for title, times in found.items()
    }


def measure_fusing(folder: Path) -> dict[str, Any]:
    """(e) Fuse and unfuse the pocket base in bfloat16 at weights that vary, and what is left of it after 100 cycles."""
    import torch

    import mmpeft

    ours, theirs = pocket(torch.bfloat16), pocket(torch.bfloat16)
    before = {name: weight.clone() for name, weight in ours.unet.state_dict().items()}
    adapter = adapter_for(target_shapes(ours.unet, EVERYTHING), 0)
    adapter.save(folder / "adapter")
    bank = mmpeft.attach(ours)
    bank.load(folder / "adapter", "a")
    theirs.load_lora_weights(folder / "adapter", adapter_name="a")
    times: dict[str, list[float]] = {}

    def timed(title: str, run: Callable[[], object]) -> None:
        start = clock()
        run()
        times.setdefault(title, []).append(1000 * (clock() - start))

    for cycle in range(CYCLES):
        weight = 0.2 + 0.8 * ((37 * cycle) % CYCLES) / CYCLES
        bank.mix(a=weight)
        timed("ours, fuse", bank.fuse)
        timed("ours, unfuse", bank.unfuse)
        # their weight of the adapter, as fuse_lora's own scale multiplies from cycle to cycle
        theirs.set_adapters("a", weight)
        timed("diffusers, fuse", theirs.fuse_lora)
        timed("diffusers, unfuse", theirs.unfuse_lora)
    change = math.sqrt(sum(layer.delta().norm() ** 2 for layer in adapter.values()))
    after = {
        "ours": ours.unet.state_dict(),
        "diffusers": {
            name.replace(".base_layer.", "."): weight
            for name, weight in theirs.unet.state_dict().items()
            if ".lora_" not in name
        },
    }
    return {
        "milliseconds": {title: statistics.median(each) for title, each in times.items()},
        "cycles": CYCLES,
        "drift": {side: drift(before, weights, change) for side, weights in after.items()},
    }


def drift(before: dict[str, Any], after: dict[str, Any], change: float) -> dict[str, float]:
    """Say what is left: bytes that differ, and the distance as a share of the adapter's whole change at weight 1."""
    import torch

    pairs = [(weight, after[name]) for name, weight in before.items()]
    differ = sum(int((a.view(torch.uint8) != b.view(torch.uint8)).sum()) for a, b in pairs)
    distance = math.sqrt(sum(float((a.float() - b.float()).norm()) ** 2 for a, b in pairs))
    return {"bytes that differ": differ, "distance over the change": distance / change}


def main() -> None:
    from mmpeft.cli import quieten_libraries

    quieten_libraries(os.environ)
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    svd = measure_svd()
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "versions": {name: version(name) for name in ("torch", "peft", "diffusers")},
            "svd": svd,
            "composition": measure_composition(svd),
            "live": measure_all_live(),
            "switching": measure_switching(Path(folder) / "switching"),
            "fusing": measure_fusing(Path(folder) / "fusing"),
        }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rounded(results), indent=2) + "\n")
    place("bench-fusion", table(rounded(results)))
    print(table(rounded(results)))
    print(f"{time.perf_counter() - started:.0f} s")


def rounded(value: Any) -> Any:
    """Keep what was measured: four digits, errors eight."""
    if isinstance(value, dict):
        return {
            key: each if key == "error" and isinstance(each, dict) else rounded(each)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
