import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINKED = ("pipelines", "trainers")


def test_declared_packages_are_the_folders_on_disk():
    found = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for top in ("mmpeft", *LINKED)
        for init in (ROOT / top).rglob("__init__.py")
    }
    found = {f"mmpeft.{name}" if name.split(".")[0] in LINKED else name for name in found}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


@pytest.mark.parametrize("folder", LINKED)
def test_linked_folder_is_declared_and_has_one_name(folder):
    assert PROJECT["tool"]["setuptools"]["package-dir"][f"mmpeft.{folder}"] == folder
    assert (ROOT / "mmpeft" / folder).resolve() == ROOT / folder
    run = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert f"import this package as mmpeft.{folder}" in run.stderr


def test_version_is_said_once_and_agrees():
    import mmpeft

    assert PROJECT["project"]["version"] == mmpeft.__version__


def test_licences_lie_beside_what_they_cover():
    text = (ROOT / "mmpeft/pocket/LICENSES.md").read_text()
    for name in ("Noto Emoji", "Twemoji", "Fluent Emoji", "CC-BY-4.0", "emojibase-data", "emojilib"):
        assert name in text
