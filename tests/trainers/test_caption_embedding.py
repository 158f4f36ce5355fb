import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import mmpeft
from mmpeft.adapter import load_adapter
from mmpeft.routing import embed


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    for number, caption in enumerate(("a cat", "a dog", "a red cat")):
        Image.fromarray(np.full((32, 32, 3), 60 * number, np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


def trained_card(photos, base, out, **settings):
    overrides = {"train.steps": 1, "base.precision": "fp32", "method.rank": 2, **settings}
    return load_adapter(mmpeft.train(photos, base=str(base), out=out, overrides=overrides).adapter_dir).card


def test_training_writes_what_the_captions_are_about_into_the_card(photos, tiny_sd_folder, tmp_path):
    settings = {"components.text_encoder.learning_rate": 1e-3, "data.trigger": "ink"}
    card = trained_card(photos, tiny_sd_folder, tmp_path, **settings)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    captions = ["a cat, ink", "a dog, ink", "a red cat, ink"]
    expected = embed(captions, pipe.tokenizer, pipe.text_encoder).mean(0)
    # four digits
    torch.testing.assert_close(torch.tensor(card.embedding), expected, rtol=0, atol=1e-4)
    assert card.embedding == [round(value, 4) for value in card.embedding]


def test_few_captions_and_clip_skip_leave_no_embedding(photos, tiny_sd_folder, tmp_path):
    skipped = trained_card(photos, tiny_sd_folder, tmp_path / "skip", **{"base.clip_skip": 1})
    assert skipped.embedding is None
    (tmp_path / "bare").mkdir()
    for picture in photos.glob("*.png"):
        shutil.copy(picture, tmp_path / "bare")
    one = trained_card(tmp_path / "bare", tiny_sd_folder, tmp_path / "one", **{"data.caption": "a cat"})
    assert one.embedding is None
