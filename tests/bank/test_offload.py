"""Models whose weights lie elsewhere between passes, as accelerate and diffusers do it."""

import pytest
import torch

import mmpeft
from mmpeft.adapter import Adapter
from mmpeft.errors import BankError

# float32 sums of some hundred terms, added before or after the product
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
MIXES = ({"lora": 0.7, "dora": 1.0}, {"rslora": -1.0, "dora": 0.3})


def sequential(unet):
    from accelerate import cpu_offload

    cpu_offload(unet, torch.device("cpu"))


def whole(unet):
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(unet, torch.device("cpu"))


def by_leaves(unet):
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(unet, torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


def by_blocks(unet):
    from diffusers.hooks import apply_group_offloading

    settings = {"offload_type": "block_level", "num_blocks_per_group": 1}
    apply_group_offloading(unet, torch.device("cpu"), torch.device("cpu"), **settings)


def load(bank, adapters):
    for name, adapter in adapters.items():
        bank.load(Adapter({k: v for k, v in adapter.items() if k.startswith("unet.")}), name)


def step(unet, bank, mix, dtype=torch.float32):
    bank.mix({name: weight for name, weight in mix.items() if name in bank.adapters})
    generator = torch.Generator().manual_seed(0)
    noisy, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 16, 16, generator=generator)
    with torch.no_grad():
        return unet(noisy.to(dtype), 500, text.to(dtype)).sample


@pytest.mark.parametrize("offload", [sequential, whole, by_leaves, by_blocks])
@pytest.mark.parametrize("order", ["attach, load, offload", "attach, offload, load", "offload, attach, load"])
def test_offloaded_models_compute_what_others_do(offload, order, open_base, adapters):
    if offload is sequential and order != "attach, load, offload":
        adapters = {name: adapter for name, adapter in adapters.items() if name != "dora"}
    plain, unet = open_base().unet, open_base().unet
    reference = mmpeft.attach(plain)
    load(reference, adapters)
    keys = list(unet.state_dict())
    for act in order.split(", "):
        if act == "attach":
            bank = mmpeft.attach(unet)
        elif act == "load":
            load(bank, adapters)
        else:
            offload(unet)
    for mix in MIXES:
        torch.testing.assert_close(step(unet, bank, mix), step(plain, reference, mix), **CLOSE)
    assert list(unet.state_dict()) == keys


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


def test_adapters_are_nowhere_while_their_layers_are_offloaded(open_base, adapters):
    unet = open_base().unet
    bank = mmpeft.attach(unet)
    load(bank, adapters)
    sequential(unet)
    step(unet, bank, dict.fromkeys(adapters, 1.0))
    assert {branch._packed[0].type for branch in bank._branches.values() if branch.names} == {"meta"}


def test_adapters_follow_the_model_to_its_device_and_type(open_base, adapters):
    unet = open_base().unet
    bank = mmpeft.attach(unet)
    load(bank, adapters)
    exact = step(unet, bank, MIXES[0])
    unet.to(torch.float64)
    torch.testing.assert_close(step(unet, bank, MIXES[0], torch.float64).float(), exact, **CLOSE)
    unet.to("meta")
    assert {branch._packed[0].type for branch in bank._branches.values() if branch.names} == {"meta"}
