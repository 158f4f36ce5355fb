import pytest
import torch

import mmpeft
from mmpeft.adapter import Adapter
from mmpeft.errors import BankError
from mmpeft.methods.lora import LoraLayer
from mmpeft.verification import predict

PROMPTS = ["a red cat", "a dog in ink"]
# float32 sums of some hundred terms, added before or after the product
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def fuse_and_stop(bank):
    with bank.using({"rslora": 1.0}):
        bank.fuse()
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "weights",
    [{"lora": 0.8}, {"lora": -0.7, "rslora": 1.3}, {"dora": 0.6}, {"lora": 0.5, "rslora": -0.4, "dora": 0.9}],
)
def test_fused_output_equals_live_output(weights, bank_and_pipe, open_base):
    bank, pipe = bank_and_pipe
    bank.mix(weights)
    live = predict(pipe, PROMPTS)
    assert (live - predict(open_base(), PROMPTS)).norm() > 0.01 * live.norm()
    bank.fuse()
    torch.testing.assert_close(predict(pipe, PROMPTS), live, **CLOSE)
    bank.detach()
    assert torch.equal(predict(pipe, PROMPTS), predict(open_base(), PROMPTS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unfuse_restores_the_exact_bytes_however_often(dtype, bank_and_pipe):
    bank, pipe = bank_and_pipe
    pipe.to(dtype)
    before = bank.weights_digest()
    for weight in (0.3, -1.7, 1e-3):
        bank.mix(lora=weight, dora=weight)
        bank.fuse()
        assert bank.is_fused
        assert bank.weights_digest() != before
        bank.unfuse()
        assert bank.weights_digest() == before


def test_fused_weights_are_rounded_once(bank_and_pipe, adapters):
    bank, pipe = bank_and_pipe
    pipe.to(torch.bfloat16)
    original = pipe.unet.conv_in.weight.detach().clone()
    bank.mix(rslora=0.7)
    bank.fuse()
    expected = (original.float() + 0.7 * adapters["rslora"]["unet.conv_in"].dense()).bfloat16()
    assert torch.equal(pipe.unet.conv_in.weight, expected)


def test_using_restores_the_mix_before_it_however_it_ends(bank_and_pipe):
    bank, pipe = bank_and_pipe
    bank.mix(lora=0.5)
    before, digest = predict(pipe, PROMPTS), bank.weights_digest()
    with bank.using(dora=1.0):
        assert bank.weights == {"lora": 0.0, "rslora": 0.0, "dora": 1.0}
    assert torch.equal(predict(pipe, PROMPTS), before)
    with pytest.raises(KeyboardInterrupt):
        fuse_and_stop(bank)
    assert not bank.is_fused
    assert bank.weights_digest() == digest
    assert torch.equal(predict(pipe, PROMPTS), before)


def test_what_cannot_be_done_while_fused_is_an_error(bank_and_pipe, adapters):
    bank, _ = bank_and_pipe
    with pytest.raises(BankError, match=r"every adapter weight is 0"):
        bank.fuse()
    with pytest.raises(BankError, match=r"nothing is fused"):
        bank.unfuse()
    bank.mix(lora=1.0)
    bank.fuse()
    for act in (
        lambda: bank.mix(lora=0.5),
        lambda: bank.load(adapters["lora"], "again"),
        lambda: bank.unload("lora"),
        lambda: bank.using(lora=1.0).__enter__(),
    ):
        with pytest.raises(BankError, match=r"while the mix is fused into the weights; unfuse it first"):
            act()
    with pytest.raises(BankError, match=r"fused already"):
        bank.fuse()
    assert bank.weights["lora"] == 1.0


def test_a_model_that_changed_its_type_while_fused_cannot_be_unfused(bank_and_pipe):
    bank, pipe = bank_and_pipe
    before = bank.weights_digest()
    bank.mix(lora=1.0)
    bank.fuse()
    pipe.unet.to(torch.float64)
    with pytest.raises(BankError, match=r"from torch.float32 to torch.float64 while fused"):
        bank.unfuse()
    pipe.unet.to(torch.float32)
    bank.unfuse()
    assert bank.weights_digest() == before


def test_circular_padding_is_kept_by_the_branch(open_base, adapters):
    pipe = open_base()
    for module in pipe.unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.padding_mode = "circular"  # how seamless pictures are made
    bank = mmpeft.attach(pipe)
    bank.load(adapters["lora"], "a")
    bank.mix(a=1.0)
    live = predict(pipe, PROMPTS)
    bank.fuse()
    torch.testing.assert_close(predict(pipe, PROMPTS), live, **CLOSE)


def test_linear_factors_fit_a_one_by_one_convolution(open_base):
    pipe = open_base()
    conv = pipe.unet.down_blocks[0].attentions[0].proj_in
    assert isinstance(conv, torch.nn.Conv2d)
    layer = LoraLayer(torch.randn(2, conv.in_channels), torch.randn(conv.out_channels, 2), 2.0)
    bank = mmpeft.attach(pipe)
    bank.load(Adapter({"unet.down_blocks.0.attentions.0.proj_in": layer}), "a")
    bank.mix(a=1.0)
    live = predict(pipe, PROMPTS)
    bank.fuse()
    torch.testing.assert_close(predict(pipe, PROMPTS), live, **CLOSE)
