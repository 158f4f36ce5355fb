"""compose, interference and compare as a person types them."""

import json
import sys

import pytest
import torch

import mmpeft
from mmpeft import cli
from mmpeft.adapter import Adapter
from mmpeft.methods.lora import LoraLayer

LAYERS = {"unet.mid_block.attentions.0.proj_in": (12, 10), "unet.up_blocks.1.resnets.0.conv1": (6, 4, 3, 3)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters, ink and cat, in folders like those of runs."""
    root = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("ink", "cat")):
        generator = torch.Generator().manual_seed(seed)
        layers = {}
        for layer, (out, *rest) in LAYERS.items():
            A = torch.randn(3, *rest, generator=generator)
            layers[layer] = LoraLayer(
                A, torch.randn(out, 3, *[1] * (len(rest) - 1), generator=generator), 3.0
            )
        Adapter(layers).save(root / name / "adapter")
    return root / "ink" / "adapter", root / "cat" / "adapter"


@pytest.fixture
def run(monkeypatch, capsys):
    """Type a command; give its exit code and what it printed."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmpeft", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code), printed.out, printed.err

    return run


def test_compose_writes_what_the_function_gives_and_prints_the_report(run, folders, tmp_path):
    ink, cat = folders
    options = ("--strategy", "ties", "--rank", "2", "--density", "0.3", "--no-normalize")
    code, out, err = run("compose", f"{ink}=0.8", f"{cat}=-0.6", *options, "--out", tmp_path / "merged")
    assert (code, err) == (0, "")
    assert out.startswith("2 adapters composed by ties in ")
    assert "look at this: a ties result is not low-rank: rank 2 loses" in out
    assert out.endswith(f"wrote {tmp_path / 'merged'}\n")
    merged, _ = mmpeft.compose([(ink, 0.8), (cat, -0.6)], "ties", rank=2, density=0.3, normalize=False)
    assert mmpeft.load_adapter(tmp_path / "merged").digest == merged.digest


def test_weights_by_block_are_given_as_json(run, folders, tmp_path):
    ink, cat = folders
    blocks = {"unet": {"mid": 0.2, "up": 0.9}}
    code, _, err = run("compose", f"{ink}={json.dumps(blocks)}", f"{cat}=0.5", "--out", tmp_path / "merged")
    assert (code, err) == (0, "")
    merged, _ = mmpeft.compose([(ink, blocks), (cat, 0.5)])
    assert mmpeft.load_adapter(tmp_path / "merged").digest == merged.digest


def test_weights_may_go_by_blocks_that_only_the_other_adapter_has(run, folders, tmp_path):
    ink, cat = folders
    up = Adapter({name: layer for name, layer in mmpeft.load_adapter(ink).items() if "up_blocks" in name})
    up.save(tmp_path / "up")
    code, _, err = run(
        "compose",
        f"{tmp_path / 'up'}={json.dumps({'unet': {'mid': 0.2, 'up': 0.5}})}",
        cat,
        "--out",
        tmp_path / "merged",
    )
    assert (code, err) == (0, "")
    merged, _ = mmpeft.compose([(up, 0.5), (cat, 1.0)])
    assert mmpeft.load_adapter(tmp_path / "merged").digest == merged.digest


def test_a_path_with_an_equals_sign_is_a_path(run, folders, tmp_path):
    ink, _ = folders
    odd = tmp_path / "style=2"
    mmpeft.load_adapter(ink).save(odd)
    for given, weight in ((odd, 1.0), (f"{odd}=0.5", 0.5)):
        code, _, err = run("compose", given, "--out", tmp_path / "merged")
        assert (code, err) == (0, "")
        assert mmpeft.load_adapter(tmp_path / "merged").digest == mmpeft.compose([(ink, weight)])[0].digest


def test_inspect_tells_the_parents_of_a_composition(run, folders, tmp_path):
    ink, cat = folders
    run("compose", f"{ink}=0.8", f"{cat}=0.6", "--out", tmp_path / "merged")
    digest = mmpeft.load_adapter(ink).digest
    assert f"composed from: 0.8 of {digest} (lora); 0.6 of " in run("inspect", tmp_path / "merged")[1]


def test_a_composition_is_replayed_with_one_command(run, folders, tmp_path):
    ink, cat = folders
    first, again = tmp_path / "merged", tmp_path / "again"
    run("compose", f"{ink}=0.8", f"{cat}=0.6", "--strategy=dare", "--rank=3", "--seed=4", "--out", first)
    code, _, err = run("compose", "--like", first, cat, ink, "--out", again)
    assert (code, err) == (0, "")
    weights = "pytorch_lora_weights.safetensors"
    assert (again / weights).read_bytes() == (first / weights).read_bytes()


def test_full_differences_are_saved_and_read_back(run, folders, tmp_path):
    ink, cat = folders
    code, _, err = run("compose", ink, cat, "--strategy", "magnitude", "--out", tmp_path / "full")
    assert (code, err) == (0, "")
    full, _ = mmpeft.compose([(ink, 1.0), (cat, 1.0)], "magnitude")
    assert mmpeft.load_adapter(tmp_path / "full").digest == full.digest


def test_the_help_shows_the_settings_of_the_strategy_that_is_chosen(run):
    without = run("compose", "--help")[1]
    assert "--density" not in without
    assert "STRATEGYSETTINGS" not in without
    shown = run("compose", "--strategy", "ties", "--help")[1]
    assert "--density" in shown
    assert "share of each change's entries" in shown
    assert "--energy" in run("compose", "--strategy", "svd", "--help")[1]


def test_the_report_is_json_where_asked(run, folders, tmp_path):
    code, out, _ = run("compose", *folders, "--error", "0.2", "--out", tmp_path / "merged", "--json")
    assert code == 0
    assert json.loads(out)["error"] <= 0.2


def test_interference_prints_tables_or_json_and_draws_the_picture(run, folders, tmp_path):
    picture = tmp_path / "pictures" / "heat.png"
    code, out, _ = run("interference", *folders, "--picture", picture)
    assert code == 0
    assert "ink and cat" in out
    assert "unet.up_blocks.1.resnets " in out
    assert out.endswith(f"wrote {picture}\n")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "unet.up_blocks.1.resnets.0.conv1" in run("interference", *folders, "--layers")[1]
    data = json.loads(run("interference", *folders, "--json")[1])
    assert set(data["pairs"][0]["layers"]) == set(LAYERS)


def test_a_run_s_adapter_is_called_by_its_run_beside_a_file_too(run, folders, tmp_path):
    ink, cat = folders
    mmpeft.export(ink, tmp_path / "other.safetensors")
    assert run("interference", tmp_path / "other.safetensors", cat)[1].startswith(
        "other.safetensors and cat "
    )


def test_compare_prints_the_distance_or_json(run, folders):
    code, out, _ = run("compare", *folders)
    assert code == 0
    assert "of ink's change apart" in out
    assert json.loads(run("compare", *folders, "--json")[1])["distance"] > 1
    assert "they do the same" in run("compare", folders[0], folders[0])[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["compose", "{ink}", "--strategy", "tise", "--out", "x"], "no strategy is called 'tise'; did you mean 'ties'"),
        (["compose", "{ink}", "--strategy", "ties", "--densty", "1", "--out", "x"], "Did you mean --density"),
        (["compose", "{ink}", "--strategy", "ties", "--density", "7", "--out", "x"], "density"),
        (["compose", "{ink}=much", "--out", "x"], "the weight after = must be a number; got 'much'"),
        (["compose", "{ink}={{unet: 1}}", "--out", "x"], "the weights after = are no JSON"),
        (["compose", "{ink}", "--rank", "0", "--out", "x"], "rank: must be a whole number of at least 1; got 0"),
        (["compose", "/no/adapter=1", "--out", "x"], "there is no adapter at /no/adapter"),
        (["compose", "--out", "x"], "adapters"),
        (["compose", "{ink}"], "--out"),
        (["compose", "--like", "{ink}", "{cat}", "--out", "x"], "was not composed: its card names no parents"),
        (["compose", "--like", "{ink}", "{cat}=2", "--out", "x"], "decides the weights; leave out that of"),
        (["compose", "--like", "{ink}", "{cat}", "--rank", "2", "--out", "x"], "decides strategy, settings and"),
        (["compose", "{ink}", "{cat}", "--out", "{ink}"], "would replace"),
        (["compose", "{ink}", "{cat}", "--out", "{ink}/.."], "would replace"),
        (["interference", "{ink}"], "give at least two; got 1"),
        (["interference", "{ink}", "{cat}", "--picture", "heat.xyz"], "heat.xyz: a picture's name ends in .png"),
        (["interference", "{ink}", "{cat}", "--picture", "{ink}/adapter.json/heat.png"], "there can be no folder"),
        (["compare", "{ink}", "/no/adapter"], "there is no adapter at /no/adapter"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line_and_nothing_is_written(
    run, folders, tmp_path, monkeypatch, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    ink, cat = folders
    code, out, err = run(*(text.format(ink=ink, cat=cat) for text in arguments))
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("mmpeft: ")
    assert sentence.lower() in line.lower()
    assert not any(tmp_path.iterdir())
