import base64
import hashlib

import pytest

from mmpeft.backbones.pocket import pocket_folder
from mmpeft.doctor import examine


@pytest.fixture(scope="module")
def report():
    return examine()


def sentences(report, topic, state):
    return [check.sentence for check in report.checks if (check.topic, check.state) == (topic, state)]


def test_a_machine_that_runs_the_tests_has_what_is_needed(report):
    assert report.problems == ()
    assert report.text().endswith("everything that is needed works")


def test_every_needed_package_is_named_with_its_version_and_range(report):
    import torch

    found = sentences(report, "packages", "ok")
    assert any(line.startswith(f"torch {torch.__version__} (needs >=") for line in found)
    assert {line.split()[0] for line in found} >= {
        "diffusers",
        "transformers",
        "peft",
        "accelerate",
        "mmpeft",
    }


def test_every_optional_package_is_there_or_comes_with_its_install_command(report):
    lines = [check for check in report.checks if check.topic == "optional"]
    names = {check.sentence.split()[0].rstrip(",") for check in lines}
    assert names == {"xformers", "prodigyopt", "bitsandbytes", "tensorboard", "wandb", "streamlit"}
    assert all("pip install 'mmpeft[" in check.sentence for check in lines if check.state == "absent")


def test_every_attention_is_available_or_says_why_not(report):
    import torch

    lines = [check for check in report.checks if check.topic == "attention"]
    assert len(lines) == 6
    assert "sdpa" in sentences(report, "attention", "ok")
    if not torch.cuda.is_available():
        assert any("xformers runs on CUDA only" in line for line in sentences(report, "attention", "absent"))


def test_the_embedded_base_draws(report):
    (line,) = sentences(report, "embedded base", "ok")
    state = hashlib.sha256()
    for path in sorted(pocket_folder().rglob("*.safetensors")):
        state.update(path.read_bytes())
    assert line.startswith("draws")
    assert state.hexdigest()[:16] in line


@pytest.fixture
def broken_installation(tmp_path, monkeypatch):
    """Another mmpeft in front of the path: it needs what is not there, and knows other bytes of one file."""
    changed = pocket_folder() / "model_index.json"
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"other bytes").digest()).rstrip(b"=").decode()
    metadata = "Metadata-Version: 2.1\nName: mmpeft\nVersion: 0.1.0\n"
    metadata += "Requires-Dist: torch>=99\nRequires-Dist: no-such-package>=1\n"
    package = tmp_path / "mmpeft-0.1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text(metadata)
    (package / "RECORD").write_text(f"{changed},sha256={digest},1\n")
    stranger = tmp_path / "stranger-1.0.dist-info"
    stranger.mkdir()
    (stranger / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (stranger / "entry_points.txt").write_text("[mmpeft.plugins]\nodd = no_such_module:register\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)


@pytest.mark.usefixtures("broken_installation")
def test_what_is_wrong_is_said_with_what_to_do():
    report = examine()
    said = "\n".join(check.sentence for check in report.problems)
    assert "is too old: pip install 'torch>=99'" in said
    assert "no-such-package is not installed: pip install 'no-such-package>=1'" in said
    assert "1 files are not as installed, first model_index.json" in said
    assert "odd of stranger cannot be loaded (ModuleNotFoundError: No module named 'no_such_module')" in said
    assert "OMP_WAIT_POLICY is not set: waiting threads spin" in said
    assert report.text().endswith("5 problems found")
