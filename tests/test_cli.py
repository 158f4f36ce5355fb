"""The command line as a person meets it: through a process of its own where that matters, else through `main`."""

import os
import re
import subprocess
import sys

import pytest

from mmpeft import cli


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mmpeft.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100", **environment},
        check=False,
    )


@pytest.fixture
def complaint(monkeypatch, capsys):
    """Give the one line that a command ends with when it cannot do what is asked."""

    def complain(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["mmpeft", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert ended.value.code == 2
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        assert line.startswith("mmpeft: ")
        return line

    return complain


def test_the_top_help_lists_every_command():
    done = run("--help")
    assert done.returncode == 0
    commands = "train plan generate bake compose interference compare inspect doctor plugins quickstart"
    for command in commands.split():
        assert re.search(rf"\b{command}\b", done.stdout)


def test_the_help_of_train_has_a_panel_for_each_section_and_every_setting_with_its_help():
    text = run("train", "--help").stdout
    for panel in ("Base", "Data", "Method", "Objective", "Components", "Train", "Validation", "Preview"):
        assert f"─ {panel} ─" in text
    assert "--train.learning-rate FLOAT" in text
    assert "peak learning rate (Prodigy: 1)" in text
    assert "which method: dora, lora" in text
    assert "--base (--base.name)" in text


def test_the_help_of_train_shows_the_settings_of_the_method_that_is_chosen():
    assert "[default: dora]" in run("train", "--method.name", "dora", "--help").stdout


def test_the_version_is_the_packages():
    import mmpeft

    assert run("--version").stdout.strip() == mmpeft.__version__


def test_plugins_are_listed_by_kind():
    assert "method: dora, lora" in run("plugins").stdout.splitlines()
    assert run("plugins", "backbone").stdout == "backbone: stable_diffusion\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], 'Unknown command "trian". Did you mean "train"?'),
        (["train"], "SOURCE requires an argument"),
        (["train", "/no/such/place"], "there is no folder or recipe /no/such/place"),
        (["train", "none.toml"], "there is no recipe file none.toml"),
        (["train", "x", "--train.lerning_rate", "1"], "Did you mean --train.learning-rate?"),
        (["train", "x", "--train.steps", "0"], "train.steps: input should be greater than or equal to 1; got '0'"),
        (["train", "x", "--steps=many"], "train.steps: input should be a valid integer"),
        (["train", "x", "--method.name", "lroa"], "no method is called 'lroa'; did you mean 'lora'?"),
        (["plan", "x", "--precision", "fp8"], "base.precision: input should be 'auto', 'fp32', 'bf16' or 'fp16'"),
        (["plugins", "mehod"], "no plugin kind is called 'mehod'; did you mean 'method'?"),
        (["inspect", "/no/adapter"], "there is no adapter at /no/adapter"),
        (["generate", "a cat", "--adapter", "/no/adapter=0.5"], "there is no adapter at /no/adapter"),
        (["generate", "a cat", "--adapter", "ink=much"], "the weight after = must be a number; got 'much'"),
        (["generate", "a cat", "--grid", "0,x"], "--grid 0,x: must be numbers with commas between"),
        (["generate", "a cat", "--grid", "0,1"], "a grid of weights needs an adapter"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line_and_exit_code_2(complaint, arguments, sentence):
    assert sentence in complaint(*arguments)


def test_an_error_in_a_process_of_its_own_is_one_line_and_exit_code_2():
    done = run("train", "/no/such/place")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mmpeft: there is no folder or recipe /no/such/place\n"


def test_an_unknown_preset_is_told_with_those_that_exist(complaint, tmp_path):
    assert "no preset is called 'styl'" in complaint("train", str(tmp_path), "--preset", "styl")


def test_a_base_that_cannot_be_reached_is_one_line(complaint, tmp_path):
    assert "no/such-model" in complaint(
        "generate", "a cat", "--base", "no/such-model", "--out", str(tmp_path / "x.png")
    )


def test_one_of_several_processes_says_which_it_is():
    done = run("train", "/no/such/place", RANK="1", WORLD_SIZE="2")
    assert done.returncode == 2
    assert done.stderr.startswith("mmpeft (process 1): there is no folder")


def test_short_forms_are_written_out_for_commands_that_take_a_recipe_only():
    assert cli.expanded(["train", "x", "--base", "pocket", "--steps=5"]) == [
        "train", "x", "--base.name", "pocket", "--train.steps=5",
    ]  # fmt: skip
    assert cli.expanded(["generate", "x", "--base", "pocket"]) == ["generate", "x", "--base", "pocket"]


def test_generate_writes_the_picture(tmp_path, tiny_sd_folder):
    out = tmp_path / "pictures" / "cat.png"
    done = run("generate", "a cat", "--base", str(tiny_sd_folder), "--steps", "2", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {out} (32 x 32)\n"
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_reader_that_has_seen_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "mmpeft.cli", "plugins", "strategy"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
