import numpy as np
import pytest
import torch

from mmpeft.adapter import Adapter
from mmpeft.backbones.stable_diffusion import StableDiffusion
from mmpeft.bank import attach
from mmpeft.config import BaseSettings
from mmpeft.errors import AdapterError, BaseMismatch, ConfigError
from mmpeft.generation import draw, draw_grid
from mmpeft.methods.lora import LoraLayer

QUICK = {"steps": 2, "guidance": 3.0}


def save_adapter(folder, seed, layers=("to_q", "to_v")):
    draw = torch.Generator().manual_seed(seed)
    place = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    adapter = Adapter(
        {
            f"{place}.{layer}": LoraLayer(
                torch.randn(2, 8, generator=draw), 3 * torch.randn(8, 2, generator=draw), alpha=2.0
            )
            for layer in layers
        }
    )
    return adapter.save(folder)


@pytest.fixture
def base(tiny_sd_folder):
    return BaseSettings(name=str(tiny_sd_folder), precision="fp32")


@pytest.fixture
def ink(tmp_path):
    return save_adapter(tmp_path / "ink" / "adapter", 1)


@pytest.fixture
def clay(tmp_path):
    return save_adapter(tmp_path / "clay", 2)


def same(one, other):
    return np.array_equal(np.asarray(one), np.asarray(other))


def test_pictures_are_those_of_the_backbone_with_the_mix(base, ink, clay):
    backbone = StableDiffusion.open(base)
    bank = attach(backbone.pipeline())
    bank.load(ink, "ink")
    bank.load(clay, "clay")
    bank.mix(ink=0.5, clay=-1.0)
    expected = backbone.generate(["a cat", "a dog"], seeds=[5, 6], **QUICK)
    drawn = draw(["a cat", "a dog"], adapters=[(ink, 0.5), (clay, -1.0)], base=base, seed=5, **QUICK)
    assert all(map(same, drawn, expected))
    assert not same(*draw(["a cat", "a dog"], base=base, seed=5, **QUICK)[:1], drawn[0])


def test_a_single_picture_without_grid_comes_bare(base):
    (picture,) = draw(["a cat"], base=base, **QUICK)
    assert same(draw_grid(["a cat"], base=base, **QUICK), picture)
    assert draw(["a cat"], base=base, width=48, height=16, **QUICK)[0].size == (48, 16)


def cells(sheet, rows, columns, side):
    """Cut the pictures out of a sheet: they lie at its lower right end, 12 pixels apart."""

    def place(index, count, length):
        return length - (count - index) * (side + 12)

    return [
        [
            sheet.crop((x := place(c, columns, sheet.width), y := place(r, rows, sheet.height), x + side, y + side))
            for c in range(columns)
        ]
        for r in range(rows)
    ]  # fmt: skip


def enlarged(picture, side):
    return picture.resize((side, side), 0)


def test_a_grid_of_one_adapter_has_prompts_as_rows_and_weights_as_columns(base, ink):
    sheet = draw_grid(["a cat", "ink"], adapters=[(ink, 0.3)], grid=[0, 1.5], base=base, seed=3, **QUICK)
    drawn = cells(sheet, 2, 2, 256)
    for column, weight in enumerate([0, 1.5]):
        pictures = draw(["a cat", "ink"], adapters=[(ink, weight)], base=base, seed=3, **QUICK)
        for row, picture in enumerate(pictures):
            assert same(drawn[row][column], enlarged(picture, 256))
    assert not same(drawn[0][0], drawn[0][1])


def test_a_grid_of_two_adapters_has_the_first_ones_weights_as_rows(base, ink, clay):
    sheet = draw_grid(["a cat"], adapters=[(ink, 1), (clay, 1)], grid=[0, 1], base=base, **QUICK)
    drawn = cells(sheet, 2, 2, 256)
    (picture,) = draw(["a cat"], adapters=[(ink, 1), (clay, 0)], base=base, **QUICK)
    assert same(drawn[1][0], enlarged(picture, 256))
    assert not same(drawn[1][0], drawn[0][1])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"adapters": []}, "a grid of weights needs an adapter"),
        ({"adapters": [("a", 1), ("b", 1), ("c", 1)]}, "has room for two adapters; got 3"),
        ({"adapters": [("a", 1), ("b", 1)]}, "a grid over two adapters draws one prompt; got 2"),
    ],
)
def test_a_grid_that_cannot_be_drawn_is_told_before_anything_is_opened(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        draw_grid(["a", "b"], grid=[0, 1], base="/no/base", **arguments)


def test_a_missing_adapter_is_told_before_the_base_is_opened(tmp_path):
    with pytest.raises(AdapterError, match=r"there is no adapter at .*nothing"):
        draw(["a cat"], adapters=[(tmp_path / "nothing", 1.0)], base="/no/base")


def test_no_prompt_and_no_steps_are_told(base):
    with pytest.raises(ConfigError, match="there is no prompt to draw"):
        draw([], base=base)
    with pytest.raises(ConfigError, match="steps: must be at least 1; got 0"):
        draw(["a cat"], base=base, steps=0)


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    other = Adapter({"unet.mid_block.attentions.7.to_q": LoraLayer(torch.ones(2, 8), torch.ones(8, 2), 2.0)})
    with pytest.raises(BaseMismatch, match="0 of 1 layers match"):
        draw(["a cat"], adapters=[(other.save(tmp_path / "other"), 1.0)], base=base)


def test_adapters_of_one_name_stay_apart(base, tmp_path):
    first, second = save_adapter(tmp_path / "x" / "ink", 1), save_adapter(tmp_path / "y" / "ink", 2)
    mixed = draw(["a cat"], adapters=[(first, 1.0), (second, 1.0)], base=base, **QUICK)
    alone = draw(["a cat"], adapters=[(first, 1.0)], base=base, **QUICK)
    assert not same(mixed[0], alone[0])
