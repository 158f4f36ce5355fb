import copy
import pickle
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

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


def test_the_report_says_what_rounding_lost(bank_and_pipe, adapters):
    bank, pipe = bank_and_pipe
    bank.mix(rslora=0.7)
    assert bank.fuse().lost < 1e-5  # float32 keeps 24 bits
    bank.unfuse()
    pipe.to(torch.bfloat16)
    name = "unet.conv_in"
    change = 0.7 * adapters["rslora"][name].dense()
    exact = pipe.unet.conv_in.weight.detach().float() + change
    report = bank.fuse()
    expected = float((pipe.unet.conv_in.weight.detach().float() - exact).norm() / change.norm())
    assert report[name] == pytest.approx(expected, rel=1e-3)
    assert set(report) == set(adapters["rslora"])
    assert min(report.values()) < report.lost < max(report.values())
    assert report.text().startswith(
        f"{len(report)} layers fused; rounding lost {report.lost:.2%} of the change\n"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bases_file_brings_back_the_exact_bytes_without_a_copy(dtype, bank_and_pipe, tiny_sd_folder):
    bank, pipe = bank_and_pipe
    pipe.to(dtype)
    before = bank.weights_digest()
    for base_file, weight in ((None, 0.3), (tiny_sd_folder, -1.7), (str(tiny_sd_folder), 1e-3)):
        bank.mix(lora=weight, dora=weight)
        live = predict(pipe, PROMPTS)
        bank.fuse(keep="file", base_file=base_file)
        assert not any(isinstance(place.before, torch.Tensor) for place in bank._fusion._places.values())
        assert (predict(pipe, PROMPTS) - live).norm() < 0.02 * live.norm()
        bank.unfuse()
        assert bank.weights_digest() == before


def test_one_modules_file_is_found(open_base, attach_randomly, tiny_sd_folder):
    unet = open_base().unet
    bank = mmpeft.attach(unet)
    bank.load(attach_randomly(open_base(), rank=2, text_encoder=()), "a")
    before = bank.weights_digest()
    bank.mix(a=1.0)
    for base_file in (None, tiny_sd_folder / "unet"):
        bank.fuse(keep="file", base_file=base_file)
        assert bank.weights_digest() != before
        bank.unfuse()
        assert bank.weights_digest() == before


def test_a_file_that_is_not_the_bases_is_refused_and_nothing_changes(
    open_base, adapters, tiny_sd_epsilon_folder, tmp_path
):
    pipe = open_base()
    bank = mmpeft.attach(pipe)
    bank.load(adapters["lora"], "a")
    bank.mix(a=1.0)
    with torch.no_grad():
        pipe.unet.down_blocks[0].resnets[0].conv1.weight[0, 0, 0, 0] += 1e-6
    before = bank.weights_digest()
    nothing = tmp_path / "nothing"
    for settings, words in (
        (
            {"keep": "file"},
            r"tiny-sd has other bytes for unet\.down_blocks\.0\.resnets\.0\.conv1, so it cannot",
        ),
        ({"keep": "file", "base_file": nothing}, r"there is no base .*; or use keep='copy'"),
        ({"keep": "disk"}, r"keep is 'copy' or 'file'; got 'disk'"),
        ({"base_file": nothing}, r"base_file is read with keep='file' alone"),
    ):
        with pytest.raises(BankError, match=words):
            bank.fuse(**settings)
    assert not bank.is_fused
    assert bank.weights_digest() == before

    made = mmpeft.attach(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    made.load(Adapter({"language_model.0": LoraLayer(torch.ones(1, 2), torch.ones(2, 1), 1.0)}), "a")
    made.mix(a=1.0)
    with pytest.raises(BankError, match=r"this Sequential was not loaded from files; give base_file"):
        made.fuse(keep="file")


def test_a_file_that_changed_while_fused_is_noticed(tiny_sd_folder, adapters, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_sd_folder, folder)
    bank = mmpeft.attach(StableDiffusionPipeline.from_pretrained(folder))
    bank.load(adapters["lora"], "a")
    before = bank.weights_digest()
    bank.mix(a=1.0)
    bank.fuse(keep="file")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    kept = file.read_bytes()
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file)
    fused = bank.weights_digest()
    with pytest.raises(
        BankError, match=r"the base's file no longer has unet\..* as it was fused; put the file back"
    ):
        bank.unfuse()
    assert bank.weights_digest() == fused
    file.write_bytes(kept)
    bank.unfuse()
    assert bank.weights_digest() == before


@pytest.mark.parametrize("keep", ["copy", "file"])
def test_many_cycles_with_other_weights_leave_no_byte_different(keep, bank_and_pipe):
    bank, pipe = bank_and_pipe
    pipe.to(torch.bfloat16)
    before = bank.weights_digest()
    for number in range(10):
        with bank.using(lora=0.1 * number - 0.45, rslora=1.0):
            bank.fuse(keep=keep)
    assert bank.weights_digest() == before


def test_edits_of_fused_weights_are_not_lost_in_silence(bank_and_pipe):
    bank, pipe = bank_and_pipe
    before = bank.weights_digest()
    bank.mix(lora=1.0)
    bank.fuse()
    weight = pipe.unet.down_blocks[0].resnets[0].conv1.weight
    weight.data[0, 0, 0, 0] += 1.0  # as PEFT's merge does it, which no version counter sees
    for act in (bank.unfuse, bank.detach):
        with pytest.raises(
            BankError, match=r"resnets\.0\.conv1 was changed while the mix was fused .*lose_edits"
        ):
            act()
    assert bank.is_fused
    bank.unfuse(lose_edits=True)
    assert bank.weights_digest() == before


def test_weights_that_two_layers_share_come_back():
    shared = torch.nn.Linear(3, 3)
    model = torch.nn.Sequential(shared, torch.nn.Linear(3, 3))
    model[1].weight = shared.weight
    bank = mmpeft.attach(model)
    draw = torch.Generator().manual_seed(0)
    layers = {
        f"language_model.{i}": LoraLayer(
            torch.randn(1, 3, generator=draw), torch.randn(3, 1, generator=draw), 1.0
        )
        for i in range(2)
    }
    bank.load(Adapter(layers), "a")
    before = bank.weights_digest()
    bank.mix(a=1.0)
    bank.fuse()
    bank.unfuse()
    assert bank.weights_digest() == before


def test_saving_while_fused_saves_the_fused_weights(bank_and_pipe, tmp_path):
    bank, pipe = bank_and_pipe
    bank.mix(lora=1.0)
    live = predict(pipe, PROMPTS)
    bank.fuse()
    pipe.save_pretrained(tmp_path)
    bank.unfuse()
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(predict(again, PROMPTS), live, **CLOSE)


def test_a_copy_of_a_fused_model_is_fused_for_good_and_one_with_its_bank_is_not(bank_and_pipe):
    bank, pipe = bank_and_pipe
    before = bank.weights_digest()
    bank.mix(lora=1.0)
    live = predict(pipe, PROMPTS)
    bank.fuse()
    fused = bank.weights_digest()
    alone = copy.deepcopy(pipe)
    torch.testing.assert_close(predict(alone, PROMPTS), live, **CLOSE)
    assert mmpeft.attach(alone).weights_digest() == fused
    for twins in (copy.deepcopy((bank, pipe.unet)), pickle.loads(pickle.dumps((bank, pipe.unet)))):
        twin_bank, twin = twins
        twin_bank.unfuse()
        assert twin_bank.weights_digest() == before
        assert torch.equal(twin.conv_in.weight, pipe.unet.conv_in.weight)  # which this mix does not change
        twin_bank.mix(dora=1.0)
    assert bank.is_fused
