import copy
import pickle

import pytest
import torch

import mmpeft
from mmpeft.adapter import Adapter
from mmpeft.errors import BankError
from mmpeft.methods.dora import DoraLayer
from mmpeft.verification import predict

PROMPTS = ["a red cat", "a dog in ink"]
# float32 sums of some hundred terms, added before or after the product
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def test_the_pipelines_own_lora_adds_up_with_the_banks(open_base, adapters, tmp_path):
    folder = adapters["lora"].save(tmp_path / "a")
    both, alone = open_base(), open_base()
    both.load_lora_weights(str(folder))
    bank = mmpeft.attach(both)
    bank.load(adapters["rslora"], "b")
    bank.mix(b=0.5)
    reference = mmpeft.attach(alone)
    reference.load(adapters["lora"], "a")
    reference.load(adapters["rslora"], "b")
    reference.mix(a=1.0, b=0.5)
    expected = predict(alone, PROMPTS)
    torch.testing.assert_close(predict(both, PROMPTS), expected, **CLOSE)
    bank.fuse()
    torch.testing.assert_close(predict(both, PROMPTS), expected, **CLOSE)
    bank.unfuse()
    both.unload_lora_weights()
    reference.mix(b=0.5)
    torch.testing.assert_close(predict(both, PROMPTS), predict(alone, PROMPTS), **CLOSE)
    both.load_lora_weights(str(folder))  # and after the bank came
    torch.testing.assert_close(predict(both, PROMPTS), expected, **CLOSE)


def test_a_pipelines_own_adapters_that_cannot_share_a_layer_are_refused(open_base, adapters, tmp_path):
    fused = open_base()
    fused.load_lora_weights(str(adapters["lora"].save(tmp_path / "a")))
    fused.fuse_lora()
    with pytest.raises(BankError, match=r"has fused an adapter into .*; unfuse it there first"):
        mmpeft.attach(fused)
    dora = open_base()
    dora.load_lora_weights(str(adapters["dora"].save(tmp_path / "b")))
    with pytest.raises(BankError, match=r"no plain LoRA; unload it there first"):
        mmpeft.attach(dora)


def test_a_pickled_or_copied_model_keeps_its_mix(bank_and_pipe):
    bank, pipe = bank_and_pipe
    bank.mix(lora=1.0)
    step = torch.randn(1, 4, 8, 8), 500, torch.randn(1, 16, 16)
    with torch.no_grad():
        expected = pipe.unet(*step).sample
        twins = [pickle.loads(pickle.dumps(pipe.unet)), copy.deepcopy(pipe.unet)]
        bank.mix()
        for twin in twins:
            torch.testing.assert_close(twin(*step).sample, expected, **CLOSE)
        assert (pipe.unet(*step).sample - expected).norm() > 0.01 * expected.norm()


def test_saving_the_model_saves_the_base(bank_and_pipe, tmp_path):
    from diffusers import UNet2DConditionModel

    bank, pipe = bank_and_pipe
    bank.mix(lora=1.0)
    pipe.unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, pipe.unet.state_dict()[name]) for name, value in again.state_dict().items())


def test_detach_leaves_the_model_as_it_was_found(open_base, adapters):
    pipe = open_base()
    names = [name for name, _ in pipe.unet.named_modules()]
    keys = list(pipe.unet.state_dict())
    bank = mmpeft.attach(pipe)
    bank.load(adapters["lora"], "a")
    before = bank.weights_digest()
    bank.mix(a=1.0)
    assert list(pipe.unet.state_dict()) == keys
    assert [name for name, _ in pipe.unet.named_modules()] == names
    bank.fuse()
    bank.detach()
    assert bank.weights_digest() == before
    assert not any(module._forward_hooks for module in pipe.unet.modules())
    mmpeft.attach(pipe).detach()


def test_a_copied_model_can_be_given_a_bank_of_its_own(bank_and_pipe, adapters, open_base):
    bank, pipe = bank_and_pipe
    bank.mix(lora=1.0)
    before = predict(pipe, PROMPTS)
    twin = copy.deepcopy(pipe)
    other = mmpeft.attach(twin)
    assert torch.equal(predict(twin, PROMPTS), predict(open_base(), PROMPTS))
    other.load(adapters["lora"], "x")
    other.mix(x=1.0)
    torch.testing.assert_close(predict(twin, PROMPTS), before, **CLOSE)
    other.detach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in twin.unet.modules())
    torch.testing.assert_close(predict(pipe, PROMPTS), before, **CLOSE)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_bank_that_is_copied_with_its_model_goes_on(copied, bank_and_pipe):
    bank, pipe = bank_and_pipe
    step = torch.randn(1, 4, 8, 8), 500, torch.randn(1, 16, 16)
    bank.mix(lora=1.0)
    twin_bank, twin = copied((bank, pipe.unet))
    with pytest.raises(BankError, match=r"has a bank already"):
        mmpeft.attach(twin)
    twin_bank.unload("rslora")
    assert twin_bank.weights == {"lora": 1.0, "dora": 0.0}
    with torch.no_grad():
        bank.mix(dora=0.5)
        expected = pipe.unet(*step).sample
        bank.mix()
        twin_bank.mix(dora=0.5)
        torch.testing.assert_close(twin(*step).sample, expected, **CLOSE)


def test_adapters_that_peft_loads_later_and_cannot_share_are_refused_at_the_next_load(
    bank_and_pipe, adapters, tmp_path
):
    bank, pipe = bank_and_pipe
    pipe.load_lora_weights(str(adapters["dora"].save(tmp_path / "b")))
    with pytest.raises(BankError, match=r"no plain LoRA; unload it there first"):
        bank.load(adapters["lora"], "again")
    bank.mix(lora=1.0)
    with pytest.raises(BankError, match=r"no plain LoRA; unload it there first"):
        bank.fuse()
    pipe.unload_lora_weights()
    bank.load(adapters["lora"], "again")
    bank.fuse()


def test_a_merge_of_peft_while_fused_is_noticed(bank_and_pipe, adapters, tmp_path):
    bank, pipe = bank_and_pipe
    before = bank.weights_digest()
    pipe.load_lora_weights(str(adapters["rslora"].save(tmp_path / "a")))
    bank.mix(lora=1.0)
    bank.fuse()
    pipe.fuse_lora()
    with pytest.raises(
        BankError, match=r"was changed while the mix was fused \(by training, another adapter's merge"
    ):
        bank.unfuse()
    bank.unfuse(lose_edits=True)
    pipe.unload_lora_weights()
    assert bank.weights_digest() != before  # conv_in, which only the other has changed


def test_quantised_layers_mix_live():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 64))
    model = torch.nn.Sequential(
        bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False),
        bitsandbytes.nn.Linear4bit(32, 64, compute_dtype=torch.float32, quant_type="nf4"),
    )
    model.load_state_dict(plain.state_dict())
    model.to("cpu")
    bank = mmpeft.attach(model)
    x = torch.randn(3, 64)
    with torch.no_grad():
        base = model(x)
        weights = [bank._branches[f"language_model.{i}"].read("weight") for i in range(2)]
        for weight, layer, kept in zip(weights, plain, (0.01, 0.12), strict=True):  # 8 bits, 4 bits
            assert (weight - layer.weight).norm() < kept * layer.weight.norm()
        draw = torch.Generator().manual_seed(1)
        layers = {}
        for i, (out, inputs) in enumerate(weight.shape for weight in weights):
            A, B = torch.randn(2, inputs, generator=draw), 0.1 * torch.randn(out, 2, generator=draw)
            magnitude = torch.rand(out, generator=draw) + 0.5
            layers[f"language_model.{i}"] = DoraLayer(A, B, 2.0, lora_magnitude_vector=magnitude)
        bank.load(Adapter(layers), "a")
        bank.mix(a=0.7)
        expected = x
        for weight, layer, bias in zip(weights, layers.values(), (plain[0].bias, plain[1].bias), strict=True):
            expected = torch.nn.functional.linear(expected, weight + 0.7 * layer.dense(weight), bias)
        assert (model(x) - expected).norm() < 0.02 * (expected - base).norm()
        with pytest.raises(
            BankError, match=r"cannot fuse: the weight of language_model\.0 is quantised or offloaded"
        ):
            bank.fuse()
        bank.mix()
        assert torch.equal(model(x), base)
