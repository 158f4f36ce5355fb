"""What the README shows of the benchmarks is what they measured."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_readme_s_table_is_made_from_the_results():
    spec = importlib.util.spec_from_file_location("fusion", ROOT / "benchmarks" / "fusion.py")
    fusion = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fusion)
    results = json.loads((ROOT / "benchmarks" / "results" / "fusion.json").read_text())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert fusion.BEGIN in readme
    assert fusion.END in readme
    assert fusion.into_readme(readme, results) == readme
    assert all(row["error"]["ours"] <= row["error"]["peft"] * (1 + 1e-6) for row in results["svd"])
    assert results["fusing"]["drift"]["ours"]["bytes that differ"] == 0
