"""What LyCORIS itself makes, read by us, against the change that LyCORIS's own forward applies."""

import copy
import importlib
import logging
import warnings

import pytest
import torch
from torch import nn

from mmpeft.errors import AdapterError, FormatError, MethodError
from mmpeft.key_formats import lycoris
from mmpeft.layer_adapter import shapes_agree
from mmpeft.methods.dora import DoraLayer, WeightDecomposedLayer
from mmpeft.methods.ia3 import Ia3Layer
from mmpeft.methods.lokr import LokrLayer
from mmpeft.methods.lora import LoraLayer
from mmpeft.methods.oft import InputOftLayer, OftLayer

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
    """Give what LyCORIS's forward adds to weight and bias: its outputs for unit inputs and none, minus the base's."""
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


def test_alpha_of_a_full_lokr_may_be_infinite(modules):
    layer, module = trained(modules, "LokrModule", {"lora_dim": 100000}, "linear")
    parts = file_of(module, torch.float16)
    assert parts["alpha"].isinf()
    exact = {k: v.float() for k, v in file_of(module).items()}
    ours, precise = (lycoris.layer_from("x", p, None)[""].dense() for p in (parts, exact))
    assert distance(ours, precise) < 1e-3  # float16
    assert distance(precise, forward_change(layer, module)[0]) < 1e-4


@pytest.mark.parametrize(
    ("algo", "told"), [("GLoRAModule", {}), ("LokrModule", {"factor": 2, "full_matrix": True, "lora_dim": 4})]
)
def test_rs_lora_is_told_by_the_metadata_where_the_tensors_do_not(modules, algo, told):
    layer, module = trained(modules, algo, {"rs_lora": True, **told}, "linear")
    expected, _ = forward_change(layer, module)
    ours = lycoris.layer_from("x", file_of(module), None, rslora=True)[""]
    assert distance(ours.dense(layer.weight), expected) < 1e-4
    assert distance(lycoris.layer_from("x", file_of(module), None)[""].dense(layer.weight), expected) > 0.1
    # what is written has the effect without metadata
    again = lycoris.layer_from("x", lycoris.parts_of(ours, None), None)[""]
    assert distance(again.dense(layer.weight), expected) < 1e-4


def test_rs_lora_with_an_infinite_alpha_is_refused():
    parts = {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(2, 2), "alpha": torch.tensor(float("inf"))}
    with pytest.raises(FormatError, match="alpha inf, so its scale cannot be told; save the file as float32"):
        lycoris.layer_from("x", parts, None, rslora=True)


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.GroupNorm(2, 6)])
def test_norms_are_two_vectors(modules, norm):
    torch.manual_seed(0)
    module = modules.NormModule("x", norm)
    with torch.no_grad():
        module.w_norm.normal_()
        module.b_norm.normal_()
    parts = file_of(module)
    read = lycoris.layer_from("x", parts, (6,))
    x = torch.randn(3, 6)
    with torch.no_grad():
        expected = module(x)
        norm.weight += read[""].dense()
        norm.bias += read["bias"].dense()
        torch.testing.assert_close(norm(x), expected)
    written = lycoris.parts_of(read[""], read["bias"])
    assert written.keys() == parts.keys() == {"w_norm", "b_norm"}
    assert all(torch.equal(written[ending], tensor) for ending, tensor in parts.items())


@pytest.mark.parametrize("base", ["linear", "conv3"])
def test_dylora_is_saved_as_lora(modules, base):
    layer, module = trained(modules, "DyLoraModule", {"lora_dim": 4, "block_size": 2}, base)
    read = lycoris.layer_from("x", file_of(module), tuple(layer.weight.shape))[""]
    assert isinstance(read, LoraLayer)
    assert read.rank == 4
    assert read.lora_B.shape == (layer.weight.shape[0], 4, *[1] * (layer.weight.ndim - 2))
    with torch.no_grad():
        whole = torch.cat(list(module.up_list), 1) @ torch.cat(list(module.down_list)) * 3 / 4
    torch.testing.assert_close(read.dense(), whole.reshape(layer.weight.shape))


def test_old_oft_is_the_rotation_itself(modules):
    layer, module = trained(modules, "DiagOFTModule", {"constraint": 0.0}, "linear")
    with torch.no_grad():
        parts = {"oft_diag": module.get_r()}
    read = lycoris.layer_from("x", parts, None)[""]
    assert distance(read.dense(layer.weight), forward_change(layer, module)[0]) < 1e-4
    assert torch.equal(lycoris.parts_of(read, None)["oft_diag"], parts["oft_diag"])


def test_alpha_zero_of_kohyas_oft_holds_it_at_no_change():
    generator = torch.Generator().manual_seed(0)
    weight, blocks = torch.randn(6, 4, generator=generator), torch.randn(2, 3, 3, generator=generator)
    parts = {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}
    held = lycoris.layer_from("x", parts, None, kohya_oft=True)[""]
    free = lycoris.layer_from("x", parts, None)[""]
    assert held.dense(weight).abs().max() < 1e-6
    assert free.dense(weight).norm() > 1
    again = lycoris.layer_from("x", lycoris.parts_of(held, None), None)[""]
    assert again.dense(weight).abs().max() < 1e-6
    bounded = {**parts, "alpha": torch.tensor(0.01)}
    both = [lycoris.layer_from("x", bounded, None, kohya_oft=kohya)[""] for kohya in (True, False)]
    torch.testing.assert_close(both[0].dense(weight), both[1].dense(weight))


def test_a_sparse_rest_is_part_of_the_change():
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 3, 3, 3, generator=generator), torch.randn(4, 2, 1, 1, generator=generator)
    rest = torch.zeros(4, 27)
    rest[1, 5], rest[3, 26] = 2.0, -1.0
    sparse = rest.to_sparse().coalesce()
    parts = {
        "lora_down.weight": A,
        "lora_up.weight": B,
        "alpha": torch.tensor(2.0),
        "bias_indices": sparse.indices().to(torch.int16),
        "bias_values": sparse.values(),
        "bias_size": torch.tensor([4, 27], dtype=torch.int16),
    }
    read = lycoris.layer_from("x", parts, None)[""]
    expected = (B.flatten(1) @ A.flatten(1) + rest).reshape(4, 3, 3, 3)
    torch.testing.assert_close(read.dense(), expected)
    written = lycoris.parts_of(read, None)
    assert written.keys() == parts.keys()
    assert all(torch.equal(written[ending], tensor) for ending, tensor in parts.items())
    for broken in ({"bias_size": torch.tensor([4, 9])}, {"bias_indices": sparse.indices() + 20}):
        with pytest.raises(FormatError, match="make no layer"):
            lycoris.layer_from("x", {**parts, **broken}, None)


LORA = {"lora_down.weight": torch.ones(2, 6), "lora_up.weight": torch.ones(4, 2)}
CONV = {"lora_down.weight": torch.ones(2, 6, 3, 3), "lora_up.weight": torch.ones(4, 2, 1, 1)}


def test_a_missing_alpha_is_the_rank_and_a_scale_counts_instead_of_it():
    assert lycoris.layer_from("x", LORA, None)[""].alpha == 2.0
    scaled = lycoris.layer_from("x", {**LORA, "scale": torch.tensor(0.25)}, None)[""]
    assert (scaled.alpha, scaled.scale) == (0.5, 0.25)
    assert float(lycoris.parts_of(scaled, None)["alpha"]) == 0.5


@pytest.mark.parametrize(
    ("parts", "magnitudes", "side"),
    [
        (LORA, (4, 1), "output"),
        (LORA, (4,), "output"),
        (LORA, (1, 6), "input"),
        (CONV, (4, 1, 1, 1), "output"),
        (CONV, (1, 4, 1, 1), "output"),
        (CONV, (1, 6, 1, 1), "input"),
        (
            {"lora_down.weight": torch.ones(2, 4, 3, 3), "lora_up.weight": torch.ones(4, 2, 1, 1)},
            (1, 4, 1, 1),
            "input",
        ),
    ],
)
def test_the_shape_of_dora_scale_tells_its_side(parts, magnitudes, side):
    layer = lycoris.layer_from("x", {**parts, "dora_scale": torch.ones(magnitudes)}, None)[""]
    assert type(layer) is (DoraLayer if side == "output" else WeightDecomposedLayer)
    weight = torch.randn(layer.shape, generator=torch.Generator().manual_seed(0))
    new = weight + layer.dense(weight)
    rows = new.flatten(1) if side == "output" else new.transpose(0, 1).flatten(1)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))


def test_per_input_magnitudes_of_an_unknown_kernel_wait_for_the_weight():
    parts = {
        f"hada_w{half}_{end}": torch.ones(*size)
        for half in "12"
        for end, size in (("a", (4, 2)), ("b", (2, 54)))
    }
    layer = lycoris.layer_from("x", {**parts, "dora_scale": torch.ones(1, 6, 1, 1)}, None)[""]
    weight = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    new = weight + layer.dense(weight)
    torch.testing.assert_close(new.transpose(0, 1).flatten(1).norm(dim=1), torch.ones(6))


def test_a_shape_that_does_not_fit_the_base_is_kept_for_the_one_who_counts():
    parts = {
        f"hada_w{half}_{end}": torch.ones(*size)
        for half in "12"
        for end, size in (("a", (4, 2)), ("b", (2, 54)))
    }
    assert lycoris.layer_from("x", parts, (4, 6, 3, 3))[""].shape == (4, 6, 3, 3)
    assert lycoris.layer_from("x", parts, (4, 7, 3, 3))[""].shape == (4, 54)
    assert lycoris.layer_from("x", parts, None)[""].shape == (4, 54)


def test_a_bias_may_stand_beside_any_method_or_alone():
    bias = {"diff_b": torch.ones(4)}
    read = lycoris.layer_from("x", {**LORA, **bias}, (4, 6))
    assert type(read[""]) is LoraLayer
    assert torch.equal(read["bias"].dense(), torch.ones(4))
    assert lycoris.parts_of(*read.values()).keys() == {*LORA, "alpha", "diff_b"}
    alone = lycoris.layer_from("x", bias, (4, 6))
    assert list(alone) == ["bias"]
    assert torch.equal(lycoris.parts_of(None, alone["bias"])["diff_b"], bias["diff_b"])


def test_the_scale_of_pefts_full_lokr_goes_into_the_tensors():
    layer = LokrLayer(3.0, lokr_w1=torch.ones(2, 2), lokr_w2=torch.ones(3, 3), settings_rank=4)
    again = lycoris.layer_from("x", lycoris.parts_of(layer, None), None)[""]
    torch.testing.assert_close(again.dense(), layer.dense())
    assert layer.dense().unique().tolist() == [0.75]


def test_rslora_is_written_as_an_alpha_of_the_same_effect():
    layer = LoraLayer(torch.ones(4, 2), torch.ones(3, 4), 8.0, rslora=True)
    parts = lycoris.parts_of(layer, None)
    assert float(parts["alpha"]) == 16.0
    assert torch.equal(lycoris.layer_from("x", parts, None)[""].dense(), layer.dense())


def test_what_lycoris_has_no_form_for_is_not_written():
    with pytest.raises(MethodError, match="PEFT's OFT turns a layer's inputs"):
        lycoris.parts_of(InputOftLayer(torch.zeros(2, 6)), None)
    multiplied = Ia3Layer(torch.full((4, 1), 2.0), "output", weight_shape=(4,))
    with pytest.raises(MethodError, match="load the adapter with its base"):
        lycoris.parts_of(None, multiplied)
    assert torch.equal(lycoris.parts_of(None, multiplied.bound(torch.ones(4)))["diff_b"], torch.ones(4))


LOHA = {f"hada_w{half}_{end}": torch.ones(2, 2) for half in "12" for end in "ab"}
LOKR = {"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(3, 1), "lokr_w2_b": torch.ones(1, 3)}


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (
            {"lora_down.weight": LORA["lora_down.weight"]},
            "x has no lora_up.weight, which a layer of LoRA needs",
        ),
        ({"alpha": torch.tensor(1.0)}, "x has only alpha, which makes no layer"),
        ({"lora_foo.weight": torch.ones(2)}, "x has only lora_foo.weight"),
        ({**LORA, "lora_foo.weight": torch.ones(2)}, "x has 'lora_foo.weight', which is no tensor of LoRA"),
        ({**LORA, "diff": torch.ones(4, 6)}, "x has tensors of LoRA and of full; one method"),
        ({**LORA, **LOHA}, "tensors of LoRA and of LoHa"),
        ({**LORA, "lora_up.weight": torch.ones(4, 3)}, "rank 2 in lora_down.weight and 3 in lora_up.weight"),
        ({**LORA, "lora_up.weight": torch.ones(4)}, r"lora_up.weight \(4,\), which make no layer"),
        ({**LORA, "lora_up.weight": torch.ones(4, 2, 3, 3)}, "which make no layer"),
        ({**CONV, "lora_mid.weight": torch.ones(2, 2, 3, 3)}, "which make no layer"),
        ({**LORA, "lora_down.weight": torch.ones(0, 6)}, "no numbers in lora_down.weight"),
        ({**LORA, "alpha": torch.ones(2)}, r"alpha \(2,\); one number is needed"),
        ({**LORA, "alpha": torch.tensor(float("nan"))}, "alpha nan"),
        ({**LORA, "alpha": torch.tensor(float("inf"))}, "alpha inf; a finite number is needed"),
        (
            {**LORA, "dora_scale": torch.ones(5, 1)},
            r"dora_scale \(5, 1\) for a weight \(4, 6\); .*\(4, 1\), or",
        ),
        ({**LORA, "dora_scale": torch.ones(1, 3)}, r"dora_scale \(1, 3\)"),
        ({**LORA, "diff_b": torch.ones(4, 1)}, r"one change of its bias, \(n,\); got \[\(4, 1\)\]"),
        ({"diff_b": torch.ones(4), "b_norm": torch.ones(4)}, "one change of its bias"),
        ({**LOHA, "hada_w2_b": torch.ones(2, 3)}, "which make no layer"),
        ({**LOHA, "hada_t1": torch.ones(2, 2, 3, 3)}, "which make no layer"),
        ({**LOKR, "lokr_w2": torch.ones(3, 3)}, "which make no layer"),
        ({**LOKR, "lokr_w2_b": torch.ones(2, 3)}, "which make no layer"),
        ({"lokr_w1": LOKR["lokr_w1"]}, "which make no layer"),
        ({**LOKR, "lokr_w1_a": torch.ones(2, 1)}, "which make no layer"),
        ({**LOKR, "alpha": torch.tensor(float("inf"))}, "alpha inf; a finite number is needed"),
        ({"oft_blocks": torch.ones(2, 3, 4)}, r"oft_blocks \(2, 3, 4\), which make no layer"),
        ({"oft_blocks": torch.ones(2, 3, 3), "rescale": torch.ones(5, 1)}, "which make no layer"),
        ({"weight": torch.ones(4)}, "x has no on_input"),
        ({"weight": torch.ones(4, 4), "on_input": torch.tensor(1)}, "which make no layer"),
        ({"diff": torch.tensor(1.0)}, "which make no layer"),
        ({"w_norm": torch.ones(2, 2)}, "which make no layer"),
        ({"a1.weight": torch.ones(6, 2)}, "x has no a2.weight, which a layer of GLoRA needs"),
        (
            {f"{name}.weight": torch.ones(6, 2) for name in ("a1", "a2", "b1", "b2")},
            "which make no layer",
        ),
        ({"lambda_layer": torch.ones(1, 2), "alpha": torch.tensor(1.0)}, "x is T-LoRA's"),
    ],
)
def test_tensors_that_make_no_layer_are_refused(parts, words):
    with pytest.raises(FormatError, match=words):
        lycoris.layer_from("x", parts, None)


def test_an_oft_layer_of_another_base_is_refused_when_bound():
    layer = OftLayer(torch.zeros(2, 3, 3))
    assert layer.shape == (6, -1)
    with pytest.raises(AdapterError, match=r"belongs to a weight \(6, -1\); got \(8, 4\)"):
        layer.bound(torch.zeros(8, 4))
    assert layer.bound(torch.zeros(6, 4, 3, 3)).shape == (6, 4, 3, 3)
