"""The stages of a rebuild, in order."""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.torch import save_file

from mmpeft.errors import ConfigError
from mmpeft.pocket.rebuild.assembly import assemble
from mmpeft.pocket.rebuild.autoencoder import train_autoencoder
from mmpeft.pocket.rebuild.captions import corpus
from mmpeft.pocket.rebuild.clip import examples_of, train_clip
from mmpeft.pocket.rebuild.concepts import Concept, chosen_names, read_concepts
from mmpeft.pocket.rebuild.denoiser import train_denoiser
from mmpeft.pocket.rebuild.drawings import KNOWN_SETS, SETS, draw_all, load_drawings
from mmpeft.pocket.rebuild.folders import write_folders
from mmpeft.pocket.rebuild.judges import train_concept_judge, train_style_judge
from mmpeft.pocket.rebuild.report import measure_base
from mmpeft.pocket.rebuild.sources import fetch_packages
from mmpeft.pocket.rebuild.tokenizer import build_tokenizer, learn_merges, save_tokenizer
from mmpeft.randomness import seed_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer


@dataclass(frozen=True)
class Plan:
    """How much of everything; the defaults rebuild the base that ships."""

    concepts: int | None = None
    """taught concepts; all when not given"""
    seed: int = 0
    """two rebuilds with one seed and one thread count are the same"""
    vocabulary: int = 3226
    """tokens of the tokenizer"""
    autoencoder_steps: int = 4000
    """batches of 16"""
    clip_steps: int = 1500
    """batches of 96"""
    denoiser_steps: int = 4000
    """of `denoiser_batch` pictures each"""
    denoiser_batch: int = 48
    """pictures of a step"""
    judge_steps: int = 1500
    """batches of 96 for the concept judge, of 48 for the style judge"""
    sampling_steps: int = 20
    """of the pictures that the report judges"""
    compile: bool = False
    """compile the UNet: a third faster, needs a C++ compiler"""


SMOKE = Plan(
    concepts=6,
    vocabulary=800,
    autoencoder_steps=3,
    clip_steps=2,
    denoiser_steps=3,
    denoiser_batch=8,
    judge_steps=2,
    sampling_steps=2,
)
"""every stage in seconds; what comes out is noise that loads"""

STAGES = (
    "packages", "drawings", "tokenizer", "autoencoder", "clip", "denoiser", "judges", "images", "pocket", "report.json",
)  # fmt: skip


def rebuild(work: Path, plan: Plan) -> dict[str, float]:
    """Run every stage that has not been run in this folder, and give the report.

    A stage appears under its name when it is whole; one that was stopped begins anew.

    Raises:
        ConfigError: the folder was begun with another plan, or the plan asks for too few or many concepts.
        MissingDependency: npm or resvg_py is needed and not there.
    """
    chosen_names(plan.concepts)
    work.mkdir(parents=True, exist_ok=True)
    _agree(work / "plan.json", plan)
    stages = _Stages(work, plan)
    for name in STAGES:
        if (work / name).exists():
            continue
        unfinished = work / f"{name}.partial"
        if unfinished.exists():
            shutil.rmtree(unfinished)
        begun = time.monotonic()
        getattr(stages, name.removesuffix(".json"))(unfinished)
        unfinished.rename(work / name)
        print(f"{name}: {time.monotonic() - begun:.0f} s")
    report: dict[str, float] = json.loads((work / "report.json").read_text())
    return report


def _agree(path: Path, plan: Plan) -> None:
    wanted = asdict(plan)
    if path.exists():
        begun = json.loads(path.read_text())
        others = {key: value for key, value in begun.items() if wanted.get(key) != value}
        if others:
            raise ConfigError(
                f"{path.parent} was begun with {others}; got {[wanted.get(k) for k in others]}; use another folder"
            )
    path.write_text(json.dumps(wanted, indent=2) + "\n")


class _Stages:
    """One method for each stage; it makes the folder or file that it is given from earlier stages' folders."""

    def __init__(self, work: Path, plan: Plan) -> None:
        self._work = work
        self._plan = plan

    def packages(self, target: Path) -> None:
        fetch_packages(target)

    def drawings(self, target: Path) -> None:
        draw_all(self._work / "packages", self._concepts(), target)

    def tokenizer(self, target: Path) -> None:
        draw = np.random.default_rng(seed_of(self._plan.seed, "tokenizer"))
        merges = learn_merges(corpus(self._concepts(), draw), self._plan.vocabulary)
        save_tokenizer(build_tokenizer(merges), merges, target)

    def autoencoder(self, target: Path) -> None:
        known = [load_drawings(self._work / "drawings", style).pixels for style in KNOWN_SETS]
        steps, seed = self._plan.autoencoder_steps, self._plan.seed
        train_autoencoder(np.concatenate(known), steps=steps, batch=16, seed=seed).save_pretrained(target)

    def clip(self, target: Path) -> None:
        examples = self._examples(KNOWN_SETS)
        steps, seed = self._plan.clip_steps, self._plan.seed
        train_clip(examples, self._tokenizer(), steps=steps, batch=96, seed=seed).save_pretrained(target)

    def denoiser(self, target: Path) -> None:
        from transformers import CLIPModel

        denoiser = train_denoiser(
            [example for example in self._examples(("noto",)) if example.concept.tier == "taught"],
            self._autoencoder(),
            self._tokenizer(),
            CLIPModel.from_pretrained(self._work / "clip", attn_implementation="eager").text_model,
            steps=self._plan.denoiser_steps,
            batch=self._plan.denoiser_batch,
            seed=self._plan.seed,
            is_compiled=self._plan.compile,
        )
        denoiser.unet.save_pretrained(target / "unet")
        denoiser.text_encoder.save_pretrained(target / "text_encoder")

    def judges(self, target: Path) -> None:
        drawings = {style: load_drawings(self._work / "drawings", style) for style in SETS}
        steps, seed, names = self._plan.judge_steps, self._plan.seed, self._taught()
        concept_judge = train_concept_judge(drawings, names, steps=steps, batch=96, seed=seed)
        concepts = {concept.name: concept for concept in self._concepts()}
        style_judge, accuracy = train_style_judge(
            drawings, concepts, self._autoencoder(), steps=steps, batch=48, seed=seed
        )
        print(f"style judge, concepts that it never saw: {accuracy:.0%} right")
        target.mkdir()
        save_file(concept_judge.state_dict(), target / "concept_judge.safetensors")
        save_file(style_judge.state_dict(), target / "style_judge.safetensors")
        (target / "concept_judge.json").write_text(json.dumps(names))

    def images(self, target: Path) -> None:
        write_folders(self._work / "packages", self._concepts(), target)

    def pocket(self, target: Path) -> None:
        assemble(self._work, target)

    def report(self, target: Path) -> None:
        steps, seed = self._plan.sampling_steps, self._plan.seed
        measured = measure_base(self._work / "pocket", self._taught(), sampling_steps=steps, seed=seed)
        target.write_text(json.dumps(measured, indent=2) + "\n")

    def _concepts(self) -> list[Concept]:
        return read_concepts(self._work / "packages", self._plan.concepts)

    def _taught(self) -> list[str]:
        return [concept.name for concept in self._concepts() if concept.tier == "taught"]

    def _examples(self, styles: Sequence[str]) -> list[Any]:
        drawings = [load_drawings(self._work / "drawings", style) for style in styles]
        return examples_of(drawings, {concept.name: concept for concept in self._concepts()})

    def _tokenizer(self) -> "CLIPTokenizer":
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(self._work / "tokenizer")

    def _autoencoder(self) -> "AutoencoderKL":
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_pretrained(self._work / "autoencoder").eval()
