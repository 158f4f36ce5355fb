import copy
import pickle

import pytest
import torch

import mmpeft
from mmpeft.errors import BankError
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


def test_offloaded_models_mix_live_and_refuse_to_fuse(open_base, adapters):
    from accelerate import cpu_offload

    plain, pipe = open_base(), open_base()
    banks = [mmpeft.attach(plain), mmpeft.attach(pipe)]
    cpu_offload(pipe.unet, torch.device("cpu"))
    for bank in banks:
        bank.load(adapters["lora"], "a")
        bank.mix(a=1.0)
    assert pipe.unet.conv_in.weight.is_meta
    step = torch.randn(1, 4, 8, 8), 500, torch.randn(1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(pipe.unet(*step).sample, plain.unet(*step).sample, **CLOSE)
    with pytest.raises(BankError, match=r"is quantised or offloaded; mix live instead"):
        banks[1].fuse()
    with pytest.raises(BankError, match=r"dora needs the weight of .* which is quantised or offloaded"):
        banks[1].load(adapters["dora"], "b")


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
