"""The recipe of the pocket base: what it draws, says, keeps unseen and trains, on packages that are drawn here."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

import mmpeft
from mmpeft.errors import ConfigError, DataError, MissingDependency, TrainingError
from mmpeft.pocket.rebuild.autoencoder import SCALING, build_autoencoder, standardise_latents
from mmpeft.pocket.rebuild.captions import caption, corpus
from mmpeft.pocket.rebuild.clip import Example, build_clip, show
from mmpeft.pocket.rebuild.colours import (
    BACKGROUNDS,
    HUES,
    PAINTS,
    is_kept_unseen,
    main_hue,
    paint,
    paintable_hue,
)
from mmpeft.pocket.rebuild.concepts import (
    CAT_HELD_OUT,
    CAT_TRAIN,
    HELD_OUT,
    STYLE_TRAIN,
    Concept,
    chosen_names,
    read_concepts,
)
from mmpeft.pocket.rebuild.denoiser import (
    build_noise_schedule,
    build_unet,
    draw_timesteps,
    loss_weights,
    training_pictures,
)
from mmpeft.pocket.rebuild.drawings import SETS, put_on
from mmpeft.pocket.rebuild.recipe import SMOKE, rebuild
from mmpeft.pocket.rebuild.report import unseen_pairs
from mmpeft.pocket.rebuild.sources import fetch_packages
from mmpeft.pocket.rebuild.tokenizer import END, build_tokenizer, learn_merges
from mmpeft.pocket.rebuild.training import MuonForKernels, fit, learning_rate_share

SHIPPED = Path(mmpeft.__file__).parent / "pocket"


def write_packages(folder: Path, names: list[str]) -> None:
    """Draw the packages that a rebuild reads: each concept a shape and colour of its own, each set a size."""
    codes = {f"1F{index:03X}-FE0F": name for index, name in enumerate(names)}
    words = [
        {"label": name.title(), "hexcode": code, "emoji": chr(0x1F000 + i), "tags": ["thing"], "group": 4}
        for i, (code, name) in enumerate(codes.items())
    ]
    (folder / "emojibase-data/en").mkdir(parents=True)
    (folder / "emojibase-data/en/data.json").write_text(json.dumps(words))
    (folder / "emojilib/dist").mkdir(parents=True)
    (folder / "emojilib/dist/emoji-en-US.json").write_text(
        json.dumps({words[0]["emoji"]: ["x", "big_thing"]})
    )
    for style, (package, _) in SETS.items():
        icons = {
            f"icon-{index}": {"body": shape(index, len(names), style), "height": 30}
            for index in range(len(names))
        }
        found = {} if style == "fluent-3d" else {code: f"icon-{i}" for i, code in enumerate(codes)}
        (folder / package).mkdir()
        content = {"icons": icons, "width": 32, "height": 32}
        (folder / package / "icons.json").write_text(json.dumps(content))
        (folder / package / "chars.json").write_text(json.dumps(found))


def shape(index: int, count: int, style: str) -> str:
    colour = "currentColor" if style == "high-contrast" else f"hsl({360 * index // count}, 80%, 50%)"
    if index % 2:
        return f'<circle cx="16" cy="15" r="{8 + index % 5}" fill="{colour}"/>'
    return f'<rect x="4" y="5" width="{14 + index % 9}" height="20" fill="{colour}"/>'


def example(name: str = "red apple", hue: float = 0.0) -> Example:
    drawing = np.zeros((64, 64, 4), np.uint8)
    drawing[16:48, 16:48] = (220, 20, 20, 255)
    return Example(
        drawing, Concept(name, "0", ("fruit", "red fruit"), ("apple",), "taught", False), hue, "red"
    )


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Rebuild twice from the same packages."""
    works = [tmp_path_factory.mktemp("rebuilt") for _ in range(2)]
    for work in works:
        write_packages(work / "packages", list(chosen_names(SMOKE.concepts)))
        rebuild(work, SMOKE)
    return works


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_smoke_rebuild_ends_in_a_pipeline_that_draws(rebuilt: list[Path]) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(rebuilt[0] / "pocket/sd").to(dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    picture = pipeline(
        "red apple", num_inference_steps=2, guidance_scale=4.0, generator=generator, output_type="np"
    ).images
    assert picture.shape == (1, 64, 64, 3)
    assert np.isfinite(picture).all()
    assert picture.std() > 0


@pytest.mark.slow
def test_smoke_rebuild_has_the_layout_and_configs_of_what_ships(rebuilt: list[Path]) -> None:
    pocket = rebuilt[0] / "pocket"
    for part in ("sd", "clip", "judges"):
        assert files_of(pocket / part).keys() == files_of(SHIPPED / part).keys()
    own = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")  # the vocabulary is smaller
    for path in SHIPPED.glob("*/**/config.json"):
        configs = [json.loads((root / path.relative_to(SHIPPED)).read_text()) for root in (pocket, SHIPPED)]
        for config in configs:
            for holder in (config, config.get("text_config", {})):
                for key in own:
                    holder.pop(key, None)
        assert configs[0] == configs[1], path
    with safe_open(pocket / "sd/unet/diffusion_pytorch_model.safetensors", "pt") as unet:
        assert {unet.get_tensor(key).dtype for key in unet.keys()} == {torch.float16}  # noqa: SIM118


@pytest.mark.slow
def test_rebuilds_with_one_seed_are_the_same_bytes(rebuilt: list[Path]) -> None:
    first, second = (files_of(work / "pocket") for work in rebuilt)
    assert first == second
    assert (rebuilt[0] / "report.json").read_text() == (rebuilt[1] / "report.json").read_text()


@pytest.mark.slow
def test_rebuild_keeps_what_is_made_and_refuses_another_plan(rebuilt: list[Path]) -> None:
    work = rebuilt[0]
    before = {path: path.stat().st_mtime_ns for path in (work / "pocket").rglob("*")}
    report = rebuild(work, SMOKE)
    assert report == json.loads((work / "report.json").read_text())
    assert before == {path: path.stat().st_mtime_ns for path in (work / "pocket").rglob("*")}
    with pytest.raises(ConfigError, match=r"begun with \{'seed': 0\}; got \[1\]"):
        rebuild(work, replace(SMOKE, seed=1))


@pytest.mark.slow
def test_rebuilt_folders_hold_out_what_adapters_are_judged_by(rebuilt: list[Path]) -> None:
    images = rebuilt[0] / "pocket/images"
    for style in ("high-contrast", "fluent-3d", "fluent-flat"):
        train, held = (
            {p.read_text().strip() for p in (images / style / s).glob("*.txt")} for s in ("train", "held_out")
        )
        assert train <= set(STYLE_TRAIN)
        assert held <= set(HELD_OUT)
        assert train
        assert held
    assert len(list((images / "cat/train").glob("*.png"))) == 6


@pytest.mark.slow
def test_rebuilt_latents_are_standard_for_the_denoiser(rebuilt: list[Path]) -> None:
    from diffusers import AutoencoderKL

    from mmpeft.pocket.rebuild.autoencoder import encode
    from mmpeft.pocket.rebuild.drawings import KNOWN_SETS, load_drawings

    autoencoder = AutoencoderKL.from_pretrained(rebuilt[0] / "autoencoder").eval()
    known = np.concatenate([load_drawings(rebuilt[0] / "drawings", style).pixels for style in KNOWN_SETS])
    latents = encode(autoencoder, known)[0] * SCALING
    # bfloat16 activations: three digits
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=0.05, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=0.05, rtol=0)


def test_folding_latent_statistics_changes_no_decoded_picture() -> None:
    torch.manual_seed(0)
    autoencoder = build_autoencoder().eval()
    pictures = torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        raw = autoencoder.encode(pictures).latent_dist
        decoded = autoencoder.decode(raw.mean).sample
        standardise_latents(autoencoder, raw.mean)
        folded = autoencoder.encode(pictures).latent_dist
        again = autoencoder.decode(folded.mean).sample
    torch.testing.assert_close(
        again, decoded, rtol=1e-3, atol=1e-4
    )  # float32 through two folded convolutions
    latents = folded.mean * SCALING
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), rtol=1e-3, atol=0)
    ratio = (folded.std / raw.std).mean((0, 2, 3)) * (raw.mean.std((0, 2, 3)) * SCALING)
    torch.testing.assert_close(ratio, torch.ones(4), rtol=1e-3, atol=0)


def test_architectures_are_those_of_what_ships() -> None:
    for build, part in ((build_unet, "unet"), (build_autoencoder, "vae")):
        with safe_open(SHIPPED / "sd" / part / "diffusion_pytorch_model.safetensors", "pt") as saved:
            shapes = {key: tuple(saved.get_slice(key).get_shape()) for key in saved.keys()}  # noqa: SIM118
        assert {key: tuple(value.shape) for key, value in build().state_dict().items()} == shapes
    schedule = json.loads((SHIPPED / "sd/scheduler/scheduler_config.json").read_text())
    made = dict(build_noise_schedule().config)
    assert {key: made[key] for key in schedule if not key.startswith("_")} == {
        key: value for key, value in schedule.items() if not key.startswith("_")
    }


def test_clip_of_the_shipped_tokenizer_has_the_shipped_shapes() -> None:
    from transformers import CLIPTokenizer

    clip = build_clip(CLIPTokenizer.from_pretrained(SHIPPED / "clip"))
    with safe_open(SHIPPED / "clip/model.safetensors", "pt") as saved:
        parameters = sum(math.prod(saved.get_slice(key).get_shape()) for key in saved.keys())  # noqa: SIM118
    assert sum(p.numel() for p in clip.parameters()) == parameters


def test_taught_concepts_are_the_judges_classes_in_order() -> None:
    names = [name for name, tier in chosen_names().items() if tier == "taught"]
    assert names == json.loads((SHIPPED / "judges/concept_judge.json").read_text())
    assert set(HELD_OUT) | set(STYLE_TRAIN) <= set(names)
    assert not set(HELD_OUT) & set(STYLE_TRAIN)
    assert (CAT_TRAIN | CAT_HELD_OUT).keys() <= chosen_names().keys()
    for split, wanted in (("train", STYLE_TRAIN), ("held_out", HELD_OUT)):
        captions = sorted((SHIPPED / "images/high-contrast" / split).glob("*.txt"))
        assert tuple(path.read_text().strip() for path in captions) == wanted


def test_concepts_are_read_with_keywords_and_everyday_names(tmp_path: Path) -> None:
    write_packages(tmp_path, list(chosen_names(8)))
    concepts = read_concepts(tmp_path, 8)
    assert [concept.name for concept in concepts] == list(chosen_names(8))
    assert concepts[0].keywords == ("thing", "big thing")
    assert concepts[0].code == "1f000"
    assert {c.name: c.also_called for c in concepts}["red apple"] == ("apple",)
    assert sum(concept.tier == "taught" for concept in concepts) == 8


def test_packages_of_another_version_are_named(tmp_path: Path) -> None:
    names = list(chosen_names(8))
    write_packages(tmp_path, [name for name in names if name != "pizza"])
    with pytest.raises(DataError, match=r"does not name \['pizza'\]; is it another version"):
        read_concepts(tmp_path, 8)


def test_a_plan_that_cannot_be_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="between 4 and 219; got 300"):
        rebuild(tmp_path / "work", replace(SMOKE, concepts=300))
    assert not (tmp_path / "work").exists()


def test_missing_npm_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency, match=r"needs npm.*Node\.js"):
        fetch_packages(tmp_path / "packages")


def test_no_training_picture_shows_a_pair_that_is_kept_unseen() -> None:
    choose, names = np.random.default_rng(0), HELD_OUT
    pictures = training_pictures([example(name) for name in names], choose)
    shown = {(spec.concept.name, spec.painted) for _, spec in pictures if spec.painted}
    kept = {(name, colour) for name in names for colour in PAINTS if is_kept_unseen(name, colour)}
    assert ("red apple", "blue") in kept
    assert len(kept) >= 20
    assert shown == {(name, colour) for name in names for colour in PAINTS if colour != "red"} - kept
    assert set(unseen_pairs(names, seed=0)) <= kept


def test_about_an_eighth_of_all_pairs_is_kept_unseen() -> None:
    kept = [is_kept_unseen(name, colour) for name in chosen_names() for colour in PAINTS]
    assert np.mean(kept) == pytest.approx(1 / 8, abs=0.01)  # 11,420 hashed pairs: three deviations


def test_clip_never_paints_a_pair_that_is_kept_unseen() -> None:
    choose, apple = np.random.default_rng(0), example()
    kept = [colour for colour in PAINTS if is_kept_unseen("red apple", colour)]
    texts = [show(apple, choose)[1] for _ in range(600)]
    painted = {text.split(" apple")[0].split()[-1] for text in texts if " apple" in text}
    assert painted >= set(PAINTS) - set(kept)
    assert not painted & set(kept)


def test_captions_tokenise_without_unknowns() -> None:
    choose = np.random.default_rng(0)
    concepts = [example(name).concept for name in list(chosen_names())[:60]]
    tokenizer = build_tokenizer(learn_merges(corpus(concepts, choose), 900))
    texts = [
        caption(concept, choose, painted=painted, background=background)
        for concept in concepts
        for painted, background in ((None, None), ("green", None), (None, "black"), ("pink", "gray"))
    ]
    for text in [*texts, "a sks cat, déjà vu 42!"]:
        tokens = tokenizer(text).input_ids
        assert tokens.count(tokenizer.convert_tokens_to_ids(END)) == 1  # the end; an unknown would be another
        spelled = tokenizer.decode(tokens, skip_special_tokens=True)
        assert spelled.replace(" ", "") == text.replace(" ", "")
        assert len(tokens) <= tokenizer.model_max_length
    assert len(tokenizer.tokenize("an icon of a red apple")) == 6  # common words are one token each


def test_merges_do_not_depend_on_the_order_of_a_hash_map() -> None:
    texts = corpus([example(name).concept for name in HELD_OUT], np.random.default_rng(0))
    first, *others = (learn_merges(texts, 900) for _ in range(8))
    assert all(merges == first for merges in others)


def test_captions_name_the_painted_colour_and_not_the_old_one() -> None:
    choose = np.random.default_rng(0)
    texts = [caption(example().concept, choose, painted="blue", background="gray") for _ in range(100)]
    assert all("blue apple" in text and text.endswith(" on a gray background") for text in texts)
    assert not any("red" in text for text in texts)


@pytest.mark.parametrize("colour", HUES)
def test_painting_changes_the_main_hue_and_nothing_transparent(colour: str) -> None:
    drawing = example().drawing
    hue = paintable_hue(drawing)
    assert hue is not None
    painted = paint(drawing, hue, colour)
    found, share, _ = main_hue(painted)
    assert abs((found - HUES[colour] + 180) % 360 - 180) < 4
    assert share == pytest.approx(1)
    assert (painted[..., 3] == drawing[..., 3]).all()
    assert (put_on(painted, BACKGROUNDS["blue"])[0, 0] == BACKGROUNDS["blue"]).all()


def test_noise_weights_keep_the_noisy_half_whole() -> None:
    alphas = build_noise_schedule().alphas_cumprod
    assert alphas[-1] == 0  # zero terminal SNR
    weights = loss_weights(alphas)
    assert weights.mean().item() == pytest.approx(1)
    assert weights[999] == weights.max()
    snr = alphas / (1 - alphas)
    middle = int((snr - 20).abs().argmin())
    expected = 6 / (snr[middle] + 1) / (1 / weights[999])
    torch.testing.assert_close(weights[middle], expected)


def test_timesteps_come_mostly_from_the_noisier_half() -> None:
    timesteps = draw_timesteps(2000, torch.Generator().manual_seed(0))
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    assert (timesteps >= 500).float().mean().item() == pytest.approx(0.65, abs=0.001)  # stratified


def test_muon_moves_kernels_as_torch_moves_their_matrices() -> None:
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    ours = MuonForKernels([kernel], 0.1, weight_decay=0.01)
    theirs = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        gradient = torch.randn(6, 4, 3, 3)
        kernel.grad, matrix.grad = gradient, gradient.flatten(1)
        ours.step()
        theirs.step()
    # bfloat16 orthogonalisation of columns in another order
    torch.testing.assert_close(kernel.detach().flatten(1), matrix.detach(), atol=0.02, rtol=0)
    with pytest.raises(RuntimeError, match="view"):
        MuonForKernels([nn.Parameter(torch.randn(6, 4, 3, 3))], 0.1, weight_decay=0.0)


def test_learning_rate_rises_holds_and_falls() -> None:
    shares = [learning_rate_share(done, 100, warmup=10, hold=0.5, floor=0.02) for done in range(101)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9:51] == pytest.approx([1.0] * 42)
    assert shares[50:] == sorted(shares[50:], reverse=True)
    assert shares[100] == pytest.approx(0.02)


def test_a_loss_that_is_not_finite_stops_the_stage() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(TrainingError, match="tiny: loss is nan at step 0; try a lower learning rate"):
        fit(lambda _: model.weight.sum() * math.nan, model, [optimizer], name="tiny", steps=2, warmup=1)
