"""What LyCORIS itself makes, read by us, against the change that LyCORIS's own forward applies."""

import copy
import importlib
import logging
import warnings

import pytest
import torch
from torch import nn

from mmpeft.adapter import shapes_agree
from mmpeft.errors import AdapterError
from mmpeft.key_formats import lycoris

BASES = {
    "linear": lambda: nn.Linear(12, 8),
    "square": lambda: nn.Linear(8, 8),
    "conv3": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "square_conv3": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "conv1": lambda: nn.Conv2d(8, 12, 1),
}
# algo, what it is told, which bases it has a form for
FORMS = [
    ("LoConModule", {}, BASES),
    ("LoConModule", {"use_tucker": True}, ("conv3", "square_conv3")),
    ("LoConModule", {"use_scalar": True}, ("linear", "conv3")),
    ("LoConModule", {"rs_lora": True}, ("linear", "conv3")),
    ("LoConModule", {"weight_decompose": True}, BASES),
    ("LoConModule", {"weight_decompose": True, "wd_on_out": False}, BASES),
    ("LoConModule", {"weight_decompose": True, "use_tucker": True}, ("conv3",)),
    ("LohaModule", {}, BASES),
    ("LohaModule", {"use_tucker": True}, ("conv3", "square_conv3", "conv1")),
    ("LohaModule", {"use_scalar": True}, ("linear",)),
    ("LohaModule", {"rs_lora": True}, ("linear",)),
    ("LohaModule", {"weight_decompose": True}, BASES),
    ("LohaModule", {"weight_decompose": True, "wd_on_out": False}, BASES),
    ("LokrModule", {"factor": 2}, BASES),
    ("LokrModule", {"factor": 2, "lora_dim": 1}, BASES),
    ("LokrModule", {"factor": 2, "lora_dim": 1, "use_tucker": True}, ("conv3", "square_conv3")),
    ("LokrModule", {"factor": 4, "lora_dim": 1, "decompose_both": True}, BASES),
    ("LokrModule", {"factor": 4, "lora_dim": 1, "decompose_both": True, "use_tucker": True}, ("conv3",)),
    ("LokrModule", {"factor": 2, "lora_dim": 1, "unbalanced_factorization": True}, ("linear", "conv3")),
    ("LokrModule", {"factor": 2, "full_matrix": True}, BASES),
    ("LokrModule", {"lora_dim": 100000}, ("linear", "conv3")),
    ("LokrModule", {"factor": 2, "lora_dim": 1, "use_scalar": True}, ("linear",)),
    ("LokrModule", {"factor": 2, "lora_dim": 1, "rs_lora": True}, ("linear",)),
    ("LokrModule", {"factor": 2, "lora_dim": 1, "weight_decompose": True}, BASES),
    ("LokrModule", {"factor": 2, "lora_dim": 1, "weight_decompose": True, "wd_on_out": False}, BASES),
    ("DiagOFTModule", {"constraint": 0.0}, BASES),
    ("DiagOFTModule", {"constraint": 0.1}, ("linear", "conv3")),
    ("DiagOFTModule", {"constraint": 0.1, "rescaled": True}, BASES),
    ("ButterflyOFTModule", {"constraint": 0.0}, ("linear", "square_conv3")),
    ("ButterflyOFTModule", {"constraint": 0.1, "rescaled": True}, ("linear", "square_conv3")),
    ("IA3Module", {}, BASES),
    ("IA3Module", {"train_on_input": True}, BASES),
    ("FullModule", {}, BASES),
    ("GLoRAModule", {}, BASES),
]
CASES = [
    pytest.param(algo, told, base, id=f"{algo}-{'-'.join(f'{k}={v}' for k, v in told.items())}-{base}")
    for algo, told, bases in FORMS
    for base in bases
]


@pytest.fixture(scope="session")
def modules():
    """LyCORIS's modules, imported with its chatter held back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = importlib.import_module("lycoris.modules")
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    return found


def trained(modules, algo, told, base, seed=0):
    """Build a base and LyCORIS's module on it, every parameter random."""
    torch.manual_seed(seed)
    layer = BASES[base]()
    told = {"lora_dim": 2, "alpha": 3.0, **told}
    module = getattr(modules, algo)("x", layer, 1.0, **told)
    if algo == "FullModule":
        # it saves differences only once it stands in the layer's place
        layer = copy.deepcopy(layer)
        module.apply_to()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = 0.3 * torch.randn_like(parameter)
            if name in ("dora_scale", "rescale"):
                parameter.mul_(1 + noise)
            else:
                parameter.copy_(parameter + noise if algo == "FullModule" else noise)
    return layer, module.eval()


def file_of(module, dtype=torch.float32):
    return {
        k: v.detach().clone().to(dtype if v.is_floating_point() else v.dtype).contiguous()
        for k, v in module.state_dict().items()
    }


def forward_change(layer, module):
    """Give what LyCORIS's forward adds to weight and bias: its outputs for unit inputs and for none, minus the base's."""
    is_linear, inputs = isinstance(layer, nn.Linear), layer.weight.shape[1]
    units = torch.eye(inputs)
    if not is_linear:
        kernel = layer.kernel_size[0]
        units = nn.functional.pad(units[:, :, None, None], [kernel // 2] * 4)
    with torch.no_grad():
        bias = module(units * 0) - layer(units * 0)
        change = module(units) - layer(units) - bias
    # a convolution answers a unit pulse with its kernel turned over
    return (change.T if is_linear else change.flip(-1, -2).transpose(0, 1)), bias.reshape(
        *bias.shape[:2], -1
    )[0, :, 0]


def distance(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("with_shape", [True, False])
@pytest.mark.parametrize(("algo", "told", "base"), CASES)
def test_the_change_is_what_lycoris_forward_applies(modules, algo, told, base, with_shape):
    layer, module = trained(modules, algo, told, base)
    parts = file_of(module)
    shape = tuple(layer.weight.shape)
    read = lycoris.layer_from("x", parts, shape if with_shape else None)
    ours = read[""]
    assert shapes_agree(ours.shape, shape)
    expected, expected_bias = forward_change(layer, module)
    assert expected.norm() > 0
    if "bias" in read:
        assert distance(read["bias"].dense(), expected_bias) < 1e-4
    else:
        assert expected_bias.norm() == 0
    change = ours.dense(layer.weight).reshape(shape)
    assert distance(change, expected) < 1e-4
    if ours.needs_weight:
        assert torch.equal(ours.bound(layer.weight).dense().reshape(shape), change)
        with pytest.raises(AdapterError, match="depends on the base's weight"):
            ours.dense()


@pytest.mark.parametrize(("algo", "told", "base"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_goes_through_unchanged(modules, algo, told, base, dtype):
    layer, module = trained(modules, algo, told, base)
    parts = file_of(module, dtype)
    read = lycoris.layer_from("x", parts, tuple(layer.weight.shape))
    written = lycoris.parts_of(read.get(""), read.get("bias"))
    assert written.keys() == parts.keys()
    for ending, tensor in parts.items():
        assert written[ending].shape == tensor.shape, ending
        assert written[ending].dtype == tensor.dtype, ending
        assert torch.equal(written[ending], tensor), ending


@pytest.mark.parametrize(("algo", "told"), [(algo, told) for algo, told, _ in FORMS if algo != "IA3Module"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_files_are_computed_in_float32(modules, algo, told, dtype):
    base = "conv3" if told.get("use_tucker") else "linear"
    layer, module = trained(modules, algo, told, base)
    parts = file_of(module, dtype)
    ours = lycoris.layer_from("x", parts, None)[""].dense(layer.weight)
    exact = lycoris.layer_from("x", {k: v.float() for k, v in parts.items()}, None)[""].dense(layer.weight)
    assert torch.equal(ours, exact)
