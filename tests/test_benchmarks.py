"""What the README shows of the benchmarks is what they measured."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def shown(script, name: str, table: str) -> bool:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return script("readme_table").placed(readme, name, table) == readme


def test_the_table_beside_peft_and_diffusers_is_made_from_the_results(script):
    results = json.loads((RESULTS / "fusion.json").read_text())
    assert shown(script, "bench-fusion", script("fusion_table").table(results))
    assert all(row["error"]["ours"] <= row["error"]["peft"] * (1 + 1e-6) for row in results["svd"])
    assert results["fusing"]["drift"]["ours"]["bytes that differ"] == 0


def test_the_table_of_compositions_is_made_from_the_results(script):
    results = json.loads((RESULTS / "compositions.json").read_text())
    assert shown(script, "bench-compositions", script("compositions").table(results["scores"]))


def test_a_table_without_a_place_is_refused(script):
    with pytest.raises(ValueError, match="no place for bench-fusion"):
        script("readme_table").placed("# a page", "bench-fusion", "| a |")
