"""A tiny pipeline with a bank, and adapters of several kinds for it."""

import pytest
from diffusers import StableDiffusionPipeline

import mmpeft


@pytest.fixture(scope="session")
def open_base(tiny_sd_folder):
    return lambda: StableDiffusionPipeline.from_pretrained(tiny_sd_folder)


@pytest.fixture(scope="session")
def adapters(open_base, attach_randomly):
    return {
        "lora": attach_randomly(open_base(), "lora", 1, rank=3, alpha=1.0, rank_pattern={"*.conv1": 2}),
        "rslora": attach_randomly(
            open_base(), "lora", 2, rank=4, alpha=0.5, rslora=True, unet=("*.to_q", "conv_in")
        ),
        "dora": attach_randomly(open_base(), "dora", 3, rank=2, alpha=0.5),
    }


@pytest.fixture
def bank_and_pipe(open_base, adapters):
    pipe = open_base()
    bank = mmpeft.attach(pipe)
    for name, adapter in adapters.items():
        bank.load(adapter, name)
    return bank, pipe
