"""What PEFT saves of LoHa, LoKr, OFT and (IA)³, read by us, against the change that PEFT's own forward applies."""

import copy

import pytest
import torch
from torch import nn

from mmpeft.errors import FormatError, MethodError
from mmpeft.key_formats.peft_methods import ENDINGS, peft_layer_from, peft_parts_of
from mmpeft.key_formats.peft_settings import peft_config_of
from mmpeft.methods.full import FullLayer
from mmpeft.methods.ia3 import Ia3Layer
from mmpeft.methods.oft import InputOftLayer

PREFIX = "base_model.model."
NAMES = ("linear", "square", "conv3", "conv1")


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 8)
        self.square = nn.Linear(8, 8)
        self.conv3 = nn.Conv2d(8, 12, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 12, 1)

    def forward(self, x):
        return x


SETTINGS = [
    ("LoHaConfig", {"r": 2, "alpha": 3}),
    ("LoHaConfig", {"r": 2, "alpha": 3, "use_effective_conv2d": True, "alpha_pattern": {"square": 5}}),
    ("LoHaConfig", {"r": 2, "alpha": 3, "rank_pattern": {"conv3": 1}}),
    ("LoKrConfig", {"r": 1, "alpha": 3}),
    ("LoKrConfig", {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 4}),
    ("LoKrConfig", {"r": 1, "alpha": 3, "decompose_factor": 2, "use_effective_conv2d": True}),
    ("LoKrConfig", {"r": 8, "alpha": 3}),
    ("OFTConfig", {"oft_block_size": 4}),
    ("OFTConfig", {"oft_block_size": 4, "use_cayley_neumann": False}),
    ("OFTConfig", {"oft_block_size": 4, "num_cayley_neumann_terms": 3}),
    ("OFTConfig", {"oft_block_size": 2, "num_cayley_neumann_terms": 7, "block_share": True}),
    ("OFTConfig", {"oft_block_size": 4, "coft": True, "eps": 0.05}),
    ("IA3Config", {"feedforward_modules": []}),
    ("IA3Config", {"feedforward_modules": ["linear", "conv3"]}),
    ("IA3Config", {"feedforward_modules": "linear|conv1"}),
]


def wrapped(kind, settings):
    """Put PEFT's layers with random parameters on a base; gives the base as it was, the wrapped one and its file."""
    import peft

    torch.manual_seed(0)
    base = Base()
    targets = [name for name in NAMES if kind != "OFTConfig" or name != "conv3"]
    config = getattr(peft, kind)(target_modules=targets, **settings)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_((1 if "ia3" in name else 0) + 0.3 * torch.randn_like(parameter))
    state = {k: v.detach().clone() for k, v in peft.get_peft_model_state_dict(model).items()}
    return base, model, state, {**config.to_dict(), "peft_type": config.peft_type.value}


def read(base, state, config):
    """Give our layer adapters by name, biases as "<name>.bias"."""
    found = {}
    for name in {key.removeprefix(PREFIX).split(".")[0] for key in state}:
        module = base.get_submodule(name)
        start = f"{PREFIX}{name}."
        parts = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        shape, bias = tuple(module.weight.shape), tuple(module.bias.shape)
        layers = peft_layer_from(config["peft_type"], config, name, parts, shape, bias)
        found.update({f"{name}.{end}" if end else name: layer for end, layer in layers.items()})
    return found


def forward_change(layer, module):
    is_linear, inputs = isinstance(layer, nn.Linear), layer.weight.shape[1]
    units = torch.eye(inputs)
    if not is_linear:
        units = nn.functional.pad(units[:, :, None, None], [layer.kernel_size[0] // 2] * 4)
    with torch.no_grad():
        bias = module(units * 0) - layer(units * 0)
        change = module(units) - layer(units) - bias
    bias = bias.reshape(*bias.shape[:2], -1)[0, :, 0]
    return change.T if is_linear else change.flip(-1, -2).transpose(0, 1), bias


@pytest.fixture
def quiet():
    import warnings

    with warnings.catch_warnings():
        # PEFT tells that a block size was adjusted, and that the base has no configuration
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_the_change_is_what_pefts_forward_applies(kind, settings, quiet):
    base, model, state, config = wrapped(kind, settings)
    layers = read(base, state, config)
    assert len([name for name in layers if "." not in name]) >= 3
    for name in (name for name in layers if "." not in name):
        layer = base.get_submodule(name)
        expected, expected_bias = forward_change(layer, model.base_model.model.get_submodule(name))
        change = layers[name].dense(layer.weight).reshape(layer.weight.shape)
        assert expected.norm() > 0
        assert (change - expected).norm() < 1e-4 * expected.norm(), name
        bias = layers.get(f"{name}.bias")
        ours = torch.zeros_like(layer.bias) if bias is None else bias.bound(layer.bias).dense()
        torch.testing.assert_close(ours, expected_bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_what_is_written_is_read_by_peft_with_the_same_effect(kind, settings, quiet):
    import peft

    base, model, state, config = wrapped(kind, settings)
    layers = read(base, state, config)
    written = {
        f"{PREFIX}{name}.{ending}": tensor
        for name, layer in layers.items()
        if "." not in name
        for ending, tensor in peft_parts_of(layer, layers.get(f"{name}.bias")).items()
    }
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], value) for key, value in state.items())
    fields = peft_config_of(layers)
    config_type = peft.PEFT_TYPE_TO_CONFIG_MAPPING[fields.pop("peft_type")]
    fields.pop("peft_version", None)
    again = peft.get_peft_model(copy.deepcopy(base), config_type(**fields)).eval()
    assert not peft.set_peft_model_state_dict(again, written).unexpected_keys
    for name in (name for name in layers if "." not in name):
        inputs = base.get_submodule(name).weight.shape[1]
        x = torch.randn(2, inputs) if name in ("linear", "square") else torch.randn(2, inputs, 5, 5)
        with torch.no_grad():
            ours = again.base_model.model.get_submodule(name)(x)
            theirs = model.base_model.model.get_submodule(name)(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_pefts_oft_of_a_wide_convolution_is_no_change_of_its_weight():
    entries = torch.zeros(18, 6)
    layers = peft_layer_from(
        "OFT", {"peft_version": "0.21.2"}, "conv3", {"oft_R.weight": entries}, (12, 8, 3, 3)
    )
    with pytest.raises(MethodError, match="PEFT's OFT of a 3x3 convolution is no change of its weight"):
        layers[""].delta(torch.zeros(12, 8, 3, 3))


@pytest.mark.parametrize(
    ("peft_type", "config", "parts", "words"),
    [
        ("VERA", {}, {}, "PEFT's VERA cannot be read; LORA, LOHA, LOKR, OFT, IA3 can"),
        ("LOHA", {}, {"lokr_w1": torch.ones(2, 2)}, "'lokr_w1', which is no tensor of LOHA"),
        ("LOHA", {"bias": "all"}, {}, "it trains biases"),
        ("IA3", {"fan_in_fan_out": True}, {}, "stores weights transposed"),
        ("OFT", {}, {}, "before PEFT 0.16"),
        ("OFT", {}, {"oft_R.weight": torch.ones(2, 6)}, "by a PEFT before 0.18.0, whose series is another"),
        ("OFT", {"peft_version": "0.19.0"}, {"oft_R.weight": torch.ones(2, 5)}, "5 entries a block"),
        ("OFT", {"peft_version": "0.19.0"}, {"oft_R.weight": torch.ones(6)}, r"oft_R.weight \(6,\)"),
        ("IA3", {}, {}, "x has no ia3_l"),
        ("IA3", {}, {"ia3_l": torch.ones(1, 8)}, r"must be \(8, 1\); got \(1, 8\)"),
        (
            "IA3",
            {"feedforward_modules": ["x"]},
            {"ia3_l": torch.ones(8, 1)},
            r"must be \(1, 8\); got \(8, 1\)",
        ),
        ("IA3", {}, {"ia3_l": torch.ones(8, 1)}, "changes the biases too.*give the base"),
        (
            "LOHA",
            {"r": 4},
            {name: torch.ones(2, 2) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
            "x has rank 2, but the file's settings say 4",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(peft_type, config, parts, words):
    with pytest.raises(FormatError, match=words):
        peft_layer_from(peft_type, config, "x", parts, None)


def test_what_peft_has_no_form_for_is_not_written():
    with pytest.raises(MethodError, match="no form for full"):
        peft_parts_of(FullLayer(torch.ones(2, 2)))
    with pytest.raises(MethodError, match="a bias alone"):
        peft_parts_of(None, FullLayer(torch.ones(2)))
    with pytest.raises(MethodError, match="multiplies biases together with their outputs"):
        peft_parts_of(Ia3Layer(torch.ones(4), "output", is_difference=True))
    rotation = InputOftLayer(torch.zeros(2, 6))
    with pytest.raises(MethodError, match="a bias's change of its own"):
        peft_parts_of(rotation, FullLayer(torch.ones(2)))
    with pytest.raises(MethodError, match="one block size"):
        peft_config_of({"a": rotation, "b": InputOftLayer(torch.zeros(2, 3))})
    with pytest.raises(MethodError, match="one method in an adapter; this one has no layer"):
        peft_config_of({})


def test_the_endings_are_those_of_pefts_own_files(quiet):
    seen = {}
    for kind, settings in SETTINGS:
        _, _, state, config = wrapped(kind, settings)
        endings = {key.removeprefix(PREFIX).split(".", 1)[1] for key in state}
        seen[config["peft_type"]] = seen.get(config["peft_type"], set()) | endings
    assert seen == {peft_type: set(endings) for peft_type, endings in ENDINGS.items()}
