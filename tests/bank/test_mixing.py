import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import mmpeft
from mmpeft.adapter import Adapter
from mmpeft.adapter_card import AdapterCard
from mmpeft.backbones.fingerprint import Fingerprint
from mmpeft.errors import AdapterError, BankError, BaseMismatch, ConfigError
from mmpeft.injection import live_layers
from mmpeft.methods.lora import LoraLayer
from mmpeft.mix import Mask, Mix, Weight
from mmpeft.verification import predict

PROMPTS = ["a red cat", "a dog in ink"]
# float32 sums of some hundred terms, added before or after the product
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


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


def test_half_precision_is_mixed_in_its_own_type(bank_and_pipe, adapters):
    bank, pipe = bank_and_pipe
    bank.mix(lora=1.0, dora=0.5)
    exact = predict(pipe, PROMPTS)
    pipe.to(torch.bfloat16)
    rounded = predict(pipe, PROMPTS)
    assert (rounded - exact).norm() < 0.05 * exact.norm()  # bfloat16 keeps 8 bits
    pipe.to(torch.float32)
    bank.mix(lora=1.0)
    again = predict(pipe, PROMPTS)
    other = copy.deepcopy(pipe)  # its base is rounded now, the adapters are not
    fresh = mmpeft.attach(other)
    fresh.load(adapters["lora"], "a")
    fresh.mix(a=1.0)
    torch.testing.assert_close(again, predict(other, PROMPTS), **CLOSE)


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
        with pytest.raises(BankError, match=r"weight of 'lora': must be a finite number"):
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


def test_weights_may_differ_by_component_and_block(bank_and_pipe, open_base):
    bank, pipe = bank_and_pipe
    up = {"block_0": 1.0, "block_1": 0.25}
    weight = {"unet": {"down": 0.5, "mid": 0.0, "up": up}, "text_encoder": 0}
    bank.mix(lora=weight)
    assert bank.weights["lora"] == Weight.of(weight)
    assert bank.weights["dora"] == 0.0
    changed = open_base()
    factors = {"down_blocks": 0.5, "mid_block": 0.0, "up_blocks.0": 1.0, "up_blocks.1": 0.25}
    with torch.no_grad():
        for disk, layer in bank.adapters["lora"].component("unet").items():
            factor = next(f for start, f in factors.items() if disk.startswith(start))
            changed.unet.get_submodule(disk).weight += factor * layer.dense()
    expected = predict(changed, PROMPTS)
    torch.testing.assert_close(predict(pipe, PROMPTS), expected, **CLOSE)
    bank.fuse()
    torch.testing.assert_close(predict(pipe, PROMPTS), expected, **CLOSE)


def test_a_mix_is_a_value(bank_and_pipe):
    bank, pipe = bank_and_pipe
    mix = Mix.of(lora=0.5, dora={"unet": 0.2})
    bank.mix(mix)
    expected = predict(pipe, PROMPTS)
    bank.mix()
    bank.mix({"lora": Weight(0.5), "dora": {"unet": 0.2}})
    assert torch.equal(predict(pipe, PROMPTS), expected)
    before = bank.weights
    for wrong, words in (
        ({"lora": {"unet": {"sideways": 1.0}}}, r"the weight of 'lora': .*'unet.sideways' is no component"),
        (
            {"lora": {"vae": 1.0}},
            r"the weight of 'lora': weights per block: 'vae' is no component, block or layer",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            bank.mix(wrong)
    assert bank.weights == before


def test_threads_with_different_mixes_each_get_their_own_picture(bank_and_pipe):
    bank, pipe = bank_and_pipe
    mixes = [{"lora": 1.0}, {"rslora": -0.7, "dora": 1.0}, {}]
    expected = []
    for mix in mixes:
        bank.mix(mix)
        expected.append(predict(pipe, PROMPTS))
    bank.mix(rslora=0.3)
    start = threading.Barrier(len(mixes))

    def draw(number):
        start.wait()
        pictures = []
        for _ in range(3):
            with bank.using(mixes[number]):
                pictures.append(predict(pipe, PROMPTS))
        return pictures

    with ThreadPoolExecutor(len(mixes)) as pool:
        drawn = list(pool.map(draw, range(len(mixes))))
    for pictures, alone in zip(drawn, expected, strict=True):
        assert all(torch.equal(picture, alone) for picture in pictures)
    assert bank.weights == {"lora": 0.0, "rslora": 0.3, "dora": 0.0}


def test_a_block_that_was_interrupted_lets_other_threads_in(bank_and_pipe):
    bank, _ = bank_and_pipe

    def stop():
        with bank.using(lora=1.0):
            raise SystemExit

    with ThreadPoolExecutor(1) as pool, pytest.raises(SystemExit):
        pool.submit(stop).result()
    bank.mix(dora=1.0)
    assert bank.weights["dora"] == 1.0


def test_unloading_within_a_block_is_remembered_after_it(bank_and_pipe, open_base):
    bank, pipe = bank_and_pipe
    bank.mix(lora=1.0, dora=1.0)
    with bank.using(rslora=1.0):
        bank.unload("dora")
    assert bank.weights == {"lora": 1.0, "rslora": 0.0}
    bank.unload("lora")
    assert torch.equal(predict(pipe, PROMPTS), predict(open_base(), PROMPTS))


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_name_that_is_no_word_is_refused(name, bank_and_pipe, adapters):
    bank, _ = bank_and_pipe
    with pytest.raises(BankError, match=r"an adapter's name in the bank is a word; got"):
        bank.load(adapters["lora"], name)


def test_an_adapter_without_layers_is_not_loaded(bank_and_pipe):
    bank, _ = bank_and_pipe
    loaded = sorted(bank.adapters)
    with pytest.raises(AdapterError, match=r"nothing is empty; there is nothing to load"):
        bank.load(Adapter({}), "nothing")
    assert sorted(bank.adapters) == loaded


def test_a_masked_pass_that_failed_leaves_nothing_to_the_next(bank_and_pipe):
    bank, pipe = bank_and_pipe
    bank.mix(lora=1.0)
    plain = predict(pipe, PROMPTS)
    attention = next(m for name, m in pipe.unet.named_modules() if name.endswith("attn2"))

    def stop(*_):
        raise KeyboardInterrupt

    handle = attention.to_out[0].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt), bank.using(lora=Weight(mask=Mask([[1, 0]]))):
        predict(pipe, PROMPTS)
    handle.remove()
    assert torch.equal(predict(pipe, PROMPTS), plain)
