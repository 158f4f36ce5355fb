import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from mmpeft.backbones.stable_diffusion import StableDiffusion
from mmpeft.backbones.stable_diffusion_files import load_pipeline, plain_title
from mmpeft.config import BaseSettings
from mmpeft.errors import BaseError


def test_a_single_file_with_the_original_names_is_the_same_base(single_file, config_folder, tiny_sd_folder):
    settings = BaseSettings(name=str(single_file), config=config_folder, precision="fp32")
    backbone = StableDiffusion.open(settings)
    folder = load_pipeline(str(tiny_sd_folder))
    assert backbone.title == "tiny-single"
    assert backbone.noise_schedule.prediction == "v"
    for model, expected in (
        (backbone.components["unet"], folder.unet),
        (backbone.components["text_encoder"], folder.text_encoder),
        (backbone.pipeline().vae, folder.vae),
    ):
        actual = model.state_dict()
        for name, weight in expected.state_dict().items():
            assert torch.equal(actual[name], weight), name
    (ours,) = backbone.generate(["a cat"], seeds=[0], steps=2, guidance=2.0)
    (theirs,) = StableDiffusion.open(BaseSettings(name=str(tiny_sd_folder), precision="fp32")).generate(
        ["a cat"], seeds=[0], steps=2, guidance=2.0
    )
    assert ours.tobytes() == theirs.tobytes()


def test_a_single_file_without_its_configuration_says_what_to_give(single_file):
    with pytest.raises(
        BaseError, match=r"tiny-single.safetensors cannot be read .* give base.config, a diffusers"
    ):
        load_pipeline(str(single_file))


def test_a_single_file_of_another_architecture_is_refused(tmp_path, config_folder):
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(BaseError, match=r"other.safetensors cannot be read as Stable Diffusion"):
        load_pipeline(str(tmp_path / "other.safetensors"), config_folder)


def test_a_config_folder_must_be_one(single_file, tmp_path):
    with pytest.raises(
        BaseError, match=r"base.config: .* has no model_index.json; weights are not needed there"
    ):
        load_pipeline(str(single_file), tmp_path)


def test_a_hub_name_that_cannot_be_reached_says_what_to_do():
    with pytest.raises(
        BaseError, match=r"no base of this name could be had from the hub; check the name and the connection"
    ):
        load_pipeline("nobody/no-such-base")


def test_a_mistyped_pocket_is_suggested():
    with pytest.raises(BaseError, match=r"there is no folder pockt here; did you mean 'pocket'?"):
        load_pipeline("pockt")


def test_a_mistyped_folder_or_file_suggests_its_neighbour(tiny_sd_folder, single_file):
    with pytest.raises(BaseError, match=r"there is no base .*tiny-ds; did you mean 'tiny-sd'?"):
        load_pipeline(str(tiny_sd_folder.with_name("tiny-ds")))
    with pytest.raises(BaseError, match=r"there is no base .*; did you mean 'tiny-single.safetensors'?"):
        load_pipeline(str(single_file.with_name("tiny-singel.safetensors")))


def test_a_folder_that_is_no_base_is_told_apart_from_a_component(tmp_path, tiny_sd_folder):
    with pytest.raises(BaseError, match=r"is no diffusers folder: it has no model_index.json$"):
        load_pipeline(str(tmp_path))
    with pytest.raises(BaseError, match=r"it is one component: give the folder above it"):
        load_pipeline(str(tiny_sd_folder / "unet"))


def test_another_family_is_refused_by_its_class(tmp_path, tiny_sd_folder):
    folder = shutil.copytree(tiny_sd_folder, tmp_path / "xl")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "CLIPTextModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(BaseError, match=r"xl is a StableDiffusionXLPipeline; this backbone takes"):
        load_pipeline(str(folder))


def test_an_inpainting_base_is_refused(tmp_path, tiny_sd_folder):
    from diffusers import UNet2DConditionModel

    folder = shutil.copytree(tiny_sd_folder, tmp_path / "inpaint")
    config = UNet2DConditionModel.load_config(folder / "unet")
    UNet2DConditionModel.from_config({**config, "in_channels": 9}).save_pretrained(folder / "unet")
    with pytest.raises(BaseError, match=r"takes 9 input channels where its VAE gives 4"):
        load_pipeline(str(folder))


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt"])
def test_pickles_are_never_opened(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"cos\nsystem\n")
    with pytest.raises(BaseError, match=r"is a pickle file, which can run code"):
        load_pipeline(str(path))


def test_pickles_inside_a_folder_are_never_opened(tmp_path, tiny_sd_folder):
    folder = shutil.copytree(tiny_sd_folder, tmp_path / "pickled")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(BaseError, match=r"pickled cannot be read"):
        load_pipeline(str(folder))


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("pocket", "pocket"),
        ("stabilityai/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1"),
        ("/home/someone/models/my base.safetensors", "my base"),
        ("./models/mine/", "mine"),
    ],
)
def test_titles_are_names_and_never_paths(name, title):
    assert plain_title(name) == title


def test_loading_is_silent_and_puts_logging_back(tiny_sd_folder, capfd):
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = (diffusers_logging.get_verbosity(), transformers_logging.get_verbosity())
    pipeline = load_pipeline(str(tiny_sd_folder))
    assert capfd.readouterr() == ("", "")
    assert (diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()) == before
    assert transformers_logging.is_progress_bar_enabled()
    assert not pipeline.unet.training
