import math

import pytest
import torch

import mmpeft
from mmpeft.adapter import Adapter
from mmpeft.adapter_card import AdapterCard
from mmpeft.backbones.pocket import pocket_folder
from mmpeft.errors import BankError, ConfigError
from mmpeft.methods.lora import LoraLayer
from mmpeft.mix import Mix
from mmpeft.routing import embed, route

EXAMPLES = {
    "animals": ["a cat", "a dog in the grass", "a red fox"],
    "food": ["a slice of pizza", "a bowl of rice", "a green apple"],
    "vehicles": ["a blue car", "a bus", "a train on rails"],
}
# in the text encoder, so that an adapter which speaks while prompts are embedded would be found out
LAYER = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def pipe():
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(pocket_folder())


def adapter(seed, embedding=None):
    generator = torch.Generator().manual_seed(seed)
    layer = LoraLayer(
        torch.randn(4, 192, generator=generator), torch.randn(192, 4, generator=generator), alpha=4.0
    )
    return Adapter({LAYER: layer}, AdapterCard(embedding=embedding))


@pytest.fixture
def bank(pipe):
    bank = mmpeft.attach(pipe)
    for seed, name in enumerate(EXAMPLES):
        bank.load(adapter(seed), name)
    yield bank
    bank.detach()


def routed(bank, pipe, prompt, **settings):
    embeddings = {name: adapter.card.embedding for name, adapter in bank.adapters.items()}
    return route(prompt, embeddings, pipe.tokenizer, pipe.text_encoder, **{"examples": EXAMPLES, **settings})


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("an owl", "animals"),
        ("a panda", "animals"),
        ("bread", "food"),
        ("a bunch of grapes", "food"),
        ("a racing car", "vehicles"),
        ("a fire engine", "vehicles"),
    ],
)
def test_a_prompt_goes_to_the_adapter_whose_examples_are_nearest(prompt, name, bank, pipe):
    for weighting in ("softmax", "proportional"):
        mix = routed(bank, pipe, prompt, weighting=weighting)
        weights = {name: weight.value for name, weight in mix.weights.items()}
        assert max(weights, key=weights.get) == name
        assert 1 <= len(weights) <= 2
        assert sum(weights.values()) == pytest.approx(1)
    assert routed(bank, pipe, prompt, top_k=1) == Mix.of({name: 1.0})


def test_softmax_gives_every_chosen_adapter_a_share_that_grows_with_similarity(bank, pipe):
    mix = routed(bank, pipe, "a racing car", top_k=3)
    vectors = torch.stack(
        [embed(prompts, pipe.tokenizer, pipe.text_encoder).mean(0) for prompts in EXAMPLES.values()]
    )
    centre = vectors.mean(0)
    here = embed(["a racing car"], pipe.tokenizer, pipe.text_encoder)[0] - centre
    powers = [math.exp(float(torch.cosine_similarity(v - centre, here, 0)) / 0.25) for v in vectors]
    for name, power in zip(EXAMPLES, powers, strict=True):
        assert mix.at(name, LAYER) == pytest.approx(power / sum(powers), rel=1e-4)


def test_the_embedding_in_a_card_routes_as_its_captions_would(bank, pipe):
    expected = routed(bank, pipe, "a panda", top_k=3)
    vectors = {
        name: embed(prompts, pipe.tokenizer, pipe.text_encoder).mean(0).tolist()
        for name, prompts in EXAMPLES.items()
    }
    for seed, name in enumerate(EXAMPLES):
        bank.unload(name)
        bank.load(adapter(seed, [round(value, 4) for value in vectors[name]]), name)
    found = routed(bank, pipe, "a panda", top_k=3, examples=None)
    assert list(found.weights) == list(expected.weights)
    for name in EXAMPLES:  # the card's numbers have 4 digits
        assert found.at(name, LAYER) == pytest.approx(expected.at(name, LAYER), abs=1e-3)


def test_adapters_are_silent_while_prompts_are_embedded_and_speak_again_afterwards(bank, pipe):
    for name, prompts in EXAMPLES.items():
        bank.describe(name, prompts)
    quiet = bank.route("a racing car", top_k=3)
    bank.mix(animals=5.0, vehicles=-3.0)
    assert routed(bank, pipe, "a racing car", top_k=3) != quiet
    assert bank.route("a racing car", top_k=3) == quiet
    assert bank.weights == {name: weight.value for name, weight in quiet.weights.items()}
    bank.mix(animals=5.0, vehicles=-3.0)
    with pytest.raises(ConfigError):
        bank.route("a racing car", top_k=0)
    assert bank.weights == {"animals": 5.0, "food": 0.0, "vehicles": -3.0}


def test_examples_count_instead_of_the_card(bank, pipe):
    bank.unload("food")
    bank.load(adapter(1, [1.0] * 192), "food")
    assert routed(bank, pipe, "bread", top_k=1) == Mix.of(food=1.0)


def test_one_adapter_alone_gets_all(bank, pipe):
    assert routed(bank, pipe, "bread", examples={"food": EXAMPLES["food"]}) == Mix.of(food=1.0)


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        ({"top_k": 0}, ConfigError, "at least one adapter must count; got 0"),
        ({"weighting": "hard"}, ConfigError, "'softmax' or 'proportional'; got 'hard'"),
        ({"examples": {}}, BankError, r"bank\.describe\(name, prompts="),
        ({"examples": {"food": []}}, ConfigError, "'food' is described by a list of prompts"),
        ({"examples": {"food": "bread"}}, ConfigError, "'food' is described by a list of prompts"),
    ],
)
def test_what_cannot_be_routed_is_refused(settings, error, reason, bank, pipe):
    with pytest.raises(error, match=reason):
        routed(bank, pipe, "bread", **settings)


def test_an_embedding_of_another_text_encoder_is_refused(bank, pipe):
    bank.load(adapter(5, [0.1] * 768), "other")
    with pytest.raises(
        BankError, match="'other' has an embedding of 768 numbers, this text encoder makes 192"
    ):
        routed(bank, pipe, "bread", examples={})
    bank.unload("other")
    bank.load(adapter(5, ["x"]), "other")
    with pytest.raises(BankError, match="card of 'other' is no list of numbers"):
        routed(bank, pipe, "bread", examples={})


def test_without_a_text_encoder_there_is_no_routing(pipe):
    with pytest.raises(BankError, match="a tokenizer and a text encoder"):
        route("bread", dict.fromkeys(EXAMPLES), pipe.tokenizer, None, examples=EXAMPLES)


def test_the_bank_routes_by_what_it_was_told(bank):
    with pytest.raises(BankError, match="can be routed to"):
        bank.route("a panda")
    for name, prompts in EXAMPLES.items():
        bank.describe(name, prompts)
    mix = bank.route("a panda")
    assert max(bank.weights, key=bank.weights.get) == "animals"
    assert {name: value for name, value in bank.weights.items() if value} == {
        name: weight.value for name, weight in mix.weights.items()
    }
    bank.unload("animals")
    assert "animals" not in bank.route("a panda", top_k=3).weights
    bank.load(adapter(0), "animals")
    assert "animals" not in bank.route("a panda", top_k=3).weights


def test_only_loaded_adapters_are_described_and_only_unfused_ones_routed(bank):
    with pytest.raises(BankError, match="no adapter called 'plants'"):
        bank.describe("plants", ["a rose"])
    with pytest.raises(ConfigError, match="'food' is described by a list of prompts"):
        bank.describe("food", "bread")
    bank.describe("food", ["bread"])
    bank.mix(food=1.0)
    bank.fuse()
    with pytest.raises(BankError, match="cannot route while the mix is fused"):
        bank.route("bread")
    bank.unfuse()
