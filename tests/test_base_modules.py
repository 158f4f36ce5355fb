"""Bases as adapters are given them: folders of pipelines and of single models."""

import json

import pytest
import torch

import mmpeft
from mmpeft.adapter import Adapter
from mmpeft.base_modules import modules_of
from mmpeft.errors import BaseError
from mmpeft.methods.dora import DoraLayer

TO_Q = "language_model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a tiny language model; do not write into it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    folder = tmp_path_factory.mktemp("bases") / "llama"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_pipelines_folder_gives_its_components(tiny_sd_folder):
    assert set(modules_of(tiny_sd_folder)) == {"unet", "text_encoder"}


def test_a_language_models_folder_is_a_base(llama):
    model = modules_of(llama)["language_model"]
    weight = model.get_submodule(TO_Q.removeprefix("language_model.")).weight.detach()
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator)
    layer = DoraLayer(A, B, 2.0, lora_magnitude_vector=torch.ones(8))
    from_folder, _ = mmpeft.compose([(Adapter({TO_Q: layer}), 0.5)], base=llama)
    expected = 0.5 * layer.dense(weight)
    torch.testing.assert_close(from_folder[TO_Q].dense(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [{}, {"architectures": []}, {"architectures": ["NoSuchModel"]}, [], "{"])
def test_a_folder_that_is_no_model_is_refused(config, tmp_path):
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(BaseError, match="no folder of a diffusers pipeline or a transformers model"):
        modules_of(tmp_path)
