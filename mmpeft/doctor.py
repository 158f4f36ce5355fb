"""What works on this machine, and how to get the rest."""

from __future__ import annotations

import base64
import hashlib
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, files, requires, version
from pathlib import Path
from typing import Literal, get_args

import torch

import mmpeft
from mmpeft.attention import AttentionChoice, set_attention
from mmpeft.backbones.pocket import pocket_folder
from mmpeft.backbones.stable_diffusion import StableDiffusion, choose_dtype
from mmpeft.config import BaseSettings
from mmpeft.errors import ConfigError, MissingDependency, MmpeftError

State = Literal["ok", "absent", "problem"]

# What an extra that a person may want is for; the others are for developing mmpeft itself.
_EXTRAS = {
    "xformers": "attention on CUDA",
    "prodigy": "train.optimizer prodigy",
    "adamw8bit": "train.optimizer adamw8bit",
    "tensorboard": "train.tracker tensorboard",
    "wandb": "train.tracker wandb",
    "demo": "the demo",
}
_WAITING = {
    "PASSIVE": "waiting threads sleep: right for a machine that does other things too",
    "ACTIVE": "waiting threads spin: 20 to 40 times slower as soon as anything else runs on the cores",
}
_LITTLE_DISK = 2 * 1024**3  # bytes; a run at the size of Stable Diffusion 1.5 with its caches and checkpoints


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        topic: heading that it stands under.
        state: "ok", "absent" (not there, and nothing wrong with that) or "problem".
        sentence: what was found, and what to do where something can be done.
    """

    topic: str
    state: State
    sentence: str


@dataclass(frozen=True)
class DoctorReport:
    """Everything that `examine` looked at, in order."""

    checks: tuple[Check, ...]

    @property
    def problems(self) -> tuple[Check, ...]:
        """What should be mended."""
        return tuple(check for check in self.checks if check.state == "problem")

    def text(self) -> str:
        """Give the report for a terminal."""
        lines: list[str] = []
        for topic in dict.fromkeys(check.topic for check in self.checks):
            lines.append(topic)
            checks = (check for check in self.checks if check.topic == topic)
            lines += [f"  {check.state:<7}  {check.sentence}" for check in checks]
        count = len(self.problems)
        lines += [
            "",
            f"{count} problem{'s' * (count > 1)} found" if count else "everything that is needed works",
        ]
        return "\n".join(lines)


def examine() -> DoctorReport:
    """Look at Python, packages, processor, attention, disk, the embedded base and plugins; a few seconds.

    Nothing is written and nothing is downloaded. What fails is in the report: nothing is raised.
    """
    return DoctorReport(
        (
            *_packages(),
            *_machine(),
            *_attention(),
            *_extras(),
            _disk(Path.cwd()),
            *_embedded_base(pocket_folder()),
            *_plugins(),
        )
    )


def _packages() -> Iterator[Check]:
    from packaging.requirements import Requirement

    system = f"{platform.system()} {platform.machine()}"
    yield Check(
        "packages", "ok", f"mmpeft {mmpeft.__version__}, Python {platform.python_version()}, {system}"
    )
    for text in requires("mmpeft") or ():
        needed = Requirement(text)
        if needed.marker is None:
            found = _version(needed.name)
            if found is None:
                yield Check("packages", "problem", f"{needed.name} is not installed: pip install '{needed}'")
            elif not needed.specifier.contains(found, prereleases=True):
                yield Check(
                    "packages", "problem", f"{needed.name} {found} is too old: pip install '{needed}'"
                )
            else:
                yield Check("packages", "ok", f"{needed.name} {found} (needs {needed.specifier})")


def _machine() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    units = ", ".join((capability, *_matrix_units()))
    yield Check("machine", "ok", f"cores: {cores}; threads of torch: {torch.get_num_threads()}; {units}")
    policy = os.environ.get("OMP_WAIT_POLICY", "").upper()
    spins = policy != "PASSIVE" and "GOMP_SPINCOUNT" not in os.environ
    advice = f"OMP_WAIT_POLICY is {policy or 'not set'}: {_WAITING.get(policy, _WAITING['ACTIVE'])}"
    if spins:
        advice += "; set OMP_WAIT_POLICY=PASSIVE before Python starts (the mmpeft command does it by itself)"
    yield Check("machine", "problem" if spins else "ok", advice)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        yield Check("machine", "ok", f"CUDA: {properties.name}, {properties.total_memory / 1024**3:.0f} GB")
    else:
        yield Check("machine", "absent", "no CUDA device: everything runs on the CPU")
    if torch.backends.mps.is_available():
        yield Check(
            "machine", "absent", "there is an Apple GPU (MPS), which mmpeft does not use: it runs on the CPU"
        )
    dtype = choose_dtype("auto", device)
    native = "which this machine computes natively" if dtype != torch.float32 else "the only fast one here"
    name = str(dtype).removeprefix("torch.")
    yield Check("machine", "ok", f"base.precision auto is {name}, {native}")


def _matrix_units() -> list[str]:
    """Name the units of the processor that multiply bfloat16, where the system tells its flags (Linux)."""
    flags = Path("/proc/cpuinfo")
    known = {"amx_bf16": "AMX bf16", "avx512_bf16": "AVX512 bf16"}
    told = set(flags.read_text(encoding="utf-8").split()) if flags.is_file() else set()
    return [title for flag, title in known.items() if flag in told]


def _attention() -> Iterator[Check]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_dtype("auto", device)
    for choice in get_args(AttentionChoice):
        try:
            set_attention({}, choice, device=device, dtype=dtype)
        except (ConfigError, MissingDependency) as error:
            yield Check("attention", "absent", str(error).removeprefix("base.attention: "))
        else:
            yield Check(
                "attention",
                "ok",
                "auto: sdpa, unless plan --measure finds better" if choice == "auto" else choice,
            )


def _extras() -> Iterator[Check]:
    from packaging.requirements import Requirement

    needed = [Requirement(text) for text in requires("mmpeft") or ()]
    for extra, purpose in _EXTRAS.items():
        for package in needed:
            if package.marker is None or not package.marker.evaluate({"extra": extra}):
                continue
            found = _version(package.name)
            get = f"pip install 'mmpeft[{extra}]'"
            if found is None:
                yield Check("optional", "absent", f"{package.name}, for {purpose}: {get}")
            elif not package.specifier.contains(found, prereleases=True):
                yield Check(
                    "optional", "problem", f"{package.name} {found} is older than {package.specifier}: {get}"
                )
            else:
                yield Check("optional", "ok", f"{package.name} {found}, for {purpose}")


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    sentence = f"{free / 1024**3:.1f} GB free in {folder}"
    if free < _LITTLE_DISK:
        return Check(
            "disk",
            "problem",
            f"{sentence}; caches and checkpoints may not fit: make room, or use another --out",
        )
    return Check("disk", "ok", sentence)


def _embedded_base(folder: Path) -> Iterator[Check]:
    topic = "embedded base"
    changed = _changed_files(folder)
    if changed:
        yield Check(
            topic, "problem", f"{len(changed)} files are not as installed, first {changed[0]}: install again"
        )
    try:
        backbone = StableDiffusion.open(BaseSettings())
        (picture,) = backbone.generate(["red apple"], seeds=[0], steps=2, guidance=4.0)
    except (MmpeftError, OSError, ValueError, RuntimeError) as error:
        yield Check(topic, "problem", f"the embedded base cannot draw: {error}; install mmpeft again")
        return
    # What is not finite becomes one flat colour on its way to eight bits.
    if len(picture.getcolors(maxcolors=picture.width * picture.height) or ()) < 2:
        yield Check(
            topic, "problem", f"it draws one flat colour in {backbone.compute_dtype}; try --precision fp32"
        )
    else:
        digest = _digest(sorted(folder.rglob("*.safetensors")))
        yield Check(
            topic, "ok", f"draws, with attention {backbone.attention}; sha256 of its weights {digest[:16]}"
        )


def _changed_files(folder: Path) -> list[str]:
    """Compare with the digests that a wheel's installation keeps; an editable one keeps none."""
    changed = []
    for file in files("mmpeft") or ():
        path = Path(str(file.locate()))
        if file.hash and path.is_relative_to(folder):
            found = hashlib.new(file.hash.mode, path.read_bytes() if path.is_file() else b"").digest()
            if base64.urlsafe_b64encode(found).rstrip(b"=").decode() != file.hash.value:
                changed.append(file.name)
    return changed


def _plugins() -> Iterator[Check]:
    points = entry_points(group="mmpeft.plugins")
    for point in points:
        package = point.dist.name if point.dist else "unknown package"
        try:
            point.load()
        except Exception as error:
            kind = type(error).__name__
            sentence = (
                f"{point.name} of {package} cannot be loaded ({kind}: {error}); mend or uninstall {package}"
            )
            yield Check("plugins", "problem", sentence)
        else:
            yield Check("plugins", "ok", f"{point.name} of {package}")
    if not points:
        yield Check("plugins", "ok", "no other package brings any")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _digest(paths: Sequence[Path]) -> str:
    state = hashlib.sha256()
    for path in paths:
        state.update(path.read_bytes())
    return state.hexdigest()
