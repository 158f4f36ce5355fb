"""What the README says can be typed, can be typed."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from mmpeft.cli import expanded, make_app
from mmpeft.config import nested
from mmpeft.trainers.presets import resolve

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
    if line.startswith("mmpeft ")
]


def test_the_readme_shows_commands():
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text("")
    tokens = shlex.split(command)[1:]
    make_app(tokens).parse_args(expanded(tokens), exit_on_error=False, print_error=False)


@pytest.mark.parametrize("block", [block for language, block in BLOCKS if language == "python"])
def test_python_block_compiles(block):
    compile(block, "README.md", "exec")


def test_the_recipe_is_a_recipe(tmp_path):
    recipes = [block for language, block in BLOCKS if language == "toml" and "[data]" in block]
    assert recipes
    for text in recipes:
        recipe = resolve(nested(tomllib.loads(text)), out=tmp_path)
        assert recipe.data.trigger


def test_make_targets_that_the_readme_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = set(
        re.findall(r"\bmake ([a-z][a-z-]*)", " ".join(re.findall(r"```.*?```|`[^`]+`", README, re.DOTALL)))
    )
    assert {"quickstart", "test", "lint", "bench", "pocket"} <= named
    assert not [target for target in named if f"\n{target}:" not in makefile]


def test_folders_that_the_architecture_names_exist():
    table = README[README.index("## Architecture") :]
    for path in re.findall(r"`((?:mmpeft|trainers)/[\w/.]*)`", table):
        assert (ROOT / path).exists(), path
