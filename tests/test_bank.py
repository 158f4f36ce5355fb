import copy
import pickle

import pytest
import torch
from diffusers import StableDiffusionPipeline

import mmpeft
from mmpeft.adapter import Adapter, AdapterCard
from mmpeft.backbones.fingerprint import Fingerprint
from mmpeft.errors import BankError, BaseMismatch
from mmpeft.injection import live_layers
from mmpeft.methods.dora import DoraLayer
from mmpeft.methods.lora import LoraLayer
from mmpeft.verification import predict

PROMPTS = ["a red cat", "a dog in ink"]
# float32 sums of some hundred terms, added before or after the product
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def open_base(tiny_sd_folder):
    return lambda: StableDiffusionPipeline.from_pretrained(tiny_sd_folder)


@pytest.fixture(scope="module")
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


@pytest.mark.parametrize("name", ["lora", "rslora", "dora"])
def test_live_output_equals_the_trained_models(name, open_base, attach_randomly):
    trained, pipe = open_base(), open_base()
    settings = {"rslora": {"rslora": True}}.get(name, {})
    adapter = attach_randomly(trained, "dora" if name == "dora" else "lora", rank=3, alpha=2.0, **settings)
    bank = mmpeft.attach(pipe)
    bank.load(adapter, "a")
    base = predict(open_base(), PROMPTS)
    assert torch.equal(predict(pipe, PROMPTS), base)
    bank.mix(a=1.0)
    torch.testing.assert_close(predict(pipe, PROMPTS), predict(trained, PROMPTS), **CLOSE)
    bank.mix({"a": 0})
    assert torch.equal(predict(pipe, PROMPTS), base)


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


def test_a_mix_is_the_sum_of_the_weighted_changes(bank_and_pipe, adapters, open_base):
    bank, pipe = bank_and_pipe
    bank.mix({"lora": 0.5}, dora=-2.0)
    changed = open_base()
    with torch.no_grad():
        for component in ("unet", "text_encoder"):
            module = getattr(changed, component)
            live = live_layers(component, module)
            originals = {disk: module.get_submodule(name).weight.clone() for disk, name in live.items()}
            for name, weight in (("lora", 0.5), ("dora", -2.0)):
                for disk, layer in adapters[name].component(component).items():
                    parameter = module.get_submodule(live[disk]).weight
                    parameter += weight * layer.dense(originals[disk])
    torch.testing.assert_close(predict(pipe, PROMPTS), predict(changed, PROMPTS), **CLOSE)


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


def test_half_precision_is_mixed_in_its_own_type(bank_and_pipe):
    bank, pipe = bank_and_pipe
    bank.mix(lora=1.0, dora=0.5)
    exact = predict(pipe, PROMPTS)
    pipe.to(torch.bfloat16)
    rounded = predict(pipe, PROMPTS)
    assert (rounded - exact).norm() < 0.05 * exact.norm()  # bfloat16 keeps 8 bits
    pipe.to(torch.float32)
    bank.mix(lora=1.0)
    assert (
        next(iter(bank._branches["unet.down_blocks.0.resnets.0.conv1"]._deltas.values())).lora_A.dtype
        == torch.float32
    )


def fuse_and_stop(bank):
    with bank.using({"rslora": 1.0}):
        bank.fuse()
        raise KeyboardInterrupt


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


def test_inference_mode_and_ordinary_mode_may_alternate(bank_and_pipe):
    bank, pipe = bank_and_pipe
    bank.mix(lora=1.0, dora=0.5)
    with torch.inference_mode():
        expected = predict(pipe, PROMPTS)
    bank.mix(lora=0.5)
    bank.mix(lora=1.0, dora=0.5)
    torch.testing.assert_close(predict(pipe, PROMPTS), expected.clone(), **CLOSE)
    noisy = torch.randn(1, 4, 8, 8, requires_grad=True)
    pipe.unet(noisy, 500, torch.randn(1, 16, 16)).sample.sum().backward()
    assert noisy.grad.isfinite().all()


def test_names_and_weights_are_checked(bank_and_pipe, adapters):
    bank, _ = bank_and_pipe
    with pytest.raises(BankError, match=r"no adapter called 'loar' is loaded; did you mean 'lora'"):
        bank.mix(loar=1.0)
    with pytest.raises(BankError, match=r"an adapter called 'lora' is loaded already"):
        bank.load(adapters["lora"], "lora")
    for wrong in (float("nan"), float("inf"), "1", True, None):
        with pytest.raises(BankError, match=r"weight of 'lora' must be a finite number"):
            bank.mix(lora=wrong)
    assert bank.weights == dict.fromkeys(("lora", "rslora", "dora"), 0.0)


def test_unloading_leaves_the_others_as_they_are(bank_and_pipe, adapters, open_base):
    bank, pipe = bank_and_pipe
    bank.mix(lora=0.5, dora=1.0)
    bank.unload("dora")
    alone = open_base()
    other = mmpeft.attach(alone)
    other.load(adapters["lora"], "x")
    other.mix(x=0.5)
    torch.testing.assert_close(predict(pipe, PROMPTS), predict(alone, PROMPTS), **CLOSE)
    assert list(bank.adapters) == ["lora", "rslora"]
    bank.load(adapters["dora"], "dora")


def test_one_module_can_carry_a_bank(open_base, attach_randomly):
    pipe = open_base()
    adapter = attach_randomly(open_base(), rank=2, text_encoder=())
    bank = mmpeft.attach(pipe.unet)
    bank.load(adapter, "a")
    bank.mix(a=1.0)
    assert not torch.equal(predict(pipe, PROMPTS), predict(open_base(), PROMPTS))
    with pytest.raises(BankError, match=r"has a bank already"):
        mmpeft.attach(pipe)


def test_an_adapter_file_is_loaded_by_its_path(open_base, adapters, tmp_path):
    folder = adapters["lora"].save(tmp_path / "cat")
    bank = mmpeft.attach(open_base())
    bank.load(folder, "cat")
    assert bank.adapters["cat"].layers == adapters["lora"].layers


def test_an_adapter_of_another_base_is_refused_and_nothing_changes(bank_and_pipe, adapters):
    bank, pipe = bank_and_pipe
    good = adapters["lora"]
    name = good.layers[-1]
    wide = LoraLayer(torch.ones(2, 99), torch.ones(5, 2), 1.0)
    card = AdapterCard(base="sdxl")
    for layers, words in (
        (
            {**good, name: wide},
            rf"trained on sdxl and does not fit.*{len(good) - 1} of {len(good)} layers match; {name} has weight",
        ),
        ({"unet.nowhere": wide}, "0 of 1 layers match; there is no unet.nowhere"),
        ({"transformer.x": wide}, "there is no transformer.x"),
    ):
        with pytest.raises(BaseMismatch, match=words):
            bank.load(Adapter(layers, card), "other")
    assert "other" not in bank.adapters
    bank.mix(lora=1.0)
    predict(pipe, PROMPTS)


def fingerprint(pipe, adapter, prediction="v"):
    weights = {
        f"{component}.{disk}": module.get_submodule(live).weight
        for component, module in (("unet", pipe.unet), ("text_encoder", pipe.text_encoder))
        for disk, live in live_layers(component, module).items()
    }
    return Fingerprint.of({name: weights[name] for name in adapter.layers}, prediction).to_json()


def test_the_base_is_judged_by_its_fingerprint(open_base, adapters, recwarn):
    trained_on = open_base()
    layers = dict(adapters["lora"])
    adapter = Adapter(layers, AdapterCard(base="tiny", fingerprint=fingerprint(trained_on, adapters["lora"])))
    pipe = open_base()
    mmpeft.attach(pipe).load(adapter, "same", strict_base=True)
    assert not recwarn.list

    tuned = open_base()
    with torch.no_grad():
        for parameter in tuned.unet.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    bank = mmpeft.attach(tuned)
    with pytest.raises(
        BaseMismatch, match=r"tiny; this StableDiffusionPipeline has the same shapes and other weights"
    ):
        bank.load(adapter, "a", strict_base=True)
    with pytest.warns(UserWarning, match=r"trained on tiny.*% apart"):
        bank.load(adapter, "a")

    epsilon = Adapter(
        layers, AdapterCard(base="tiny", fingerprint=fingerprint(trained_on, adapters["lora"], "epsilon"))
    )
    with pytest.raises(BaseMismatch, match=r"one predicts epsilon, the other v"):
        bank.load(epsilon, "b")


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch's own compiler
@pytest.mark.parametrize("order", ["attach, compile", "compile, attach"])
def test_a_compiled_model_follows_the_mix(order):
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.SiLU(), torch.nn.Flatten(), torch.nn.Linear(12, 2)
    )
    conv = LoraLayer(torch.randn(2, 2, 3, 3), torch.randn(3, 2, 1, 1), 1.0)
    linear = DoraLayer(torch.randn(1, 12), torch.randn(2, 1), 1.0, lora_magnitude_vector=torch.rand(2))
    x = torch.randn(5, 2, 4, 4)
    model = copy.deepcopy(plain)
    if order == "attach, compile":
        bank = mmpeft.attach(model)
        model = torch.compile(model, backend="eager")
        model(x)
    else:
        model = torch.compile(model, backend="eager")
        model(x)
        bank = mmpeft.attach(model)
    reference = mmpeft.attach(plain)
    for one in (bank, reference):
        one.load(Adapter({"language_model.0": conv}), "a")
        one.load(Adapter({"language_model.3": linear}), "b")
    for weights in ({"a": 1.0}, {"a": -0.5}, {}, {"a": 0.2, "b": 1.0}):
        bank.mix(weights)
        reference.mix(weights)
        torch.testing.assert_close(model(x), plain(x), **CLOSE)
    bank.fuse()
    torch.testing.assert_close(model(x), plain(x), **CLOSE)
    torch._dynamo.reset()


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
